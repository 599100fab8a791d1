"""transformers in fp32 with eager attention: the reference for logits; `tokenizers` for ids.

The reference model is loaded by transformers itself, not through lconvert's reading of the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.forward import explained, packages
from lconvert.ir import Tokenizer


def reference_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer.json as `tokenizers` runs it: the reference for ids."""
    try:
        import tokenizers
    except ImportError:
        raise MissingPackageError("tokenizers is not installed: pip install 'lconvert[hf]'") from None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.json))
    except Exception as e:  # noqa: BLE001 - its errors have no type of their own
        raise InputError(f"tokenizer.json: the tokenizers package refuses it ({e})") from None


class Transformers:
    """A Hugging Face folder loaded by `AutoModelForCausalLM` in fp32."""

    def __init__(self, folder: str | Path, *, threads: int | None = None):
        torch, transformers = packages()
        self._torch, self._version = torch, transformers.__version__
        if threads:
            torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._folder = str(folder)
        with explained(self._folder):
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
            ).eval()

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        with explained(self._folder), self._torch.no_grad():
            out = self._model(self._torch.tensor([ids]), use_cache=False).logits[0]
        return np.ascontiguousarray(out.float().numpy())

    def info(self) -> dict[str, str]:
        return {
            "runtime": "transformers",
            "transformers": self._version,
            "torch": str(self._torch.__version__),
        }

    def close(self) -> None:
        del self._model
