"""A case of `arch_cases` in every place it is compared: on disk, in lconvert, in transformers, in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lconvert
from lconvert.archs import find
from lconvert.validators.logits import log_softmax
from lconvert.validators.runtimes.llamacpp import LlamaCpp
from tests import random_models
from tests.arch_cases import Case


def kld(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of every position."""
    a, b = log_softmax(p), log_softmax(q)
    return (np.exp(a) * (a - b)).sum(axis=-1)


class Built:
    """A case's model: the folder, the Model, the F32 GGUF, and transformers' logits for a prompt."""

    def __init__(self, case: Case, root: Path):
        self.folder = random_models.build(case, root / case.name)
        self.ids = random_models.prompt(case)
        self.model = lconvert.read(self.folder)
        self.losses = find(case.model_type).gguf.losses(self.model.arch)
        self.hf = random_models.reference(self.folder)
        self.reference = random_models.logits(self.hf, self.ids)
        self.gguf = root / f"{case.name}.gguf"
        lconvert.convert(self.model, self.gguf, ftype="F32", allow_loss=case.losses)
        self.held: np.ndarray | None = None

    def full(self, case: Case) -> np.ndarray:
        """Logits of the F32 file."""
        if self.held is None:
            self.held = self.in_llama_cpp(case, self.gguf)
        return self.held

    def in_llama_cpp(self, case: Case, path: Path) -> np.ndarray:
        runtime = LlamaCpp(path, context=case.context, threads=2)
        try:
            return runtime.logits(self.ids)
        finally:
            runtime.close()
