"""The faults of quantized checkpoints: GPTQ, AWQ, compressed-tensors, ModelOpt, FP8, NVFP4, MXFP4 and FP8 caches.

CHECKPOINTS are planted into what presets make of plain models; CARRIED into what quantized sources are carried into, where
nothing may differ, neither a code nor the last bit of a scale. Types are those of quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .changes import blocks, map_data, permute_heads, swap_blocks, unwoven, without, woven
from .packed import (
    AWQ,
    DOWN,
    GATE,
    PLAIN,
    REVERSED,
    UP,
    Array,
    K,
    O,
    Q,
    V,
    add,
    as_e5m2,
    at,
    bits_at,
    both,
    column_groups,
    copied,
    crossed,
    drop,
    exchange,
    file_says,
    from_source,
    group_says,
    halves,
    in_codes,
    neighbours,
    numbers,
    of,
    other_axis,
    rename_tensors,
    repacked,
    reversed_along,
    said,
    split,
    swapped,
)
from .planter import Fault, Folder, Plant, from_folder, in_folder, in_gguf

S, T = "structure", "tensors"


def F(name: str, model: str, kind: str, tier: str, change: Callable[[Folder], None], says: str = "") -> Fault:
    return Fault(name, model, kind, tier, in_folder(change), says)


def G(name: str, model: str, tier: str, plant: Plant, says: str = "") -> Fault:
    return Fault(name, model, "to gguf", tier, plant, says)


CODES, SCALE, ZERO = ".weight_packed", ".weight_scale", ".weight_zero_point"
HEAD = np.zeros((2048, 256), np.uint16)
_GROUP = (slice(40, 41), slice(0, 32))  # of one row


def _plus_one(x: Array) -> Array:
    return np.where(x < 15, x + 1, x)


def _minus_one(x: Array) -> Array:
    return np.where(x > 0, x - 1, x)


def _moved(x: Array) -> Array:
    """One group of codes, one up."""
    x[_GROUP] = _plus_one(x[_GROUP])
    return x


def _one_code(x: Array) -> Array:
    x[17, 33] ^= 1
    return x


def _one_zero(x: Array) -> Array:
    x[0, 5] = (x[0, 5] + 1) & 15
    return x


def _doubled(x: Array) -> Array:
    return x * 2


def _inverted(x: Array) -> Array:
    return 1 / x


def _negated(x: Array) -> Array:
    return -x


def _nothing(x: Array) -> Array:
    return x * 0


def _nan(x: Array) -> Array:
    return x * np.float32(np.nan)


def _ulp(x: Array) -> Array:
    """One scale, one unit in the last place further."""
    x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32).reshape(-1)[9] ^= 1
    return x


def _half(x: Array) -> Array:
    """E4M3 numbers, all normal, divided by two."""
    assert (x >= 0x10).all()
    return x - np.uint8(8)


def _signs(x: Array) -> Array:
    return x ^ np.uint8(0x80)


PACKED = (
    # compressed-tensors, integers
    F("nibbles of a word in reverse", "demo", "w4a16", T, of(repacked(1, REVERSED), UP + CODES)),
    F("nibbles of a word in reverse", "llama", "w4a16 g32", T, of(repacked(1, REVERSED), V + CODES)),
    F("nibbles in AWQ's order", "llama", "w4a16", T, of(repacked(1, AWQ), DOWN + CODES)),
    F("codes without their offset (two's complement)", "demo", "w4a16", T, of(in_codes(lambda x: x ^ 8), O + CODES)),
    F("packed along the wrong axis", "llama", "w4a16", T, of(other_axis(1), O + CODES)),
    F("square matrix transposed", "demo", "w4a16", T, of(in_codes(np.transpose), O + CODES)),
    F("groups in reverse", "demo", "w4a16 g32", T, of(reversed_along(1), DOWN + SCALE)),
    F("groups in reverse", "llama", "w4a16", T, of(reversed_along(1), GATE + SCALE)),
    F("scales of neighbouring rows swapped", "demo", "w4a16", T, of(swapped(10, 11), UP + SCALE)),
    F("scales of neighbouring rows swapped", "llama", "w4a16 g32", T, of(swapped(10, 11), Q + SCALE)),
    F("scales of neighbouring groups swapped", "llama", "w4a16 g32", T, of(swapped((7, 2), (7, 3)), DOWN + SCALE)),
    F("scales shifted by one row", "qwen2", "w4a16", T, of(lambda x: np.roll(x, 1, 0), K + SCALE)),
    F("scales transposed", "llama", "w4a16 g32", T, of(crossed, O + SCALE)),
    F("one scale doubled", "demo", "w4a16", T, of(at((3, 1), _doubled), Q + SCALE)),
    F("one scale doubled", "mistral", "w4a16 g32", T, of(at((3, 1), _doubled), K + SCALE)),
    F("one scale 3% off", "llama", "w4a16", T, of(at((3, 1), lambda x: x * 1.03), UP + SCALE)),
    F("every scale 1% off", "llama", "w4a16 g32", T, of(numbers(lambda x: x * 1.01), UP + SCALE)),
    F("one scale negated", "demo", "w4a16 g32", T, of(at((3, 1), _negated), K + SCALE)),
    F("one scale zero", "llama", "w4a16", T, of(at((3, 1), _nothing), UP + SCALE)),
    F("one scale NaN", "llama", "w4a16", S, of(at((3, 1), _nan), UP + SCALE), "nan"),
    F("one scale infinite", "demo", "w4a16", S, of(at((3, 1), lambda x: np.inf), UP + SCALE)),
    F("codes of one group off by one", "demo", "w4a16", T, of(in_codes(_moved), UP + CODES)),
    F("codes of one group off by one", "qwen2", "w4a16 g32", T, of(in_codes(_moved), O + CODES)),
    F("one bit flipped: lowest of a code", "llama", "w4a16", T, of(in_codes(_one_code), GATE + CODES)),
    F("codes of a row in reverse", "granite", "w4a16", T, of(in_codes(reversed_along(1)), UP + CODES)),
    F("gate and up swapped", "llama", "w4a16", T, exchange(GATE, UP)),
    F("k and v swapped", "demo", "w4a16", T, exchange(K, V)),
    F("two layers' modules swapped", "demo", "w4a16", T, exchange(UP, UP.replace("1", "2"))),
    F("a module of another layer", "llama", "w4a16", T, copied("layers.0.mlp.down_proj", DOWN)),
    F("scales of another layer", "llama", "w4a16 g32", T, copied("layers.0.mlp.down_proj.weight_scale", DOWN + SCALE)),
    F("q/k permutation of GGUF left in", "demo", "w4a16", T,
      of(lambda x: x[woven(len(x), 8)], Q + CODES, Q + SCALE)),
    F("bias dropped", "qwen2", "w4a16", T, of(lambda x: x * 0, f"{Q}.bias")),
    F("shape lost", "llama", "w4a16", S, drop(UP + ".weight_shape"), "weight_shape"),
    F("shape the other way round", "demo", "w4a16", S, of(lambda x: x[::-1], UP + ".weight_shape"), "weight_shape"),
    F("scales lost", "demo", "w4a16", S, drop(UP + SCALE), "weight_scale"),
    F("scales of groups twice as wide", "llama", "w4a16 g32", S, of(lambda x: x[:, ::2], UP + SCALE)),
    F("tensor nobody asked for", "llama", "w4a16", S, add(f"model.{UP}.weight_g_idx", "I32", np.arange(256, dtype=np.int32))),
    F("tensor nobody asked for", "demo", "w4a16", S, add(f"model.{UP}.weight_zero_point", "I32", np.zeros((64, 2), np.int32))),
    F("head nobody asked for", "demo", "w4a16", S, add("lm_head.weight", "BF16", HEAD)),
    F("wrong bits", "llama", "w4a16", S, group_says(num_bits=8)),
    F("wrong group size", "demo", "w4a16", S, group_says(group_size=64)),
    F("wrong group size", "llama", "w4a16 g32", S, group_says(group_size=128)),
    F("symmetric flag lost", "llama", "w4a16", S, group_says(symmetric=False)),
    F("wrong strategy", "llama", "w4a16", S, group_says(strategy="channel", group_size=None)),
    F("act order claimed", "demo", "w4a16", S, group_says(actorder="group")),
    F("wrong format name", "llama", "w4a16", S, both(said(format="int-quantized"), group_says("", format="int-quantized"))),
    F("unknown format name", "demo", "w4a16", S, both(said(format="packed"), group_says("", format="packed"))),
    F("head not ignored", "llama", "w4a16", S, said(ignore=[]), "lm_head"),
    F("quantized module ignored", "demo", "w4a16", S, said(ignore=["lm_head", "re:.*up_proj"])),
    F("targets that match nothing", "demo", "w4a16", S, group_says("", targets=["re:.*nothing"])),
    F("quantization_config lost", "llama", "w4a16", S, lambda f: f.config.pop("quantization_config") and None),
    F("sparsity claimed", "llama", "w4a16", S, said(sparsity_config={"format": "sparse-24-bitmask", "sparsity_structure": "2:4"})),
    Fault("one module of a fused one left plain", "demo", "w4a16", S,
          from_folder(lambda f, d: (from_source(K)(f, d), said(ignore=["lm_head", "re:.*1.self_attn.k_proj"])(f), None)[-1]),
          donor=("demo", "HF")),
    Fault("one module of a fused one left plain", "llama", "w4a16", S,
          from_folder(lambda f, d: (from_source(UP)(f, d), said(ignore=["lm_head", "re:.*1.mlp.up_proj"])(f), None)[-1]),
          donor=("llama", "HF")),
    Fault("file changed after its manifest", "llama", "w4a16", S, in_folder(of(in_codes(_one_code), UP + CODES)),
          "sha256", manifest=("llama", "w4a16")),
)  # fmt: skip

ZEROS = (
    # compressed-tensors, zero points
    F("zero points off by one: up", "demo", "w4a16-asym", T, of(in_codes(_plus_one, 0), UP + ZERO)),
    F("zero points off by one: down", "llama", "w4a16-asym", T, of(in_codes(_minus_one, 0), Q + ZERO)),
    F("one zero point off by one", "llama", "w4a16-asym", T, of(in_codes(lambda x: _one_zero(x.T).T, 0), O + ZERO)),
    F("zero points without their offset", "demo", "w4a16-asym", T, of(in_codes(lambda x: x ^ 8, 0), V + ZERO)),
    F("nibbles of zero points in reverse", "llama", "w4a16-asym", T, of(repacked(0, REVERSED), UP + ZERO)),
    F("zero points packed along the groups", "llama", "w4a16-asym", T,
      of(lambda x: in_codes(lambda c: c.reshape(c.shape[1], -1).T.copy(), 0)(x), UP + ZERO)),
    F("zero points of groups in reverse", "demo", "w4a16-asym", T, of(reversed_along(1), DOWN + ZERO)),
    F("zero points of neighbouring rows swapped", "llama", "w4a16-asym", T, of(in_codes(swapped(4, 5), 0), DOWN + ZERO)),
    F("zero points lost", "llama", "w4a16-asym", S, drop(UP + ZERO), "zero"),
    F("zero points that symmetric weights do not have", "demo", "w4a16-asym", S, group_says(symmetric=True)),
)  # fmt: skip

GPTQ = (
    F("zero points of v1 labelled v2", "demo", "gptq", S, said(checkpoint_format="gptq_v2")),
    F("zero points of v2 labelled v1", "llama", "gptq-v2", S, said(checkpoint_format="gptq")),
    F("zero points of v2 in a v1 file", "llama", "gptq", S, of(in_codes(_plus_one), UP + ".qzeros"), "zero"),
    F("wrapped zero point", "demo", "gptq", S, of(in_codes(lambda x: _one_zero(x) * 0 + 15), UP + ".qzeros")),
    F("one zero point off by one", "llama", "gptq", S, of(in_codes(_one_zero), O + ".qzeros")),
    F("zero points of v2 labelled v1", "demo", "gptq-v2-asym", T, said(checkpoint_format="gptq"), ""),
    F("zero points of v1 in a v2 file", "llama", "gptq-v2-asym", T, of(in_codes(_minus_one), ".qzeros")),
    F("zero points of neighbouring columns swapped", "llama", "gptq-v2-asym", T,
      of(in_codes(swapped((slice(None), 4), (slice(None), 5))), UP + ".qzeros")),
    F("nibbles of a word in reverse", "llama", "gptq", T, of(repacked(0, REVERSED), UP + ".qweight")),
    F("nibbles in AWQ's order", "demo", "gptq", T, of(repacked(0, AWQ), K + ".qweight")),
    F("packed along the wrong axis", "demo", "gptq", T, of(other_axis(0), O + ".qweight")),
    F("packed along the wrong axis", "llama", "gptq-v2", T, of(other_axis(0), O + ".qweight")),
    F("square matrix transposed", "llama", "gptq", T, of(in_codes(np.transpose, 0), O + ".qweight")),
    F("groups in reverse", "llama", "gptq-v2", T, of(reversed_along(0), DOWN + ".scales")),
    F("scales of neighbouring columns swapped", "demo", "gptq", T,
      of(swapped((slice(None), 10), (slice(None), 11)), UP + ".scales")),
    F("scales transposed", "llama", "gptq", T, of(crossed, O + ".scales")),
    F("one scale doubled", "llama", "gptq-v2", T, of(at((1, 3), _doubled), UP + ".scales")),
    F("one scale negated", "llama", "gptq", T, of(at((1, 3), _negated), UP + ".scales")),
    F("one scale NaN", "demo", "gptq", S, of(at((1, 3), _nan), UP + ".scales"), "nan"),
    F("codes of one group off by one", "demo", "gptq", T,
      of(in_codes(lambda x: _moved(x.T).T, 0), UP + ".qweight")),
    F("one bit flipped: lowest of a code", "llama", "gptq", T, of(in_codes(_one_code, 0), UP + ".qweight")),
    F("g_idx in reverse", "demo", "gptq", S, of(reversed_along(0), DOWN + ".g_idx")),
    F("g_idx out of range", "llama", "gptq", S, of(bits_at(5, lambda x: x + 40), DOWN + ".g_idx"), "g_idx"),
    F("act order claimed", "demo", "gptq", S, said(desc_act=True)),
    F("wrong bits", "llama", "gptq", S, said(bits=8)),
    F("wrong group size", "demo", "gptq", S, said(group_size=64)),
    F("symmetric flag lost", "llama", "gptq", S, said(sym=False)),
    F("head quantized, it says", "llama", "gptq", S, said(lm_head=True)),
    F("the two config files differ", "demo", "gptq", S, file_says("quantize_config.json", "bits", value=8)),
    F("labelled AWQ", "llama", "gptq", S, said(quant_method="awq", version="gemm", zero_point=True)),
    F("k and v swapped", "llama", "gptq", T, exchange(K, V)),
    F("one module of another layer", "demo", "gptq-v2", T, copied("layers.0.self_attn.v_proj", V)),
    F("zero points lost", "llama", "gptq", S, drop(UP + ".qzeros"), "qzeros"),
)  # fmt: skip

AWQ_FAULTS = (
    F("nibbles as they come", "demo", "awq", T, of(repacked(1, PLAIN, AWQ), ".qweight", ".qzeros")),
    F("nibbles as they come", "llama", "awq", T, of(repacked(1, PLAIN, AWQ), UP + ".qweight")),
    F("nibbles as they come: zero points", "llama", "awq", T, of(repacked(1, PLAIN, AWQ), UP + ".qzeros")),
    F("nibbles in the inverse order", "demo", "awq", T, of(repacked(1, (0, 4, 1, 5, 2, 6, 3, 7), AWQ), Q + ".qweight")),
    F("packed along the inputs as GPTQ", "llama", "awq", T,
      of(lambda x: in_codes(np.transpose, 1, AWQ)(x), O + ".qweight")),
    F("zero points off by one: as GPTQ v1 stores them", "demo", "awq", T, of(in_codes(_minus_one, 1, AWQ), ".qzeros")),
    F("zero points off by one: as GPTQ v1 stores them", "llama", "awq", T, of(in_codes(_minus_one, 1, AWQ), K + ".qzeros")),
    F("one zero point off by one", "llama", "awq", T, of(in_codes(_one_zero, 1, AWQ), DOWN + ".qzeros")),
    F("groups in reverse", "llama", "awq", T, of(reversed_along(0), DOWN + ".scales")),
    F("scales of neighbouring columns swapped", "llama", "awq", T,
      of(swapped((slice(None), 10), (slice(None), 11)), UP + ".scales")),
    F("one scale halved", "demo", "awq", T, of(at((1, 3), lambda x: x / 2), UP + ".scales")),
    F("one bit flipped: lowest of a code", "demo", "awq", T, of(in_codes(_one_code, 1, AWQ), GATE + ".qweight")),
    F("zero_point flag lost", "llama", "awq", S, said(zero_point=False)),
    F("wrong version", "demo", "awq", S, said(version="gemv")),
    F("wrong bits", "llama", "awq", S, said(bits=8)),
    F("wrong group size", "demo", "awq", S, said(group_size=32)),
    F("quantized module not converted, it says", "llama", "awq", S, said(modules_to_not_convert=["up_proj"])),
    F("labelled GPTQ", "demo", "awq", S, said(quant_method="gptq", sym=False, desc_act=False)),
)  # fmt: skip

BYTES = (
    # int8 and FP8
    F("scales of neighbouring rows swapped", "demo", "w8a8", T, of(swapped(10, 11), UP + SCALE)),
    F("scales shifted by one row", "llama", "w8a8", T, of(lambda x: np.roll(x, 1, 0), K + SCALE)),
    F("codes stored unsigned", "llama", "w8a8", T, of(lambda x: (x.view(np.uint8) ^ np.uint8(0x80)).view(np.int8), O + ".weight")),
    F("codes of one row off by one", "demo", "w8a8", T, of(bits_at(5, lambda x: np.minimum(x, 126) + 1), UP + ".weight")),
    F("one bit flipped: lowest of a code", "llama", "w8a8", T, of(bits_at((5, 5), lambda x: x ^ 1), GATE + ".weight")),
    F("one scale 1% off", "demo", "w8a8", T, of(at(7, lambda x: x * 1.01), Q + SCALE)),
    F("square matrix transposed", "llama", "w8a8", T, of(np.transpose, f"{O}.weight")),
    F("activations no longer quantized", "llama", "w8a8", S, group_says("", input_activations=None)),
    F("static activations without scales", "demo", "w8a8", S, group_says("input_activations", dynamic=False, strategy="tensor")),
    F("wrong format name", "llama", "w8a8", S, both(said(format="pack-quantized"), group_says("", format="pack-quantized"))),
    F("weights are floats, it says", "demo", "w8a8", S, group_says(type="float")),
    F("head not ignored", "llama", "w8a8", S, said(ignore=[]), "lm_head"),
    F("E5M2 bits in place of E4M3", "demo", "fp8", T, of(as_e5m2, f"{UP}.weight")),
    F("E5M2 bits in place of E4M3", "llama", "fp8", T, of(as_e5m2, f"{Q}.weight")),
    F("E5M2 in name and bits", "llama", "fp8", S, lambda f: _e5m2(f, f"model.{Q}.weight")),
    F("scales inverted", "demo", "fp8", T, of(_inverted, UP + SCALE)),
    F("scales inverted", "mistral", "fp8", T, of(_inverted, SCALE)),
    F("scales of neighbouring rows swapped", "llama", "fp8", T, of(swapped(10, 11), V + SCALE)),
    F("one scale doubled", "demo", "fp8", T, of(at(3, _doubled), UP + SCALE)),
    F("one sign flipped", "llama", "fp8", T, of(bits_at((5, 5), lambda x: x ^ 0x80), UP + ".weight")),
    F("signs flipped", "llama", "fp8", T, of(_signs, f"{UP}.weight")),
    F("NaN among the codes", "demo", "fp8", S, of(bits_at((5, 5), lambda x: 0x7F), f"{UP}.weight"), "NaN"),
    F("one bit flipped: lowest of a code", "llama", "fp8", T, of(bits_at((5, 5), lambda x: x ^ 1), f"{UP}.weight")),
    F("one scale zero", "llama", "fp8", T, of(at(3, _nothing), UP + SCALE)),
    F("scales lost", "llama", "fp8", S, drop(UP + SCALE), "weight_scale"),
    F("activations dynamic, it says", "demo", "fp8-static", S, group_says("input_activations", dynamic=True, strategy="token")),
    F("input scale lost", "llama", "fp8-static", S, drop(UP + ".input_scale"), "input_scale"),
    F("input scale zero", "demo", "fp8-static", S, of(_nothing, UP + ".input_scale")),
    F("input scale NaN", "llama", "fp8-static", S, of(_nan, UP + ".input_scale")),
    F("input scale negative", "llama", "fp8-static", S, of(_negated, UP + ".input_scale")),
    F("weight scale of another module", "llama", "fp8-static", T, copied(DOWN + SCALE, O + SCALE)),
    F("scales of blocks transposed", "demo", "fp8-block", T, of(np.transpose, O + SCALE)),
    F("scales of neighbouring blocks swapped", "llama", "fp8-block", T, of(swapped((0, 0), (0, 1)), UP + SCALE)),
    F("blocks of another shape, it says", "demo", "fp8-block", S, group_says(block_structure=[64, 64])),
    F("scale_inv used as what it is called", "demo", "deepseek-fp8", T, of(_inverted, UP + ".weight_scale_inv")),
    F("scale_inv used as what it is called", "llama", "deepseek-fp8", T, of(_inverted, ".weight_scale_inv")),
    F("scales under the plain name", "llama", "deepseek-fp8", S, rename_tensors("weight_scale_inv", "weight_scale")),
    F("activation_scheme static", "demo", "deepseek-fp8", S, said(activation_scheme="static")),
    F("wrong block size", "llama", "deepseek-fp8", S, said(weight_block_size=[64, 64])),
    F("block size lost", "demo", "deepseek-fp8", S, said(weight_block_size=None)),
    F("scales inverted", "demo", "modelopt-fp8", T, of(_inverted, DOWN + SCALE)),
    F("input scale lost", "llama", "modelopt-fp8", S, drop(UP + ".input_scale")),
    F("scales of neighbouring rows swapped", "llama", "modelopt-fp8-pc", T, of(swapped(3, 4), UP + SCALE)),
    F("the two config files differ", "demo", "modelopt-fp8", S,
      file_says("hf_quant_config.json", "quantization", "quant_algo", value="NVFP4")),
    F("rows of a byte swapped", "demo", "modelopt-int4", T, of(halves, f"{UP}.weight")),
    F("scales of neighbouring groups swapped", "llama", "modelopt-int4", T, of(swapped((7, 0), (7, 1)), DOWN + SCALE)),
)  # fmt: skip


def _e5m2(folder: Folder, name: str) -> None:
    folder.tensors[name] = ("F8_E5M2", as_e5m2(folder.tensors[name][1]))


_KS, _VS = "layers.1.self_attn.k_scale", "layers.1.self_attn.v_scale"

CACHE = (
    F("scale of the keys of one layer lost", "demo", "fp8 kv", S, drop(_KS), "k_scale"),
    F("scales of the values lost", "llama", "fp8 kv", S, drop(".v_scale"), "v_scale"),
    F("cache scale NaN", "demo", "fp8 kv", S, of(_nan, _VS)),
    F("cache scale zero", "llama", "fp8 kv", S, of(_nothing, _KS)),
    F("cache scale negative", "llama", "fp8 kv", S, of(_negated, _KS)),
    F("cache scales nobody reads", "demo", "fp8 kv", S, said(kv_cache_scheme=None)),
    F("cache scales that are missing", "llama", "fp8", S, lambda f: _scheme(f)),
    F("cache of 4 bits, it says", "demo", "fp8 kv", S, file_says("config.json", "quantization_config", "kv_cache_scheme", "num_bits", value=4)),
)  # fmt: skip


def _scheme(folder: Folder) -> None:
    folder.config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip


OVERALL, INPUTS = ".weight_global_scale", ".input_global_scale"

FP4 = (
    F("global scale inverted", "demo", "nvfp4a16", T, of(_inverted, DOWN + OVERALL)),
    F("global scale inverted", "llama", "nvfp4a16", T, of(_inverted, OVERALL)),
    F("global scale doubled", "llama", "nvfp4a16", T, of(_doubled, DOWN + OVERALL)),
    F("global scale an eighth off", "demo", "nvfp4a16", T, of(lambda x: x * np.float32(1.125), O + OVERALL)),
    F("global scale zero", "llama", "nvfp4a16", S, of(_nothing, UP + OVERALL)),
    F("global scales untied between q, k, v", "demo", "nvfp4a16", S, both(of(lambda x: x / 2, K + OVERALL), of(_half, K + SCALE))),
    F("global scales untied between gate and up", "llama", "nvfp4", S, both(of(lambda x: x / 2, UP + OVERALL), of(_half, UP + SCALE))),
    F("input scales untied between q, k, v", "llama", "nvfp4", S, of(lambda x: x / 2, V + INPUTS)),
    F("input scale lost", "demo", "nvfp4", S, drop(UP + INPUTS), "input_global_scale"),
    F("input scale zero", "llama", "nvfp4", S, of(_nothing, UP + INPUTS)),
    F("halves of bytes swapped", "demo", "nvfp4a16", T, of(halves, UP + CODES)),
    F("halves of bytes swapped", "llama", "nvfp4", T, of(halves, Q + CODES)),
    F("codes j and j + 8 in a byte, as llama.cpp has them", "llama", "nvfp4a16", T, of(split(16), UP + CODES)),
    F("scales of neighbouring groups swapped", "demo", "nvfp4a16", T, of(swapped((7, 2), (7, 3)), DOWN + SCALE)),
    F("scales of rows shifted by one", "llama", "nvfp4a16", T, of(lambda x: np.roll(x, 1, 0), UP + SCALE)),
    F("scales halved", "llama", "nvfp4a16", T, of(_half, UP + SCALE)),
    F("scales transposed", "llama", "nvfp4a16", T, of(crossed, O + SCALE)),
    F("one scale negated", "demo", "nvfp4a16", T, of(bits_at((3, 3), lambda x: x ^ 0x80), UP + SCALE)),
    F("one bit flipped: lowest of four codes", "llama", "nvfp4a16", T, of(bits_at((5, slice(5, 9)), lambda x: x ^ 1), UP + CODES)),
    F("signs flipped", "demo", "nvfp4a16", T, of(lambda x: x ^ np.uint8(0x88), UP + CODES)),
    F("labelled MXFP4", "llama", "nvfp4a16", S, both(said(format="mxfp4-pack-quantized"), group_says("", format="mxfp4-pack-quantized"))),
    F("wrong group size", "demo", "nvfp4a16", S, group_says(group_size=32)),
    F("activations no longer quantized", "llama", "nvfp4", S, group_says("", input_activations=None)),
    F("global scale inverted", "demo", "modelopt-nvfp4", T, of(_inverted, DOWN + ".weight_scale_2")),
    F("global scale inverted", "llama", "modelopt-nvfp4", T, of(_inverted, ".weight_scale_2")),
    F("global scales untied between q, k, v", "llama", "modelopt-nvfp4", S,
      both(of(_doubled, K + ".weight_scale_2"), lambda f: _halved(f, f"model.{K}.weight_scale"))),
    F("input scale lost", "demo", "modelopt-nvfp4", S, drop(UP + ".input_scale")),
    F("halves of bytes swapped", "llama", "modelopt-nvfp4", T, of(halves, f"{UP}.weight")),
    F("exponents off by one", "demo", "mxfp4", T, of(lambda x: x + np.uint8(1), UP + SCALE)),
    F("exponents off by one", "llama", "mxfp4", T, of(lambda x: x - np.uint8(1), SCALE)),
    F("one exponent off by one", "llama", "mxfp4", T, of(bits_at((3, 3), lambda x: x + 1), UP + SCALE)),
    F("exponent that is NaN", "demo", "mxfp4", S, of(bits_at((3, 3), lambda x: 255), UP + SCALE)),
    F("halves of bytes swapped", "demo", "mxfp4", T, of(halves, UP + CODES)),
    F("codes j and j + 16 in a byte, as llama.cpp has them", "llama", "mxfp4", T, of(split(32), UP + CODES)),
    F("scales of neighbouring groups swapped", "llama", "mxfp4", T, of(swapped((7, 2), (8, 2)), DOWN + SCALE)),
    F("one bit flipped: lowest of a code", "demo", "mxfp4", T, of(bits_at((5, 5), lambda x: x ^ 1), UP + CODES)),
)  # fmt: skip


GATE_UP, DOWN_OF_ALL = "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"
BLOCKS, EXPONENTS = "_blocks", "_scales"


def _one_after_the_other(x: Array) -> Array:
    """Rows of gate and up that take turns, all of gate before those of up."""
    return np.concatenate([x[:, ::2], x[:, 1::2]], 1)


def _up_first(x: Array) -> Array:
    return np.stack([x[:, 1::2], x[:, ::2]], 2).reshape(x.shape)


def _first_expert_again(x: Array) -> Array:
    x[1] = x[0]
    return x


def _unpacked(folder: Folder) -> None:
    """The two tensors of a stack under a name of their own, as other formats have them."""
    for end, new in ((BLOCKS, ".weight"), (EXPONENTS, ".weight_scale")):
        rename_tensors(DOWN_OF_ALL + end, DOWN_OF_ALL + new)(folder)


#: gpt-oss in its own layout.
STACKS = (
    F("halves of bytes swapped", "gpt_oss", "mxfp4", T, of(halves, GATE_UP + BLOCKS)),
    F("codes j and j + 16 in a byte, as llama.cpp has them", "gpt_oss", "mxfp4", T, of(split(32), DOWN_OF_ALL + BLOCKS)),
    F("gate and up one after the other", "gpt_oss", "mxfp4", T,
      of(_one_after_the_other, GATE_UP + BLOCKS, GATE_UP + EXPONENTS)),
    F("exponents of gate and up one after the other", "gpt_oss", "mxfp4", T, of(_one_after_the_other, GATE_UP + EXPONENTS)),
    F("up before gate", "gpt_oss", "mxfp4", T, of(_up_first, GATE_UP + BLOCKS, GATE_UP + EXPONENTS)),
    F("two experts swapped", "gpt_oss", "mxfp4", T, of(swapped(1, 2), DOWN_OF_ALL + BLOCKS, DOWN_OF_ALL + EXPONENTS)),
    F("exponents of two experts swapped", "gpt_oss", "mxfp4", T, of(swapped(0, 3), DOWN_OF_ALL + EXPONENTS)),
    F("exponents off by one", "gpt_oss", "mxfp4", T, of(lambda x: x + np.uint8(1), GATE_UP + EXPONENTS)),
    F("one exponent off by one", "gpt_oss", "mxfp4", T, of(bits_at((1, 3, 2), lambda x: x + 1), DOWN_OF_ALL + EXPONENTS)),
    F("exponent that is NaN", "gpt_oss", "mxfp4", S, of(bits_at((1, 3, 2), lambda x: 255), DOWN_OF_ALL + EXPONENTS)),
    F("one bit flipped: lowest of a code", "gpt_oss", "mxfp4", T, of(bits_at((2, 7, 1, 4), lambda x: x ^ 1), GATE_UP + BLOCKS)),
    F("signs flipped", "gpt_oss", "mxfp4", T, of(lambda x: x ^ np.uint8(0x88), DOWN_OF_ALL + BLOCKS)),
    F("biases of gate and up one after the other", "gpt_oss", "mxfp4", T, of(_one_after_the_other, GATE_UP + "_bias")),
    F("experts on the list of what stays plain", "gpt_oss", "mxfp4", S,
      said(modules_to_not_convert=["model.layers.*.mlp.experts", "lm_head"])),
    F("blocks flattened", "gpt_oss", "mxfp4", S, of(lambda x: x.reshape(*x.shape[:2], -1), GATE_UP + BLOCKS)),
    F("names of another format", "gpt_oss", "mxfp4", S, _unpacked),
    F("exponents lost", "gpt_oss", "mxfp4", S, drop(DOWN_OF_ALL + EXPONENTS)),
)  # fmt: skip


def _reordered(folder: Folder) -> None:
    folder.tensors = dict(reversed(folder.tensors.items()))


def _halved(folder: Folder, name: str) -> None:
    dtype, x = folder.tensors[name]
    folder.tensors[name] = (dtype, _half(x))


CHECKPOINTS = PACKED + ZEROS + GPTQ + AWQ_FAULTS + BYTES + CACHE + FP4 + STACKS


# --- carried ---------------------------------------------------------------------------------------------

Q40, Q41, NV, MX = 18, 20, 36, 17  # bytes of a block


def _one_byte(place: int, mask: int) -> Callable[[Array], None]:
    def change(x: Array) -> None:
        x[50, place] ^= mask

    return change


def _scale_of_next(x: Array) -> None:
    assert not np.array_equal(x[20, :2], x[30, :2])
    x[20, :2] = x[30, :2]


def _no_smoothing(folder: Folder, donor: Folder) -> None:
    """The rows of up without the input scale of down."""
    by = donor.tensors[f"model.{DOWN}.pre_quant_scale"][1].astype(np.float32).reshape(-1, 1)
    of(numbers(lambda x: x / by), UP + SCALE)(folder)


CARRIED = (
    F("codes of one group off by one", "demo-gptq", "to vllm", T, of(in_codes(_moved), UP + CODES)),
    F("one bit flipped: lowest of a code", "llama-gptq", "to vllm", T, of(in_codes(_one_code), UP + CODES)),
    F("one scale one ulp off", "llama-gptq", "to vllm", T, of(_ulp, UP + SCALE)),
    F("nibbles of a word in reverse", "llama-gptq", "to vllm", T, of(repacked(1, REVERSED), UP + CODES)),
    F("scales of neighbouring rows swapped", "llama-gptq", "to vllm", T, of(swapped(10, 11), UP + SCALE)),
    F("groups in reverse", "demo-gptq", "to vllm", T, of(reversed_along(1), DOWN + SCALE)),
    F("a module of another layer", "demo-gptq", "to vllm", T, copied("layers.0.mlp.down_proj", DOWN)),
    F("float16 scales in a bfloat16 model", "llama-gptq", "to vllm", S, file_says("config.json", "dtype", value="bfloat16")),
    F("scales rounded to bfloat16", "llama-gptq", "to vllm", T, lambda f: _rounded_scales(f)),
    F("nibbles as they come", "llama-gptq", "to awq", T, of(repacked(1, PLAIN, AWQ), UP + ".qweight")),
    F("zero points off by one: as GPTQ v1 stores them", "demo-gptq", "to awq", S, of(in_codes(_minus_one, 1, AWQ), ".qzeros")),
    F("zero points of v2 labelled v1", "llama-gptq", "to gptq_v2", S, said(checkpoint_format="gptq")),
    F("zero points of v2 labelled v1", "llama-awq", "to gptq_v2", T, said(checkpoint_format="gptq")),
    F("zero points of v1 labelled v2", "demo-gptq", "to gptq", S, said(checkpoint_format="gptq_v2")),
    F("zero points off by one", "llama-awq", "to vllm", T, of(in_codes(_plus_one, 0), UP + ZERO)),
    F("one zero point off by one", "demo-awq", "to vllm", T, of(in_codes(_one_zero, 0), UP + ZERO)),
    F("one code one off", "llama-awq", "to vllm", T, of(in_codes(_one_code), UP + CODES)),
    F("one scale one ulp off", "llama-awq", "to gptq_v2", T, of(_ulp, UP + ".scales")),
    F("codes of one row off by one", "llama-w8a8", "to vllm", T, of(bits_at(5, lambda x: np.minimum(x, 126) + 1), UP + ".weight")),
    F("activations no longer quantized", "llama-w8a8", "to vllm", S, group_says("", input_activations=None)),
    F("activations per tensor, it says", "llama-w8a8", "to vllm", T, group_says("input_activations", strategy="tensor")),
    F("g_idx ignored", "llama-act-order", "to gptq", T, both(column_groups(np.sort), said(desc_act=False))),
    F("g_idx in order although act order is claimed", "llama-act-order", "to gptq", S, column_groups(np.sort)),
    F("g_idx applied backwards", "llama-act-order", "to gptq", T,
      column_groups(lambda x: (np.argsort(np.argsort(-x, kind="stable")) // 32).astype(np.int32))),
    Fault("rows of gate and up left where columns of down moved", "llama-act-order", "to vllm", T,
          from_folder(from_source(GATE, UP)), donor=("llama-gptq", "to vllm")),
    Fault("rows of up left where those of gate moved", "llama-act-order", "to vllm", T,
          from_folder(from_source(UP)), donor=("llama-gptq", "to vllm")),
    F("columns of down left where rows of gate and up moved", "llama-act-order", "to vllm", T,
      of(in_codes(lambda x: x[:, np.random.default_rng(2).permutation(x.shape[1])]), DOWN + CODES)),
    Fault("input scale not folded", "llama-smoothed", "to vllm", T, from_folder(_no_smoothing),
          donor=("llama-smoothed", "HF")),
    F("global scale inverted", "llama-nvfp4", "to modelopt", T, of(_inverted, ".weight_scale_2")),
    F("global scale used as a multiplier", "demo-nvfp4", "to modelopt", T, of(_inverted, DOWN + ".weight_scale_2")),
    F("global scale 1e-5 off", "llama-nvfp4", "to modelopt", T, of(lambda x: x * np.float32(1.00001), DOWN + ".weight_scale_2")),
    F("halves of bytes swapped", "llama-nvfp4", "to modelopt", T, of(halves, f"{UP}.weight")),
    F("cache scales of keys and values swapped", "llama-fp8", "to modelopt", T,
      both(rename_tensors("k_proj.k_scale", "x"), rename_tensors("v_proj.v_scale", "k_proj.k_scale"),
           rename_tensors("self_attn.x", "self_attn.v_proj.v_scale"))),
    F("cache scales of keys and values swapped", "llama-fp8", "to vllm", T, exchange("self_attn.k_scale", "self_attn.v_scale")),
    F("cache scales of another layer", "llama-fp8", "to modelopt", T, copied("layers.0.self_attn.k_proj.k_scale", "layers.1.self_attn.k_proj.k_scale")),
    F("cache no longer quantized", "llama-fp8", "to vllm", T, both(drop(".k_scale", ".v_scale"), said(kv_cache_scheme=None))),
    F("activations no longer quantized", "llama-fp8", "to vllm", T, group_says("", input_activations=None)),
    F("one scale one ulp off", "llama-fp8", "to modelopt", T, of(_ulp, UP + SCALE)),
    F("one bit flipped: lowest of a code", "llama-fp8", "to modelopt", T, of(bits_at((5, 5), lambda x: x ^ 1), f"{UP}.weight")),
    F("scales inverted", "llama-fp8-block", "to vllm", T, of(_inverted, UP + SCALE)),
    F("scales of blocks transposed", "llama-fp8-block", "to vllm", T, of(np.transpose, O + SCALE)),
    F("input scale one ulp off", "llama-static", "to modelopt", T, of(lambda x: x * np.float32(1 + 2**-20), DOWN + ".input_scale")),
    F("input scale of another module", "llama-static", "to modelopt", T, copied(O + ".input_scale", DOWN + ".input_scale")),
    F("exponents off by one", "llama-mxfp4", "to vllm", T, of(lambda x: x + np.uint8(1), UP + SCALE)),
    F("one exponent off by one", "gpt_oss-mxfp4", "to vllm", T, of(bits_at((1, 3, 2), lambda x: x + 1), DOWN_OF_ALL + EXPONENTS)),
    F("one bit flipped: lowest of a code", "gpt_oss-mxfp4", "to vllm", T, of(bits_at((2, 7, 1, 4), lambda x: x ^ 1), GATE_UP + BLOCKS)),
    F("up before gate", "gpt_oss-mxfp4", "to vllm", T, of(_up_first, GATE_UP + BLOCKS, GATE_UP + EXPONENTS)),
    F("an expert twice", "gpt_oss-mxfp4", "to vllm", T, of(_first_expert_again, DOWN_OF_ALL + BLOCKS, DOWN_OF_ALL + EXPONENTS)),
    # in a GGUF file
    G("q/k permutation missing", "llama-gptq", T, in_gguf(permute_heads(unwoven))),
    G("q/k permutation doubled", "demo-gptq", T, in_gguf(permute_heads(woven))),
    G("codes of neighbours in a byte, as other formats have them", "llama-gptq", T,
      in_gguf(map_data(neighbours(2, Q40), "blk.1.ffn_up.weight"))),
    G("halves of bytes swapped", "demo-gptq", T, in_gguf(map_data(lambda x: _codes_only(x, Q40, 2), "blk.1.ffn_up.weight"))),
    G("one bit flipped: lowest of a code", "llama-gptq", T, in_gguf(blocks("blk.1.ffn_up.weight", Q40, _one_byte(9, 1)))),
    G("one scale one ulp off", "demo-gptq", T, in_gguf(blocks("blk.1.ffn_up.weight", Q40, _one_byte(0, 1)))),
    G("scale of the neighbouring block", "llama-gptq", T, in_gguf(blocks("blk.1.ffn_up.weight", Q40, _scale_of_next))),
    G("two blocks swapped", "demo-gptq", T, in_gguf(swap_blocks("blk.1.ffn_down.weight", Q40, 3, 40))),
    G("minimum with the other sign", "demo-awq", T, in_gguf(blocks("blk.1.ffn_up.weight", Q41, _one_byte(3, 0x80)))),
    G("minimum of a zero point one off", "demo-awq", T, in_gguf(blocks("blk.1.ffn_up.weight", Q41, lambda x: _more(x)))),
    G("one code one off", "demo-awq", T, in_gguf(blocks("blk.1.ffn_up.weight", Q41, _one_byte(9, 1)))),
    G("codes of neighbours in a byte, as other formats have them", "llama-mxfp4", T,
      in_gguf(map_data(neighbours(1, MX), "blk.1.ffn_up.weight"))),
    G("exponents off by one", "llama-mxfp4", T, in_gguf(blocks("blk.1.ffn_up.weight", MX, lambda x: np.add.at(x, (slice(None), 0), np.uint8(1))))),
    G("global scale inverted", "llama-nvfp4", T, in_gguf(map_data(_inverted, "blk.1.ffn_up.scale"))),
    G("global scale lost", "demo-nvfp4", T, in_gguf(without("blk.1.ffn_up.scale"))),
    G("one scale one step off", "llama-nvfp4", T, in_gguf(blocks("blk.1.ffn_up.weight", NV, _one_byte(2, 1)))),
)  # fmt: skip


def _rounded_scales(folder: Folder) -> None:
    """F16 scales, rounded to bf16 (its upper 16 bits) and stored as F16 again."""
    for name, (dtype, x) in folder.tensors.items():
        if name.endswith("weight_scale") and dtype == "F16":
            bits = x.astype(np.float32).view(np.uint32) + np.uint32(0x8000) & np.uint32(0xFFFF0000)
            folder.tensors[name] = (dtype, bits.view(np.float32).astype(np.float16))


def _codes_only(x: Array, size: int, scales: int) -> Array:
    b = x.reshape(-1, size).copy()
    b[:, scales:] = halves(b[:, scales:])
    return b.reshape(x.shape)


def _more(x: Array) -> None:
    """The minimum of one block, one step lower."""
    d, m = x[50, :2].copy().view(np.float16), x[50, 2:4].view(np.float16)
    m -= d


#: What only a manifest shows in an artifact of a plain model: nobody knows what ranges its makers saw.
HIDDEN = (
    Fault("cache scales of keys and values swapped", "demo", "fp8 kv", S,
          in_folder(exchange("self_attn.k_scale", "self_attn.v_scale")), "sha256", manifest=("demo", "fp8 kv")),
    Fault("activations no longer quantized", "demo", "fp8", S, in_folder(group_says("", input_activations=None)), "sha256",
          manifest=("demo", "fp8")),
    Fault("input scale doubled", "llama", "fp8-static", S, in_folder(of(_doubled, UP + ".input_scale")), "sha256",
          manifest=("llama", "fp8-static")),
    Fault("input scale inverted", "llama", "nvfp4", S, in_folder(of(_inverted, INPUTS)), "sha256",
          manifest=("llama", "nvfp4")),
)  # fmt: skip

#: Changes that mean the same: no tier may complain.
TWINS = (
    F("tensors in another order", "demo", "w4a16", "", _reordered),
    F("the head ignored by a pattern", "llama", "w4a16", "", said(ignore=["re:.*lm_head"])),
    F("modules named one by one", "llama", "w4a16", "", group_says("", targets=["re:.*proj$"])),
    F("v1 made v2, and said so", "llama", "gptq", "", both(of(in_codes(_plus_one), ".qzeros"), said(checkpoint_format="gptq_v2"))),
    F("group indices in order left out", "demo", "gptq", "", drop(".g_idx")),
    F("bits by their other name", "demo", "awq", "", lambda f: f.config["quantization_config"].update(w_bit=4, q_group_size=128)),
    F("global scale and scales both halved", "llama", "nvfp4a16", "", both(of(lambda x: x / 2, DOWN + OVERALL), of(_half, DOWN + SCALE))),
    F("cache scales under ModelOpt's names", "llama", "fp8 kv", "",
      both(rename_tensors("self_attn.k_scale", "self_attn.k_proj.k_scale"),
           rename_tensors("self_attn.v_scale", "self_attn.v_proj.v_scale"))),
    F("a status that published files have beside codes", "demo", "w4a16", "", said(quantization_status="frozen")),
    F("keys of config.json that nothing reads", "llama", "fp8", "", said(global_compression_ratio=1.5)),
)  # fmt: skip
