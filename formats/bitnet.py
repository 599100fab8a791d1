"""BitNet b1.58 checkpoints of transformers: ternary weights, four in a byte, and one scale per matrix.

`weight` U8 (N/4, K): bits 2i and 2i + 1 of byte row r are row i * N/4 + r of the weight plus 1, so a byte holds rows that
are N/4 apart (transformers integrations/bitnet.py `pack_weights`, `unpack_weights`). `weight_scale` (1,) in the model's
dtype divides in linear_class "bitlinear", the default (`BitLinear.post_quant_process`: out / (input_scale *
weight_scale)), and multiplies in "autobitlinear" (`AutoBitLinear.forward`). The input is quantized to int8 per token.

Not read: quantization_mode "online" (dense weights that every forward pass rounds anew) and use_rms_norm (a norm of its
own in front of every matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.fp8 import number
from lconvert.formats.scheme import Checkpoint, Part, Scheme, Weight, listed, take, view
from lconvert.ir import ActSpec, KVSpec, QTensor, Tensor, int_grid

FLOATS = ("F32", "F16", "BF16")
_KNOWN = {
    "quant_method",
    "modules_to_not_convert",
    "linear_class",
    "quantization_mode",
    "use_rms_norm",
    "rms_norm_eps",
}
_CLASSES = {"bitlinear": True, "autobitlinear": False}  # whether the scale divides
_PER_BYTE = 4


def parse(checkpoint: Checkpoint) -> Scheme:
    """The scheme of a `quant_method: bitnet`; UnsupportedError for modes whose weights are not ternary as stored."""
    config, where = checkpoint.config, checkpoint.where
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False):
            raise UnsupportedError(
                f"{where}: the key {show(key)} = {show(value)} is unknown to transformers' BitNet"
            )
    linear, mode = config.get("linear_class", "bitlinear"), config.get("quantization_mode", "offline")
    if not isinstance(linear, str) or linear not in _CLASSES:
        raise InputError(f"{where}: linear_class {show(linear)} must be one of {', '.join(_CLASSES)}")
    if mode != "offline":
        raise UnsupportedError(
            f"{where}: quantization_mode {show(mode)}: the weights are dense and rounded to ternary in every forward pass; "
            "take the packed checkpoint of the model (quantization_mode offline)"
        )
    if config.get("use_rms_norm"):
        raise UnsupportedError(
            f"{where}: use_rms_norm puts a norm in front of every matrix, which no architecture here has; dequantize the "
            "model with transformers"
        )
    return BitNet(linear)


@dataclass(frozen=True)
class BitNet:
    """A BitNet configuration, understood."""

    linear_class: str
    report: tuple[str, ...] = ()
    kv: KVSpec | None = None

    @property
    def method(self) -> str:
        return f"BitNet {self.linear_class}"

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        stored = parts.get("weight")
        if stored is not None and stored.dtype in FLOATS:
            if parts.keys() == {"weight"}:
                return None
            raise UnsupportedError(
                f"{stored.where}: a {stored.dtype} weight with {listed(parts.keys() - {'weight'})} is not packed; "
                "pack it with transformers' pack_weights"
            )
        if len(shape) != 2 or shape[0] % _PER_BYTE:
            raise InputError(f"{module}: a weight of shape {shape} does not pack four rows into a byte")
        rows, cols = shape
        packed = take(module, parts, "weight", ("U8",), (rows // _PER_BYTE, cols))
        scale = number(module, parts, "weight_scale", FLOATS, (1, 1))
        divides = _CLASSES[self.linear_class]
        q = QTensor(shape, _ternary(packed, rows), int_grid(2, True), (-1, -1), scale, divisor=divides)
        return Weight(
            q, frozenset({"weight", "weight_scale"}), ActSpec(int_grid(8, True), "token", dynamic=True)
        )


def _ternary(packed: Part, rows: int) -> Tensor:
    """Codes -1, 0, 1 of four rows per byte; reading a fourth value is an InputError."""
    quarter = rows // _PER_BYTE

    def read(start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, packed.shape[1]), np.int8)
        for i in range(_PER_BYTE):
            first, last = max(start, i * quarter), min(stop, (i + 1) * quarter)
            if first < last:
                found = packed.data.read(first - i * quarter, last - i * quarter) >> np.uint8(
                    2 * i
                ) & np.uint8(3)
                if (bad := found == 3).any():
                    row = first + int(np.argwhere(bad)[0][0])
                    raise InputError(
                        f"{packed.where}: row {row} holds the code 3, but weights are ternary; download it again"
                    )
                out[first - start : last - start] = found.view(np.int8) - 1
        return out

    return view(packed.data, (rows, packed.shape[1]), "I8", read)
