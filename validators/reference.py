"""The original model as a reference for logits: transformers on its folder, and its logits from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lconvert import __version__
from lconvert.validators import logit_cache
from lconvert.validators.logits import Logits
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes import Generation, Runtime, installed, open_runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Reference:
    """The original model: transformers on a plain Hugging Face folder, else our own reading (GGUF, .lcir, and folders that are
    quantized themselves, whose dequantized values are meant). Opened when first needed."""

    def __init__(self, proof: Proof) -> None:
        source, options = proof.source, proof.options
        self._source, self._options = source, options
        self.independent = (Path(source.source) / "config.json").is_file() and not proof.carries
        self._name = "transformers" if self.independent else "dequantized"
        self._runtime: Runtime | None = None
        key = {} if options.cache is None else self._key(proof.source_hash)
        self._cached = logit_cache.CachedLogits(options.cache, key, self._open)

    def _key(self, model: str | None) -> dict[str, Any]:
        return {
            "model": model,
            "runtime": self._name if self.independent else f"dequantized by lconvert {__version__}",
            "versions": _versions(),
            "settings": "fp32, eager attention",
        }

    def _open(self) -> Logits:
        return self.runtime.logits

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            self._runtime = open_runtime(self._name, self._source.source, threads=self._options.threads)
        return self._runtime

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        return self._cached(ids)

    def generate(self, ids: list[int], n: int) -> Generation:
        return Generation(self._cached.continuation(ids, n, lambda: self.runtime.generate(ids, n).ids), ())

    def info(self) -> dict[str, str]:
        if self._runtime is not None:
            return self._runtime.info()
        return {"runtime": self._name, "logits": "from the cache", **_versions()}

    @property
    def notes(self) -> list[str]:
        return self._cached.notes

    def close(self) -> None:
        if self._runtime is not None:
            self._runtime.close()


def _versions() -> dict[str, str]:
    return {name: installed(name) or "not installed" for name in ("torch", "transformers")}
