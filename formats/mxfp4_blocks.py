"""MXFP4 as gpt-oss is released: E2M1 codes two to a byte in blocks of 32 columns, one E8M0 exponent per block.

A stack of matrices (E, N, K) is `<name>_blocks`, U8 (E, N, K/32, 16), and `<name>_scales`, U8 (E, N, K/32). Column 2i of a
block is the low half of byte i, column 2i + 1 the high half; a value is its E2M1 number times 2^(scale - 127)
(transformers integrations/mxfp4.py `_convert_moe_packed_tensors`). GGUF's MXFP4 holds the same numbers in another order.
Other tensors of such a folder are plain, and its config names the modules that are, as patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.config_values import inert, name_list
from lconvert.formats.files import show
from lconvert.formats.gguf_blocks import native_type, one
from lconvert.formats.int_groups import refuse_kv
from lconvert.formats.module_rules import compiled
from lconvert.formats.scheme import Checkpoint, Held, Part, Stored, Weight
from lconvert.ir import E2M1, E8M0, KVSpec, QTensor, Tensor
from lconvert.kernels.packing import pack_nibbles, unpack_nibbles

#: What the name of a stack ends in, in the order of the arguments below.
SUFFIXES = ("_blocks", "_scales")
BLOCK = 32
#: The E8M0 code of NaN.
_NAN = 255
_KNOWN = {"quant_method", "modules_to_not_convert", "dequantize"}
#: modules_to_not_convert of the released folders: everything but the experts.
PLAIN = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Mxfp4:
    """The scheme: no linear module is quantized; the reader asks `raised` for the stacks of experts."""

    report: tuple[str, ...] = ()
    method: str = "mxfp4"
    kv: None = None

    def weight(self, module: str, parts: Mapping[str, Part], shape: tuple[int, ...]) -> Weight | None:
        return None


def parse(checkpoint: Checkpoint) -> Mxfp4:
    """The scheme of `quantization_config`; which tensors are packed is seen by their names."""
    unknown = sorted(checkpoint.config.keys() - _KNOWN)
    if unknown:
        raise UnsupportedError(
            f"{checkpoint.where}: quantization_config has the unknown key {show(unknown[0])}; it may change what the tensors "
            "mean, so lconvert does not guess"
        )
    patterns = _plain_modules(checkpoint)
    for name in sorted(checkpoint.names):
        module, _, rest = name.rpartition(".")
        if not rest.endswith(SUFFIXES[0]):
            continue
        for text, expression in patterns:
            if expression.match(module) or module.endswith(text):
                raise InputError(
                    f"{checkpoint.where}: modules_to_not_convert says {show(text)}, which leaves {module} plain, but "
                    f"{show(name)} is packed; transformers would not find its weights. Take it off the list"
                )
    return Mxfp4(inert(checkpoint.config, {"quant_method"}))


def _plain_modules(checkpoint: Checkpoint) -> list[tuple[str, re.Pattern[str]]]:
    """The names that stay plain, each with a regular expression on the beginning of a module, up to the end of a name between
    dots; the end of a module's name counts as well (transformers quantizers/quantizers_utils.py should_convert_module).
    """
    texts = checkpoint.config.get("modules_to_not_convert") or []
    texts = name_list(texts, "modules_to_not_convert", checkpoint.where)
    where = f"{checkpoint.where}: modules_to_not_convert: "
    found = compiled([(rf"(?:{t})(?:(?<=\.)|(?=\.|$))", where + show(t)) for t in texts])
    return list(zip(texts, found, strict=True))


def shapes(experts: int, rows: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of blocks and scales for stacked matrices whose rows are (N, K) in all."""
    n, cols = rows
    if cols % BLOCK:
        raise InputError(
            f"{cols} input features do not divide into MXFP4 blocks of {BLOCK}; config.json is wrong"
        )
    scales = (experts, n // experts, cols // BLOCK)
    return (*scales, BLOCK // 2), scales


def raised(blocks: Tensor, scales: Tensor) -> QTensor:
    """Rows of blocks (N, K/32, 16) and of scales (N, K/32) as the QTensor (N, K), lazily.

    Reading a scale of NaN raises InputError: transformers and ggml give such a block different numbers.
    """
    rows, count = scales.shape

    def codes(start: int, stop: int) -> NDArray[Any]:
        found = blocks.read(start, stop)
        return unpack_nibbles(found.reshape(stop - start, count * BLOCK // 2))

    side = _numbers((rows, count), scales)
    scale = QTensor((rows, count), side, E8M0, (-1, -1), one(scales))
    data = Tensor((rows, count * BLOCK), "U8", codes, blocks.origin, blocks.files)
    return QTensor(data.shape, data, E2M1, (1, BLOCK), scale)


def _numbers(shape: tuple[int, int], scales: Tensor) -> Tensor:
    """Exponents, every read of which is checked for NaN."""

    def read(start: int, stop: int) -> NDArray[Any]:
        found = scales.read(start, stop)
        if (found == _NAN).any():
            row, column = (int(i) for i in np.argwhere(found == _NAN)[0])
            raise InputError(
                f"{scales.origin}: row {start + row}, block {column}: its scale is NaN; download the file again"
            )
        return found

    return Tensor(shape, "U8", read, scales.origin, scales.files)


def fits(q: QTensor) -> bool:
    """Whether `packed` holds these numbers exactly: MXFP4's structure without a global scale."""
    scale = q.scale
    if native_type(q) != "MXFP4" or not isinstance(scale, QTensor) or not isinstance(scale.scale, Tensor):
        return False
    return bool((scale.scale.load() == 1).all())


def packed(q: QTensor) -> tuple[Tensor, Tensor]:
    """Blocks (N, K/32, 16) and scales (N, K/32) of a QTensor that `fits`: the inverse of `raised`, lazily.

    Reading a scale of NaN, which blocks of GGUF may have, raises InputError as in `raised`.
    """
    assert isinstance(q.scale, QTensor)
    rows, cols = q.shape

    def read(start: int, stop: int) -> NDArray[Any]:
        return pack_nibbles(q.codes.read(start, stop)).reshape(stop - start, cols // BLOCK, BLOCK // 2)

    shape = (rows, cols // BLOCK, BLOCK // 2)
    scales = _numbers((rows, cols // BLOCK), q.scale.codes)
    return Tensor(shape, "U8", read, q.codes.origin, q.codes.files), scales


# --- writing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """The config of such a folder. Linear modules have no place in it; stacks of experts are `packed`."""

    kv_names: tuple[str, str] = ("", "")

    def problem(self, held: Held) -> str | None:
        return "gpt-oss's MXFP4 folders hold quantized experts and nothing else"

    def store(self, held: Held) -> dict[str, Stored]:
        raise AssertionError("no linear module is stored")

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        refuse_kv("gpt-oss's MXFP4", kv)
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(PLAIN)}

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {}
