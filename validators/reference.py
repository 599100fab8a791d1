"""The original model as a reference for logits: transformers on its folder, and its logits from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lconvert import __version__
from lconvert.validators import logit_cache
from lconvert.validators.logits import Logits
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes import Generation, Runtime, open_runtime


class Reference:
    """The original model: transformers on a Hugging Face folder, else our own reading. Opened when first needed."""

    def __init__(self, proof: Proof) -> None:
        source, options = proof.source, proof.options
        self._source, self._options = source, options
        folder = Path(source.source)
        self.independent = (folder / "config.json").is_file()
        self._runtime: Runtime | None = None
        self._cached = logit_cache.CachedLogits(options.cache, self._key(folder), self._open)

    def _key(self, folder: Path) -> dict[str, Any]:
        if self._options.cache is None:
            return {}
        return {
            "model": logit_cache.model_hash(folder) if folder.exists() else None,
            "runtime": "transformers" if self.independent else f"dequantized by lconvert {__version__}",
            "versions": _versions("torch", "transformers"),
            "settings": "fp32, eager attention",
        }

    def _open(self) -> Logits:
        return self.runtime.logits

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            name = "transformers" if self.independent else "dequantized"
            self._runtime = open_runtime(name, self._source.source, threads=self._options.threads)
        return self._runtime

    def logits(self, ids: list[int]) -> Any:
        return self._cached(ids)

    def generate(self, ids: list[int], n: int) -> Generation:
        return Generation(self._cached.continuation(ids, n, lambda: self.runtime.generate(ids, n).ids), ())

    def info(self) -> dict[str, str]:
        if self._runtime is not None:
            return self._runtime.info()
        return {"runtime": "transformers", "logits": "from the cache", **_versions("torch", "transformers")}

    @property
    def notes(self) -> list[str]:
        return self._cached.notes

    def close(self) -> None:
        if self._runtime is not None:
            self._runtime.close()


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in packages:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
