"""transformers in fp32 with eager attention: the reference for logits; `tokenizers` for ids.

The reference model is loaded by transformers itself, not through lconvert's reading of the checkpoint;
`Dequantized` is the opposite, the weights that lconvert reads out of an artifact in transformers' graph.
"""

from __future__ import annotations

import inspect
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.forward import Forward, explained, packages
from lconvert.ir import Tokenizer
from lconvert.validators.runtimes import Generation, Purpose, decompressed, fits


def prepare() -> None:
    """Import what the classes here need; transformers loads most of itself when a class is first named."""
    _, transformers = packages()
    _ = transformers.AutoModelForCausalLM, transformers.PreTrainedModel, transformers.GenerationMixin


def reference_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer.json as `tokenizers` runs it: the reference for ids."""
    return _tokenizer(json.dumps(tokenizer.json), "tokenizer.json")


def file_tokenizer(path: Path) -> Any:
    """`reference_tokenizer` of a tokenizer.json file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read, so this runtime cannot make ids of a text ({e})") from None
    return _tokenizer(text, str(path))


def _tokenizer(text: str, source: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingPackageError("tokenizers is not installed: pip install 'lconvert[hf]'") from None
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # noqa: BLE001 - its errors have no type of their own
        raise InputError(f"{source}: the tokenizers package refuses it ({e})") from None


def encode(tokenizer: Any, text: str, *, special: bool, framed: bool = False) -> list[int]:
    """Ids of a text by a `tokenizers.Tokenizer`, neither cut nor padded. framed: with the BOS and EOS that it adds."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special
    return list(tokenizer.encode(text, add_special_tokens=framed).ids)


class Transformers:
    """A Hugging Face folder loaded by `AutoModelForCausalLM`.

    parity: fp32 with eager attention, whatever the checkpoint's dtype. speed: the checkpoint's dtype with
    PyTorch's fused attention. dtype: another one, by torch's name. context: None for no limit but the model's
    own.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        purpose: Purpose = "parity",
        dtype: str | None = None,
    ):
        torch, transformers = packages()
        self._torch, self._version = torch, transformers.__version__
        if threads:
            torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._folder, self._context, self._ids = Path(folder), context, None
        self._attention = "eager" if purpose == "parity" else "sdpa"
        with explained(str(folder)):
            load = partial(
                transformers.AutoModelForCausalLM.from_pretrained,
                folder,
                dtype=dtype or ("float32" if purpose == "parity" else "auto"),
                attn_implementation=self._attention,
                local_files_only=True,
                trust_remote_code=False,
            )
            self._model = (
                decompressed.loaded(load) if decompressed.concerns(self._folder) else load()
            ).eval()
        # Only the last position's logits are needed to go on; not every class can leave the others out.
        able = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._last: dict[str, int] = {"logits_to_keep": 1} if able else {}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        if self._ids is None:
            self._ids = file_tokenizer(self._folder / "tokenizer.json")
        return encode(self._ids, text, special=special)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        fits(len(ids), self._context)
        with explained(str(self._folder)), self._torch.no_grad():
            out = self._model(self._torch.tensor([ids]), use_cache=False).logits[0]
        return np.ascontiguousarray(out.float().numpy())

    def generate(self, ids: list[int], n: int) -> Generation:
        fits(len(ids) + n - 1 if ids else 0, self._context)
        start, made, seconds = time.perf_counter(), [], []
        new, past = self._torch.tensor([ids]), None
        with explained(str(self._folder)), self._torch.no_grad():
            for _ in range(n):
                out = self._model(new, past_key_values=past, use_cache=True, **self._last)
                past = out.past_key_values
                new = out.logits[:, -1].argmax(-1, keepdim=True)
                made.append(int(new))
                seconds.append(time.perf_counter() - start)
        return Generation(tuple(made), tuple(seconds))

    def info(self) -> dict[str, str]:
        return {
            "runtime": "transformers",
            "transformers": self._version,
            "torch": str(self._torch.__version__),
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._attention,
            "threads": str(self._torch.get_num_threads()),
        }

    def close(self) -> None:
        del self._model


class Dequantized:
    """Any artifact that lconvert reads, its weights dequantized into transformers' graph in fp32, layer by
    layer.

    Only one layer's weights are in memory at a time, so `generate` runs the whole sequence again for every
    token: it is for comparing continuations, not for timing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        purpose: Purpose = "parity",
    ):
        from lconvert.converters import read

        torch, transformers = packages()
        if threads:
            torch.set_num_threads(threads)
        self._path, self._context, self._ids = str(path), context, None
        self._versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        self._model = read(path)
        self._forward = Forward(self._model)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        if self._ids is None:
            if self._model.tokenizer is None:
                raise InputError(f"{self._path}: holds no tokenizer, so no ids can be made of a text")
            self._ids = reference_tokenizer(self._model.tokenizer)
        return encode(self._ids, text, special=special)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        fits(len(ids), self._context)
        with explained(self._path):
            return self._forward.logits(ids)

    def generate(self, ids: list[int], n: int) -> Generation:
        fits(len(ids) + n - 1 if ids else 0, self._context)
        start, made, seconds = time.perf_counter(), list(ids), []
        for _ in range(n):
            made.append(int(self.logits(made)[-1].argmax()))
            seconds.append(time.perf_counter() - start)
        return Generation(tuple(made[len(ids) :]), tuple(seconds))

    def info(self) -> dict[str, str]:
        from lconvert import __version__, kernels

        return {
            "runtime": "dequantized",
            "lconvert": __version__,
            **self._versions,
            "dtype": "float32",
            "kernels": "compiled" if kernels.native_available() else "NumPy",
        }

    def close(self) -> None:
        del self._forward, self._model
