"""llama.cpp through llama-cpp-python's C bindings: fp32 KV cache, flash attention off, full-vocabulary logits.

These settings remove the runtime's own approximations as far as it allows; what is left (weights' block types
multiply 8-bit activations, ggml's half-precision GELU table) is the floor that gates.yaml records.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError

_F32 = 0  # GGML_TYPE_F32
_FLASH_ATTENTION_OFF = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED


def package() -> Any:
    """The llama_cpp module, silenced and initialised."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingPackageError(
            "llama.cpp is not installed, so nothing was proven in it: pip install 'lconvert[llamacpp]'"
        ) from None
    return llama_cpp


_LOG: list[str] = []
_CALLBACK: Any = None


def _capture_log(llama_cpp: Any) -> None:
    """llama.cpp's log goes into a list: it is the only place that says why a file is refused."""
    global _CALLBACK
    if _CALLBACK is None:

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def keep(level: int, text: bytes, user_data: object) -> None:
            if level >= 3:  # GGML_LOG_LEVEL_WARN
                _LOG.append(text.decode("utf-8", "replace"))
                del _LOG[:-200]

        _CALLBACK = keep
    llama_cpp.llama_log_set(
        _CALLBACK, ctypes.c_void_p(0)
    )  # whoever set another one meanwhile may have freed it


class LlamaCpp:
    """A GGUF file in llama.cpp. `vocab_only` loads the tokenizer alone."""

    def __init__(
        self, path: str | Path, *, context: int = 512, threads: int | None = None, vocab_only: bool = False
    ):
        self._c = package()
        _capture_log(self._c)
        self._c.llama_backend_init()
        params = self._c.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        # Repacked weight layouts use other kernels; the plain ones are what a first proof is about.
        params.use_extra_bufts = False
        del _LOG[:]
        self._model = self._c.llama_model_load_from_file(str(path).encode(), params)
        self.warnings = [line.strip() for line in _LOG]
        if not self._model:
            raise InputError(
                f"{path}: llama.cpp cannot load it: {' | '.join(self.warnings) or 'no reason given'}"
            )
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._c.llama_vocab_n_tokens(self._vocab))
        self._context: Any = None
        self.context = context
        self._threads = threads
        if not vocab_only:
            self._open(context)

    def _open(self, context: int) -> None:
        params = self._c.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_ubatch = min(context, 512)
        params.n_seq_max = 1
        if self._threads:
            params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = _F32
        params.flash_attn_type = _FLASH_ATTENTION_OFF
        params.no_perf = True
        # A window's cache must hold what the window sees; a full-size cache keeps one path for all models.
        params.swa_full = True
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise InputError(f"llama.cpp cannot open a context of {context} tokens: {' | '.join(_LOG[-3:])}")

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8")
        size = len(data) + 16
        while True:
            out = (ctypes.c_int32 * size)()
            n = self._c.llama_tokenize(self._vocab, data, len(data), out, size, False, special)
            if n >= 0:
                return list(out[:n])
            size = -n

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        if self._context is None or len(ids) > self.context:
            raise InputError(f"{len(ids)} tokens do not fit the context of {self.context}")
        memory = self._c.llama_get_memory(self._context)
        self._c.llama_memory_clear(memory, True)
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            code = self._c.llama_decode(self._context, batch)
        finally:
            self._c.llama_batch_free(batch)
        if code:
            raise InputError(f"llama_decode failed with {code}: {' | '.join(_LOG[-3:])}")
        pointer = self._c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(len(ids), self.n_vocab)).copy()

    def info(self) -> dict[str, str]:
        from importlib.metadata import version

        system = self._c.llama_print_system_info().decode()
        return {"runtime": "llama.cpp", "llama-cpp-python": version("llama-cpp-python"), "system": system}

    def close(self) -> None:
        if self._context:
            self._c.llama_free(self._context)
            self._context = None
        if self._model:
            self._c.llama_model_free(self._model)
            self._model = None
