"""llama.cpp through llama-cpp-python's C bindings.

For parity: fp32 KV cache, flash attention off, plain weight layouts. These settings remove the runtime's own
approximations as far as it allows; what is left (weights' block types multiply 8-bit activations, ggml's
half-precision GELU table) is the floor that gates.yaml records. For speed: the library's defaults, which are
a server's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.executor import cpus
from lconvert.validators.runtimes import Generation, Purpose, fits, installed

_F32 = 0  # GGML_TYPE_F32
_FLASH_ATTENTION_OFF = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
_ROWS_BYTES = 128 << 20  # llama.cpp's own buffer for the logits of one batch

#: what info() says of the settings, by purpose
_SETTINGS: dict[Purpose, dict[str, str]] = {
    "parity": {"kv_cache": "F32", "flash_attention": "off"},
    "speed": {"kv_cache": "F16", "flash_attention": "auto"},
}
#: Builds for AMX repack quantized weights for it and then crash in the first product on some machines
#: (github.com/ggml-org/llama.cpp/issues/20824, open in 0.3.36).
_CRASHES_REPACKED = "AMX_INT8 = 1"


def prepare() -> None:
    """Import what the class here needs."""
    package()


def package() -> Any:
    """The llama_cpp module, silenced and initialised."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingPackageError(
            "llama.cpp is not installed, so nothing was proven in it: pip install 'lconvert[llamacpp]'"
        ) from None
    return llama_cpp


LOG: list[str] = []
_CALLBACK: Any = None


def capture_log(llama_cpp: Any) -> None:
    """llama.cpp's log goes into a list: it is the only place that says why a file is refused."""
    global _CALLBACK
    if _CALLBACK is None:

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def keep(level: int, text: bytes, user_data: object) -> None:
            if level >= 3:  # GGML_LOG_LEVEL_WARN
                LOG.append(text.decode("utf-8", "replace"))
                del LOG[:-200]

        _CALLBACK = keep
    llama_cpp.llama_log_set(
        _CALLBACK, ctypes.c_void_p(0)
    )  # whoever set another one meanwhile may have freed it


class LlamaCpp:
    """A GGUF file in llama.cpp. `vocab_only` loads the tokenizer alone.

    repack: weights in the layouts of the CPU's best kernels; None for llama.cpp's default, where it is known
    to work, when the purpose is speed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 512,
        threads: int | None = None,
        purpose: Purpose = "parity",
        repack: bool | None = None,
        vocab_only: bool = False,
    ):
        self._c = package()
        capture_log(self._c)
        self._c.llama_backend_init()
        self._purpose: Purpose = purpose
        params = self._c.llama_model_default_params()
        params.vocab_only = vocab_only
        if purpose == "parity":
            params.n_gpu_layers = 0
        self._system = self._c.llama_print_system_info().decode()
        if repack is None:
            # Repacked weight layouts use other kernels; the plain ones are what a first proof is about.
            repack = purpose == "speed" and _CRASHES_REPACKED not in self._system
        self._repack = params.use_extra_bufts = repack
        del LOG[:]
        self._model = self._c.llama_model_load_from_file(str(path).encode(), params)
        self.warnings = [line.strip() for line in LOG]
        if not self._model:
            raise InputError(
                f"{path}: llama.cpp cannot load it: {' | '.join(self.warnings) or 'no reason given'}"
            )
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._c.llama_vocab_n_tokens(self._vocab))
        self._context: Any = None
        self.context = 0 if vocab_only else context
        self._threads = threads or cpus()
        if not vocab_only:
            self._open(context)

    def _open(self, context: int) -> None:
        params = self._c.llama_context_default_params()
        self._batch = max(1, min(context, _ROWS_BYTES // (4 * self.n_vocab)))
        params.n_ctx, params.n_batch = context, self._batch
        params.n_ubatch = min(self._batch, 512)
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        if self._purpose == "parity":
            params.type_k = params.type_v = _F32
            params.flash_attn_type = _FLASH_ATTENTION_OFF
            # A window's cache must hold what the window sees; a full-size cache keeps one path for all models.
            params.swa_full = True
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise InputError(f"llama.cpp cannot open a context of {context} tokens: {' | '.join(LOG[-3:])}")

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return self._ids(text, framed=False, special=special)

    def _ids(self, text: str, *, framed: bool, special: bool) -> list[int]:
        """`framed`: with the bos and eos that llama.cpp adds."""
        data = text.encode("utf-8")
        size = len(data) + 16
        while True:
            out = (ctypes.c_int32 * size)()
            n = self._c.llama_tokenize(self._vocab, data, len(data), out, size, framed, special)
            if n >= 0:
                return list(out[:n])
            size = -n

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], at: int, every: bool) -> None:
        """Run `ids` as the positions from `at` on; logits of every position, or of the last alone."""
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = at + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every or i == len(ids) - 1
            code = self._c.llama_decode(self._context, batch)
        finally:
            self._c.llama_batch_free(batch)
        if code:
            raise InputError(f"llama_decode failed with {code}: {' | '.join(LOG[-3:])}")

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        fits(len(ids), self.context)
        self._clear()
        out = np.empty((len(ids), self.n_vocab), np.float32)
        for at in range(0, len(ids), self._batch):
            part = ids[at : at + self._batch]
            self._decode(part, at, every=True)
            pointer = self._c.llama_get_logits(self._context)
            out[at : at + len(part)] = np.ctypeslib.as_array(pointer, shape=(len(part), self.n_vocab))
        return out

    def generate(self, ids: list[int], n: int) -> Generation:
        fits(len(ids) + n - 1 if ids else 0, self.context)
        start, made, seconds = time.perf_counter(), list[int](), list[float]()
        self._clear()
        for at in range(0, len(ids), self._batch):
            self._decode(ids[at : at + self._batch], at, every=False)
        while len(made) < n:
            pointer = self._c.llama_get_logits_ith(self._context, -1)
            made.append(int(np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).argmax()))
            seconds.append(time.perf_counter() - start)
            if len(made) < n:
                self._decode(made[-1:], len(ids) + len(made) - 1, every=False)
        return Generation(tuple(made), tuple(seconds))

    def info(self) -> dict[str, str]:
        return {
            "runtime": "llama.cpp",
            "llama-cpp-python": installed("llama-cpp-python") or "unknown",
            "system": self._system,
            "threads": str(self._threads),
            "repacked_weights": "on" if self._repack else "off",
            **_SETTINGS[self._purpose],
        }

    def close(self) -> None:
        if self._context:
            self._c.llama_free(self._context)
            self._context = None
        if self._model:
            self._c.llama_model_free(self._model)
            self._model = None
