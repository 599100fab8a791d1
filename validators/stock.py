"""The stock encoder: llama.cpp's own quantizer on the same model, what an artifact must not be worse than.

The floats go through lconvert's GGUF writer, the quantization is llama_model_quantize without an importance matrix.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lconvert.archs import find
from lconvert.converters import gguf, gguf_mixture
from lconvert.converters.gguf_mixture_rules import FTYPES
from lconvert.errors import RuntimeFailure
from lconvert.executor import cpus, execute
from lconvert.ir import Decoder, Model, QTensor
from lconvert.validators import stored
from lconvert.validators.runtimes import llamacpp

#: What a curve of quality against size consists of, largest first.
CURVE = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
#: Mixtures that llama.cpp makes without an importance matrix and that name a stock type of their own.
TYPES = (*CURVE, "Q5_K_S", "Q4_K_S", "Q3_K_L", "Q3_K_S", "Q5_0", "Q5_1", "Q4_1", "IQ4_NL", "IQ4_XS")

#: Files whose bits per weight differ by less are of the same size.
_SAME = 0.01


@dataclass(frozen=True)
class Stock:
    """A file of the stock encoder."""

    type: str
    path: Path
    bytes: int
    bits_per_weight: float


class StockEncoder:
    """Makes stock files of `source` in `folder`; the floats are written once."""

    def __init__(self, source: Model, folder: Path, threads: int | None = None) -> None:
        self._source, self._folder, self._threads = source, folder, threads
        self._floats: Path | None = None

    @staticmethod
    def size(source: Model) -> int:
        """Bytes of the floats that it has to write first."""
        return sum(2 * e.data.size if _narrow(e.data) else 4 * e.data.size for e in source.entries.values())

    def make(self, type_: str) -> Stock:
        """llama.cpp's file of this mixture ("Q4_K_M"); RuntimeFailure where its quantizer refuses the model."""
        if self._floats is None:
            self._floats = execute(
                gguf.plan(self._source, "floats.gguf", options(self._source.decoder, "COPY")),
                self._folder,
                threads=self._threads,
                force=True,
            ).paths[0]
        out = self._folder / f"stock-{type_}.gguf"
        llama_cpp = llamacpp.package()
        llamacpp.capture_log(llama_cpp)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FTYPES[type_].number
        params.nthread = self._threads or cpus()
        code = llama_cpp.llama_model_quantize(
            os.fsencode(self._floats), os.fsencode(out), ctypes.byref(params)
        )
        if code:
            raise RuntimeFailure(f"llama.cpp's quantizer refused {type_}: {' | '.join(llamacpp.LOG[-3:])}")
        size, bits = stored.stored(out)
        assert bits is not None
        return Stock(type_, out, size, bits)


def options(arch: Decoder, type_: str) -> gguf.Options:
    """A mixture by its name, with whatever llama.cpp lacks of these traits accepted."""
    losses = tuple(x.name for x in find(arch.family).gguf.losses(arch))
    return gguf.Options(gguf_mixture.Options(type_), allow_loss=losses)


def _narrow(data: Any) -> bool:
    return not isinstance(data, QTensor) and data.dtype in ("F16", "BF16")


def rival(source: Model, named: str | None, bits: float) -> str | None:
    """The stock type to measure a file of so many bits per weight against: `named`, what general.file_type says, where
    the stock encoder makes it in this size, else the largest that is not larger; None where all are."""
    named = named if named in TYPES else None
    planned = {t: _planned_bits(source, t) for t in dict.fromkeys((*([named] if named else []), *CURVE))}
    if named is not None and abs(planned[named] - bits) <= _SAME * bits:
        return named
    smaller = [t for t in CURVE if planned[t] <= bits * (1 + _SAME)]
    return max(smaller, key=lambda t: planned[t], default=None)


def _planned_bits(source: Model, type_: str) -> float:
    """Bits per weight that the mixture will have, from headers alone."""
    plan = gguf.plan(source, "m.gguf", options(source.decoder, type_))
    return stored.bits_per_weight((i.nbytes, i.shape) for i in plan.items()) or 0.0
