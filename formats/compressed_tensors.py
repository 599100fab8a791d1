"""compressed-tensors, the format of llm-compressor and vLLM: reading it.

W is (N, K), one set of tensors per module (compressors/*/base.py of the package `compressed_tensors`):

pack-quantized   weight_packed I32 (N, words), weight_scale, weight_shape I64 (2,); asymmetric: weight_zero_point I32
                 packed along N. Code j of a row is its bits j*b onwards; releases before 0.19 put 32 // b codes into
                 a word and leave the rest of it unused. The two differ for 3, 5, 6 and 7 bits and are told apart by
                 their shapes. Stored is the signed code + 2^(b-1) (pack_quantized/helpers.py `pack_to_int32`).
int-, float-, naive-quantized
                 weight I8 or E4M3 (N, K), weight_scale; asymmetric: weight_zero_point I8, of the signed codes.
nvfp4-pack-quantized
                 weight_packed U8 (N, K / 2), column 2i the low half; weight_scale E4M3 (N, K / 16);
                 weight_global_scale F32 (1,), which divides.
mxfp4-pack-quantized, mxfp8-quantized
                 as above, weight_scale U8 (N, K / 32) holds exponents, 2^(byte - 127).

A weight is (code - zero) * scale (quantization/lifecycle/forward_helpers.py `_dequantize`), with scale / global first. Scales
have shape (1,), (N, 1), (N, K / group) or one per block. Old act-order files have weight_g_idx I32 (K,): the columns
sorted by it form the groups.

Static activations: input_scale (1,) and, asymmetric, input_zero_point I8 (1,). NVFP4's have input_global_scale F32 (1,),
which divides too. Asymmetric integers are unsigned in the IR, so 2^(b-1) is added to codes and zeros.

"frozen" files hold codes like compressed ones where their weights are I8 or F8; with float weights they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import fp8
from lconvert.formats.compressed_tensors_config import (
    MXFP4,
    MXFP8,
    NVFP4,
    PACKED,
    PLAIN,
    Args,
    Config,
    Rule,
    read_config,
)
from lconvert.formats.compressed_tensors_writer import Writer
from lconvert.formats.files import show
from lconvert.formats.scheme import Checkpoint, Part, Weight, finite_scales, groups, take, view
from lconvert.ir import E2M1, E4M3, ActSpec, Grid, KVSpec, QTensor, Tensor, int_grid
from lconvert.kernels import packing
from lconvert.spec import blocks

__all__ = ["CompressedTensors", "Writer", "parse"]

#: Modules that are linear and never quantized although a config may name their class: newer transformers have classes of
#: their own for them (quantization/quant_config.py `get_vllm_module_type`).
_ROUTERS = {"gate", "router"}

Parts = Mapping[str, Part]
Read = tuple[QTensor, set[str]]


@dataclass(frozen=True)
class CompressedTensors:
    """The scheme of one checkpoint."""

    config: Config
    method: str
    kv: KVSpec | None
    report: tuple[str, ...]

    def weight(self, module: str, parts: Parts, shape: tuple[int, ...]) -> Weight | None:
        rule, why = self.config.rule(module)
        if rule is None:
            fp8.plain_or_error(module, parts, why)
            return None
        stored = parts.get("weight")
        if stored is not None and stored.dtype in fp8.FLOATS:
            if parts.keys() == {"weight"} and module.rpartition(".")[2] in _ROUTERS:
                return None
            raise InputError(
                f"{stored.where}: is stored as {stored.dtype}, but {why} as {rule.format}: it was saved before it was "
                "compressed, save the model again with save_compressed=True"
            )
        data, used = _READERS[rule.format](module, parts, shape, rule.weights)
        activation, more = _activation(module, parts, rule)
        return Weight(data, frozenset(used | more), activation)


def parse(checkpoint: Checkpoint) -> CompressedTensors:
    """The scheme of `quantization_config`."""
    config = read_config(checkpoint.where, checkpoint.config)
    rules = list(dict.fromkeys(config.rules.values()))
    words = [f"{r.format} {r.weights}" for r in rules] or ["dense"]
    kv = None
    if config.kv is not None:
        kv = _kv(checkpoint.where, config.kv)
        words.append(f"KV cache {config.kv}")
    return CompressedTensors(config, f"compressed-tensors ({'; '.join(words)})", kv, config.report)


def _kv(where: str, args: Args) -> KVSpec:
    if args.strategy != "tensor" or not args.symmetric or args.dynamic == "local" or args.bits != 8:
        raise UnsupportedError(
            f"{where}: a KV cache of {args}; only 8 bits per tensor, symmetric, can be carried"
        )
    spec = ActSpec(_grid(args), "tensor", bool(args.dynamic))
    return KVSpec(spec, spec)


def _grid(args: Args) -> Grid:
    if args.kind == "int":
        return int_grid(args.bits, args.symmetric)
    return E4M3 if args.bits == 8 else E2M1


# --- weights -----------------------------------------------------------------------------------------------


def _scale(module: str, parts: Parts, args: Args, shape: tuple[int, ...]) -> Tensor:
    if args.blocks == (-1, -1):
        return fp8.number(module, parts, "weight_scale", fp8.FLOATS, (1, 1))
    if args.group is not None:
        groups(module, shape[1], args.group)
    part = take(module, parts, "weight_scale", fp8.FLOATS, blocks(shape, args.blocks))
    return finite_scales(part.data)


def _packed(module: str, parts: Parts, shape: tuple[int, ...], args: Args) -> Read:
    rows, cols = shape
    words = take(module, parts, "weight_packed", ("I32",), (rows, -1))
    stored = take(module, parts, "weight_shape", ("I64", "I32"), (2,))
    if tuple(stored.data.load().tolist()) != shape:
        raise InputError(
            f"{stored.where}: says {tuple(stored.data.load().tolist())}, the configuration implies {shape}"
        )
    stream = _stream(words, cols, args.bits)
    signed = args.symmetric

    def read(start: int, stop: int) -> NDArray[Any]:
        return packing.unpack_rows(
            words.data.read(start, stop), args.bits, cols, signed=signed, stream=stream
        )

    codes = view(words.data, shape, "I8" if signed else "U8", read)
    q = QTensor(shape, codes, _grid(args), args.blocks, _scale(module, parts, args, shape))
    used = {"weight_packed", "weight_shape", "weight_scale"}
    if not signed:
        q = replace(q, zero=_packed_zero(module, parts, q.scale.shape, args.bits, stream))
        used.add("weight_zero_point")
    return _ordered(module, parts, args, q, used | _zeros(module, parts, args, signed))


def _stream(words: Part, cols: int, bits: int) -> bool:
    """Whether rows are dense streams of bits, by their width; where both ways have it, they are the same for 2^n bits."""
    dense, padded = packing.words_for(cols, bits), packing.words_for(cols, bits, False)
    if words.shape[1] not in (dense, padded):
        raise InputError(
            f"{words.where}: rows of {words.shape[1]} words, but {cols} codes of {bits} bits take {dense} (or {padded} "
            "before release 0.19); config.json and the weights do not belong together"
        )
    if dense == padded and 32 % bits and cols > 32 // bits:
        raise UnsupportedError(f"{words.where}: {cols} codes of {bits} bits look the same dense and padded")
    return words.shape[1] == dense


def _packed_zero(module: str, parts: Parts, shape: tuple[int, ...], bits: int, stream: bool) -> Tensor:
    """Zero points (N, groups) U8 of words packed along the first axis."""
    rows, width = shape
    part = take(module, parts, "weight_zero_point", ("I32",), (packing.words_for(rows, bits, stream), width))
    unit, per = (32, bits) if stream else (32 // bits, 1)  # so many rows share so many words

    def read(start: int, stop: int) -> NDArray[Any]:
        first, last = start // unit, -(-stop // unit)
        words = part.data.read(first * per, min(last * per, part.shape[0]))
        count = min(last * unit, rows) - first * unit
        codes = packing.unpack_rows(np.ascontiguousarray(words.T), bits, count, stream=stream)
        return np.ascontiguousarray(codes.T[start - first * unit : stop - first * unit])

    return view(part.data, shape, "U8", read)


def _zeros(module: str, parts: Parts, args: Args, signed: bool) -> set[str]:
    """Zero points of a symmetric weight, which old releases stored: they must all be 0."""
    if not signed or "weight_zero_point" not in parts:
        return set()
    part = parts["weight_zero_point"]
    if part.dtype not in ("I8", *fp8.FLOATS) or part.data.load().any():
        raise InputError(
            f"{part.where}: {part.dtype} zero points, but the config says {args}; only zeros of type I8 can be there"
        )
    return {"weight_zero_point"}


def _ordered(module: str, parts: Parts, args: Args, q: QTensor, used: set[str]) -> Read:
    """The weight with its column order, if it has one."""
    if "weight_g_idx" not in parts:
        if args.reordered:
            raise InputError(
                f"{module}: actorder is group, but weight_g_idx is missing; download the checkpoint again"
            )
        return q, used
    cols = q.shape[1]
    part = take(module, parts, "weight_g_idx", ("I32",), (cols,))
    index = part.data.load()
    used.add("weight_g_idx")
    if (index == -1).all():
        return q, used  # was never set (lifecycle/initialize.py), so columns are in order
    size = args.group or cols
    count = cols // size
    if index.min() < 0 or index.max() >= count or (np.bincount(index, minlength=count) != size).any():
        raise InputError(
            f"{part.where}: must name each of {count} groups {size} times, found {index.min()} to {index.max()}"
        )
    if (index == np.arange(cols) // size).all():
        return q, used
    return replace(q, g_idx=view(part.data, (cols,), "I32", lambda a, b: index[a:b])), used


def _plain(module: str, parts: Parts, shape: tuple[int, ...], args: Args) -> Read:
    used = {"weight", "weight_scale"}
    if args.kind == "float":
        codes = fp8.float_codes(take(module, parts, "weight", ("F8_E4M3",), shape))
        q = QTensor(shape, codes, E4M3, args.blocks, _scale(module, parts, args, shape))
        return _ordered(module, parts, args, q, used | _zeros(module, parts, args, True))
    part = take(module, parts, "weight", ("I8",), shape)
    codes = _integers(part, args)
    q = QTensor(shape, codes, _grid(args), args.blocks, _scale(module, parts, args, shape))
    if not args.symmetric:
        wanted = parts["weight_scale"].shape
        zero = take(module, parts, "weight_zero_point", ("I8",), wanted)
        q = replace(q, zero=_unsigned_zero(zero, q.scale.shape, args.bits))
        used.add("weight_zero_point")
    return _ordered(module, parts, args, q, used | _zeros(module, parts, args, args.symmetric))


def _integers(part: Part, args: Args) -> Tensor:
    """Stored signed integers as codes; one out of range is an error when it is read."""
    half = 1 << (args.bits - 1)

    def read(start: int, stop: int) -> NDArray[Any]:
        found = part.data.read(start, stop)
        if args.bits < 8 and (bad := (found < -half) | (found >= half)).any():
            row, col = (int(n[0]) for n in np.nonzero(bad))
            raise InputError(
                f"{part.where}: {found[row, col]} at row {start + row}, column {col} does not fit {args.bits} bits; "
                "config.json and the weights do not belong together"
            )
        return found if args.symmetric else (found.view(np.uint8) + np.uint8(half))

    return view(part.data, part.shape, "I8" if args.symmetric else "U8", read)


def _unsigned_zero(part: Part, shape: tuple[int, ...], bits: int) -> Tensor:
    """Stored zero points of signed codes, as those of unsigned ones; one out of range is an error when it is read."""
    half = 1 << (bits - 1)

    def read(start: int, stop: int) -> NDArray[Any]:
        found = part.data.load().reshape(shape)[start:stop].astype(np.int16) + half
        if found.size and (found.min() < 0 or found.max() >= 2 * half):
            raise InputError(
                f"{part.where}: a zero point does not fit {bits} bits ({-half} to {half - 1}); it is damaged"
            )
        return found.astype(np.uint8)

    return view(part.data, shape, "U8", read)


def _nibbles(module: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    if shape[1] % 2:
        raise InputError(f"{module}: {shape[1]} input features are odd, two 4-bit floats share a byte")
    part = take(module, parts, "weight_packed", ("U8",), (shape[0], shape[1] // 2))
    return view(part.data, shape, "U8", lambda a, b: packing.unpack_nibbles(part.data.read(a, b), shape[1]))


def _nvfp4(module: str, parts: Parts, shape: tuple[int, ...], args: Args) -> Read:
    count = groups(module, shape[1], 16)
    part = take(module, parts, "weight_scale", ("F8_E4M3",), (shape[0], count))
    overall = fp8.number(module, parts, "weight_global_scale", ("F32",), (1, 1))
    scale = QTensor(part.shape, _block_scales(part), E4M3, (-1, -1), overall, divisor=True)
    q = QTensor(shape, _nibbles(module, parts, shape), E2M1, args.blocks, scale)
    used = {"weight_packed", "weight_scale", "weight_global_scale"}
    return _ordered(module, parts, args, q, used)


def _block_scales(part: Part) -> Tensor:
    """Bytes of E4M3 scales; NaN and negative zero are damage."""
    codes = fp8.float_codes(part)

    def read(start: int, stop: int) -> NDArray[Any]:
        found = codes.read(start, stop)
        if (bad := (found == 0x80).any(axis=1)).any():
            row = start + int(np.nonzero(bad)[0][0])
            raise InputError(f"{part.where}: the scale -0.0 in row {row} is damaged; download the file again")
        return found

    return view(part.data, part.shape, "U8", read)


def _mx_scale(module: str, parts: Parts, shape: tuple[int, ...]) -> QTensor:
    count = groups(module, shape[1], 32)
    return fp8.exponents(take(module, parts, "weight_scale", ("U8", "F8_E8M0"), (shape[0], count)))


def _mxfp4(module: str, parts: Parts, shape: tuple[int, ...], args: Args) -> Read:
    q = QTensor(shape, _nibbles(module, parts, shape), E2M1, args.blocks, _mx_scale(module, parts, shape))
    return _ordered(module, parts, args, q, {"weight_packed", "weight_scale"})


def _mxfp8(module: str, parts: Parts, shape: tuple[int, ...], args: Args) -> Read:
    codes = fp8.float_codes(take(module, parts, "weight", ("F8_E4M3",), shape))
    q = QTensor(shape, codes, E4M3, args.blocks, _mx_scale(module, parts, shape))
    return _ordered(module, parts, args, q, {"weight", "weight_scale"})


_READERS: Mapping[str, Callable[[str, Parts, tuple[int, ...], Args], Read]] = {
    PACKED: _packed,
    NVFP4: _nvfp4,
    MXFP4: _mxfp4,
    MXFP8: _mxfp8,
} | dict.fromkeys(PLAIN, _plain)


# --- activations -------------------------------------------------------------------------------------------


def _activation(module: str, parts: Parts, rule: Rule) -> tuple[ActSpec | None, set[str]]:
    """How the input is quantized, with what is stored for it."""
    args = rule.inputs
    if args is None:
        return None, set()
    what = f"{module}: input_activations of {args}"
    if args.kind == "float" and (args.bits not in (4, 8) or not args.symmetric):
        raise UnsupportedError(f"{what}: only symmetric floats of 4 and 8 bits are known")
    if args.kind == "int" and not 2 <= args.bits <= 8:
        raise UnsupportedError(f"{what}: only integers of 2 to 8 bits are known")
    grid = _grid(args)
    if args.dynamic == "local":
        overall = fp8.number(module, parts, "input_global_scale", ("F32",), (1,))
        return ActSpec(grid, "group", True, args.group, overall, divisor=True), {"input_global_scale"}
    if args.dynamic and args.strategy in ("token", "tensor", "group"):
        powers = args.scale_dtype == "torch.uint8" or rule.format in (MXFP4, MXFP8)
        if args.kind == "float" and args.strategy == "group" and (args.group == 32) != powers:
            raise UnsupportedError(f"{what}: groups of 32 must have exponents as scales, and others must not")
        return ActSpec(grid, args.strategy, True, args.group), set()  # type: ignore[arg-type]
    if args.dynamic or args.strategy != "tensor":
        raise UnsupportedError(f"{what} ({show(args.dynamic)}): only static scales per tensor can be carried")
    scale = fp8.number(module, parts, "input_scale", fp8.FLOATS, (1,))
    used = {"input_scale"}
    zero = None
    if "input_zero_point" in parts or not args.symmetric:
        part = take(module, parts, "input_zero_point", ("I8",), parts["input_scale"].shape)
        used.add("input_zero_point")
        if args.symmetric and part.data.load().any():
            raise InputError(f"{part.where}: is not 0, but the config says {args}")
        zero = None if args.symmetric else _unsigned_zero(part, (1,), args.bits)
    return ActSpec(grid, "tensor", False, None, scale, zero), used
