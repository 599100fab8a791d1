"""Quark and BitNet checkpoints: Quark's own packing and values, transformers' own layers, bad input.

The fingerprints of Quark's packed words and E2M1 values come from amd-quark 0.13, quark/torch/utils/pack.py `Pack_4_bits`
and `Pack_fp4`, for the same `noise`. What int8 and FP8 mean is self-checked: codes times scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.integrations import bitnet as reference

from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats.quark import Quark
from lconvert.formats.scheme import Checkpoint, Weight, find
from lconvert.ir import E2M1, E4M3, ActSpec, KVSpec, QTensor, as_f32, int_grid
from lconvert.kernels.qtensor import dequantize
from tests.int_checkpoints import fingerprint, noise
from tests.int_checkpoints import parts as parts_of

MODULE = "model.layers.0.self_attn.o_proj"
ROWS, COLS = 32, 128
Tensors = dict[str, tuple[str, NDArray[Any]]]


def scheme(**config: Any) -> Any:
    return find(Checkpoint("config.json", config, Path("nowhere")))


def quantized(found: Weight | None, tensors: Tensors) -> QTensor:
    """The numbers, all of which are read, of a module all of whose tensors are used."""
    assert found is not None
    assert isinstance(found.data, QTensor)
    assert found.used == tensors.keys()
    whole = dequantize(found.data)
    if found.activation is not None and found.activation.scale is not None:
        found.activation.scale.load()
    for start, stop in ((0, 3), (7, 9), (5, 5), (31, 32)):
        assert found.data.codes.read(start, stop).tobytes() == found.data.codes.load()[start:stop].tobytes()
        if found.data.block[0] in (1, -1):
            assert np.array_equal(dequantize(found.data, start, stop), whole[start:stop])
    return found.data


# --- BitNet ----------------------------------------------------------------------------------------------

TERNARY = (noise(ROWS * COLS, 1) % 3).astype(np.int8).reshape(ROWS, COLS) - np.int8(1)
TERNARY_SCALE = np.array([0x3FB3], np.uint16)  # BF16 1.3984375


def packed() -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = reference.pack_weights(torch.from_numpy(TERNARY.copy())).numpy()
    return found


def bitnet(
    tensors: Tensors | None = None, shape: tuple[int, ...] = (ROWS, COLS), **config: Any
) -> Weight | None:
    stored = (
        {"weight": ("U8", packed()), "weight_scale": ("BF16", TERNARY_SCALE)} if tensors is None else tensors
    )
    found: Weight | None = scheme(quant_method="bitnet", **config).weight(MODULE, parts_of(stored), shape)
    if found is not None:
        quantized(found, stored)
    return found


def layer(kind: type[Any], **more: Any) -> Any:
    return kind(COLS, ROWS, bias=False, dtype=torch.float32, **more)


def answers(module: Any) -> NDArray[np.float32]:
    """The matrix that a layer applies: its answers to unit vectors, whose quantization to int8 is exact."""
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        found: NDArray[np.float32] = module(torch.eye(COLS) * 127).T.numpy() / np.float32(127)
    return found


def test_bitlinear_divides_by_its_scale() -> None:
    module = layer(reference.BitLinear)
    module.weight.copy_(torch.from_numpy(packed()))
    module.weight_scale.fill_(float(as_f32(TERNARY_SCALE, "BF16")[0]))
    found = bitnet()
    assert found is not None and isinstance(found.data, QTensor)
    assert found.data.divisor
    assert np.array_equal(found.data.codes.load(), TERNARY)
    np.testing.assert_array_max_ulp(
        dequantize(found.data), answers(module), maxulp=1
    )  # (127 x / (1 s)) / 127


def test_autobitlinear_multiplies_by_its_scale() -> None:
    module = layer(reference.AutoBitLinear, online_quant=False)
    with torch.compiler.set_stance("force_eager"):
        unpacked = reference.unpack_weights(torch.from_numpy(packed()), torch.float32)
    assert np.array_equal(unpacked.numpy(), TERNARY)
    module.weight.data.copy_(unpacked)
    module.weight_scale.fill_(float(as_f32(TERNARY_SCALE, "BF16")[0]))
    found = bitnet(linear_class="autobitlinear", quantization_mode="offline")
    assert found is not None and isinstance(found.data, QTensor)
    assert not found.data.divisor
    np.testing.assert_array_max_ulp(dequantize(found.data), answers(module), maxulp=1)
    assert found.activation == ActSpec(int_grid(8, True), "token", dynamic=True)


def test_bitnet_leaves_plain_modules_alone() -> None:
    assert (
        bitnet({"weight": ("BF16", np.zeros((8, 4), np.uint16))}, (8, 4), modules_to_not_convert=["lm_head"])
        is None
    )


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (
            {"quantization_mode": "online"},
            UnsupportedError,
            "quantization_mode 'online': the weights are dense",
        ),
        ({"use_rms_norm": True}, UnsupportedError, "use_rms_norm puts a norm in front of every matrix"),
        (
            {"linear_class": "linear"},
            InputError,
            "linear_class 'linear' must be one of bitlinear, autobitlinear",
        ),
        ({"group_size": 32}, UnsupportedError, "the key 'group_size' = 32 is unknown"),
    ],
)
def test_bitnet_configurations_that_cannot_be_read(
    config: Any, kind: type[LconvertError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bitnet(**config)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"weight": ("U8", packed() | 3)}, InputError, "row 0 holds the code 3, but weights are ternary"),
        (
            {"weight": ("U8", packed()[:-1])},
            InputError,
            r"has shape \(7, 128\), but the configuration implies \(8, 128\)",
        ),
        ({"weight": ("I8", packed().view(np.int8))}, InputError, "is stored as I8, expected U8"),
        (
            {"weight": ("BF16", np.zeros((ROWS, COLS), np.uint16))},
            UnsupportedError,
            "weight_scale is not packed",
        ),
        ({"weight_scale": ("BF16", TERNARY_SCALE * 0)}, InputError, "the scale 0.0 is damaged"),
        ({"weight_scale": ("F32", np.array([np.nan], np.float32))}, InputError, "the scale nan is damaged"),
        ({"weight_scale": ("BF16", np.zeros(ROWS, np.uint16))}, InputError, r"has shape \(32,\)"),
    ],
)
def test_bitnet_tensors_that_contradict_it(changed: Tensors, kind: type[LconvertError], message: str) -> None:
    with pytest.raises(kind, match=message):
        bitnet({"weight": ("U8", packed()), "weight_scale": ("BF16", TERNARY_SCALE)} | changed)


def test_bitnet_needs_its_scale_and_whole_bytes() -> None:
    with pytest.raises(InputError, match="the tensor weight_scale is missing"):
        bitnet({"weight": ("U8", packed())})
    with pytest.raises(
        InputError, match=r"a weight of shape \(30, 128\) does not pack four rows into a byte"
    ):
        bitnet(shape=(30, COLS))


# --- Quark -----------------------------------------------------------------------------------------------

PAIRS = noise(ROWS * COLS // 2, 1).reshape(ROWS, -1)
EXPONENTS = (noise(ROWS * COLS // 32, 3) % 40 + 100).astype(np.uint8).reshape(ROWS, -1)
BYTES = noise(ROWS * COLS, 4).reshape(ROWS, COLS)
FLOATS = np.where((BYTES & 0x7F) == 0x7F, BYTES ^ 1, BYTES).astype(np.uint8)
CHANNELS = (noise(ROWS, 5).astype(np.float32) + 1) / np.float32(977)
NIBBLES = (noise(ROWS * COLS, 7) & 15).reshape(ROWS, COLS)
ZEROS = (noise(ROWS * 4, 9) & 15).reshape(ROWS, 4)
GROUPS = ((noise(ROWS * 4, 8).astype(np.float32) + 1) / np.float32(977)).reshape(ROWS, 4)
ONE = np.array(0.0123, np.float32)
AWQ, PLAIN = (0, 2, 4, 6, 1, 3, 5, 7), tuple(range(8))


def words(nibbles: NDArray[np.uint8], order: tuple[int, ...]) -> NDArray[np.int32]:
    """Rows (n, k) of nibbles as words (k, n/8), nibble i of a word from row order[i] of its eight."""
    out = np.zeros((nibbles.shape[1], nibbles.shape[0] // 8), np.uint32)
    for i, row in enumerate(order):
        out |= nibbles[row::8].T.astype(np.uint32) << np.uint32(4 * i)
    return out.view(np.int32)


def spec(dtype: str, qscheme: str, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False, "symmetric": True} | more


FP8_TENSOR, INT8_CHANNEL = spec("fp8_e4m3", "per_tensor"), spec("int8", "per_channel", ch_axis=0)
MXFP4 = spec("fp4", "per_group", group_size=32, scale_format="e8m0", ch_axis=-1)
UINT4 = spec("uint4", "per_group", group_size=32, symmetric=False, ch_axis=1)
INT4 = UINT4 | {"dtype": "int4", "symmetric": True}


def quark(weight: Any, inputs: Any = None, **more: Any) -> Quark:
    config = {
        "quant_method": "quark", "exclude": ["lm_head"], "layer_type_quant_config": {}, "quant_mode": "eager_mode",
        "global_quant_config": {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None},
        "layer_quant_config": {}, "algo_config": None,
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }  # fmt: skip
    found = scheme(**(config | more))
    assert isinstance(found, Quark)
    return found


def read(tensors: Tensors, weight: Any, inputs: Any = None, **more: Any) -> Weight:
    found = quark(weight, inputs, **more).weight(MODULE, parts_of(tensors), (ROWS, COLS))
    quantized(found, tensors)
    assert found is not None
    return found


def e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (
        torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    )
    return found


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_quark_int8_per_channel(shape: tuple[int, ...]) -> None:
    """vLLM's `QuarkW8A8Int8` takes scales of either shape."""
    tensors: Tensors = {
        "weight": ("I8", BYTES.view(np.int8)),
        "weight_scale": ("F32", CHANNELS.reshape(shape)),
    }
    zeros: Tensors = {"weight_zero_point": ("I8", np.zeros(shape, np.int8))}
    for stored in (tensors, tensors | zeros):
        found = read(stored, INT8_CHANNEL, spec("int8", "per_channel", is_dynamic=True))
        assert np.array_equal(dequantize(quantized(found, stored)), BYTES.view(np.int8) * CHANNELS[:, None])
        assert found.activation == ActSpec(int_grid(8, True), "token", dynamic=True)


def test_quark_int8_per_tensor_with_static_inputs() -> None:
    tensors: Tensors = {
        "weight": ("I8", BYTES.view(np.int8)),
        "weight_scale": ("F32", ONE),
        "input_scale": ("F32", ONE * 3),
        "input_zero_point": ("I8", np.array(5, np.int8)),
    }
    found = read(tensors, spec("int8", "per_tensor"), spec("int8", "per_tensor", symmetric=False))
    assert np.array_equal(dequantize(quantized(found, tensors)), BYTES.view(np.int8) * ONE)
    act = found.activation
    assert act is not None and act.scale is not None and act.zero is not None
    assert (act.per, act.dynamic, act.scale.load()[0], act.zero.load()[0]) == ("tensor", False, ONE * 3, 5)


def test_quark_fp8() -> None:
    tensors: Tensors = {"weight": ("F8_E4M3", FLOATS), "weight_scale": ("F32", ONE)}
    static: Tensors = {"input_scale": ("F32", np.array([0.5], np.float32))}
    found = read(tensors | static, FP8_TENSOR, FP8_TENSOR)
    assert np.array_equal(dequantize(quantized(found, tensors | static)), e4m3(FLOATS) * ONE)
    dynamic = read(tensors, [FP8_TENSOR], [FP8_TENSOR | {"is_dynamic": True}])
    assert dynamic.activation == ActSpec(E4M3, "tensor", dynamic=True)
    channels: Tensors = {"weight": ("F8_E4M3", FLOATS), "weight_scale": ("F32", CHANNELS)}
    rows = read(
        channels, spec("fp8_e4m3", "per_channel", ch_axis=0), spec("fp8_e4m3", "per_channel", is_dynamic=True)
    )
    assert np.array_equal(dequantize(quantized(rows, channels)), e4m3(FLOATS) * CHANNELS[:, None])
    assert rows.activation == ActSpec(E4M3, "token", dynamic=True)


def test_quark_fp8_blocks_multiply() -> None:
    """vLLM's `QuarkW8A8Fp8PerBlock`: weight_scale is the multiplier."""
    blocks = CHANNELS[:16].reshape(2, 8)
    tensors: Tensors = {"weight": ("F8_E4M3", FLOATS), "weight_scale": ("F32", blocks)}
    inputs = spec("fp8_e4m3", "per_group", is_dynamic=True, group_size=16)
    found = read(tensors, spec("fp8_e4m3", "per_block", block_size=[16, 16]), inputs)
    wanted = e4m3(FLOATS) * np.repeat(np.repeat(blocks, 16, axis=0), 16, axis=1)
    assert np.array_equal(dequantize(quantized(found, tensors)), wanted)
    assert found.activation == ActSpec(E4M3, "group", dynamic=True, group=16)


def test_quark_mxfp4() -> None:
    tensors: Tensors = {"weight": ("U8", PAIRS), "weight_scale": ("U8", EXPONENTS)}
    found = read(tensors, MXFP4, MXFP4 | {"is_dynamic": True})
    q = quantized(found, tensors)
    exponents = np.repeat(np.exp2(EXPONENTS.astype(np.float32) - 127), 32, axis=1)
    assert fingerprint(dequantize(q) / exponents + np.float32(0)) == "a15d5540c9a549ea"  # Pack_fp4.unpack
    assert found.activation == ActSpec(E2M1, "group", dynamic=True, group=32)


def test_quark_mxfp8() -> None:
    tensors: Tensors = {"weight": ("F8_E4M3", FLOATS), "weight_scale": ("U8", EXPONENTS)}
    found = read(tensors, spec("fp8_e4m3", "per_group", group_size=32, scale_format="e8m0"))
    wanted = e4m3(FLOATS) * np.repeat(np.exp2(EXPONENTS.astype(np.float32) - 127), 32, axis=1)
    assert np.array_equal(dequantize(quantized(found, tensors)), wanted)
    assert found.activation is None


@pytest.mark.parametrize(
    ("dtype", "method", "fingerprint_of_words"),
    [
        ("uint4", "reorder", "d6ae7ce429b539d2"), ("uint4", "order", "1ffba5d9ba7b35c5"),
        ("int4", "reorder", "e5534aa193fe041f"), ("int4", "order", "4414847f5ee07cb5"),
    ],
)  # fmt: skip
def test_quark_groups_of_4_bits(dtype: str, method: str, fingerprint_of_words: str) -> None:
    """The words are those that Quark's `Pack_4_bits` makes of the same codes."""
    signed, order = dtype == "int4", AWQ if method == "reorder" else PLAIN
    numbers = NIBBLES.astype(np.int8) - np.int8(8) if signed else NIBBLES
    packed_words = words(numbers.view(np.uint8) & 15, order)
    assert fingerprint(packed_words) == fingerprint_of_words
    tensors: Tensors = {
        "weight": ("I32", packed_words),
        "weight_scale": ("F32", np.ascontiguousarray(GROUPS.T)),
    }
    zeros = np.zeros_like(ZEROS) if signed else ZEROS
    tensors["weight_zero_point"] = ("I32", words(zeros, order))
    if (dtype, method) == ("uint4", "reorder"):
        assert fingerprint(tensors["weight_zero_point"][1]) == "95f206de3e90bf4e"
    found = read(tensors, INT4 if signed else UINT4, export={"pack_method": method})
    q = quantized(found, tensors)
    assert np.array_equal(q.codes.load(), numbers)
    centred = numbers.astype(np.float32) - np.repeat(zeros, 32, axis=1)
    assert np.array_equal(dequantize(q), centred * np.repeat(GROUPS, 32, axis=1))


def test_quark_layers_have_their_own_quantization() -> None:
    """The first matching pattern counts, whether or not a later one matches, too."""
    layers = {
        "*o_proj": {"weight": INT8_CHANNEL},
        "*": {"weight": MXFP4},
        "*.v_proj": {"weight": INT8_CHANNEL},
    }
    tensors: Tensors = {"weight": ("I8", BYTES.view(np.int8)), "weight_scale": ("F32", CHANNELS)}
    assert quantized(read(tensors, FP8_TENSOR, layer_quant_config=layers), tensors).grid == int_grid(8, True)
    scheme_ = quark(FP8_TENSOR, layer_quant_config=layers)
    with pytest.raises(InputError, match="is stored as I8, expected U8"):
        scheme_.weight(
            "model.layers.0.self_attn.v_proj",
            parts_of(tensors | {"weight_scale": ("U8", EXPONENTS)}),
            (32, 128),
        )


def test_quark_kv_cache() -> None:
    cached = {"weight": FP8_TENSOR, "input_tensors": FP8_TENSOR, "output_tensors": FP8_TENSOR}
    layers = {"*k_proj": cached, "*v_proj": cached}
    found = quark(
        FP8_TENSOR, FP8_TENSOR, layer_quant_config=layers, export={"kv_cache_group": ["*k_proj", "*v_proj"]}
    )
    side = ActSpec(E4M3, "tensor", dynamic=False)
    assert found.kv == KVSpec(side, side)
    tensors: Tensors = {
        "weight": ("F8_E4M3", FLOATS),
        "weight_scale": ("F32", ONE),
        "input_scale": ("F32", ONE),
    }
    name = "model.layers.0.self_attn.k_proj"
    quantized(found.weight(name, parts_of(tensors), (ROWS, COLS)), tensors)
    with pytest.raises(UnsupportedError, match="its output_tensors are quantized"):
        quark(FP8_TENSOR, layer_quant_config=layers).weight(name, parts_of(tensors), (ROWS, COLS))


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"export": {"weight_format": "fake_quantized"}}, UnsupportedError, "weight_format 'fake_quantized'"),
        ({"export": {"pack_method": "other"}}, InputError, "pack_method 'other' must be reorder or order"),
        ({"export": []}, InputError, r"export is \[\], expected an object"),
        ({"algo_config": [{"name": "rotation"}]}, UnsupportedError, "algo_config names 'rotation'"),
        ({"layer_type_quant_config": {"Linear": {}}}, UnsupportedError, "goes by Python classes"),
        ({"softmax_quant_spec": {"dtype": "fp8_e4m3"}}, UnsupportedError, "a quantized softmax"),
        ({"exclude": "lm_head"}, InputError, "exclude is 'lm_head', expected a list"),
        ({"exclude": ["re:(a+)+"]}, UnsupportedError, "may take too long to match"),
        ({"exclude": ["re:("]}, InputError, "no valid regular expression"),
        ({"layer_quant_config": {"*": 3}}, InputError, r"layer_quant_config '\*' is 3, expected an object"),
        (
            {"export": {"kv_cache_group": ["*k_proj"]}},
            UnsupportedError,
            "kv_cache_group .* only one FP8 scale",
        ),
    ],
)
def test_quark_configurations_that_cannot_be_read(more: Any, kind: type[LconvertError], message: str) -> None:
    with pytest.raises(kind, match=message):
        quark(FP8_TENSOR, **more)
    quark(FP8_TENSOR, algo_config=[{"name": "awq"}])


FP8: Tensors = {"weight": ("F8_E4M3", FLOATS), "weight_scale": ("F32", ONE)}
I8: Tensors = {"weight": ("I8", BYTES.view(np.int8)), "weight_scale": ("F32", CHANNELS)}
MX: Tensors = {"weight": ("U8", PAIRS), "weight_scale": ("U8", EXPONENTS)}
W4: Tensors = {
    "weight": ("I32", words(NIBBLES, AWQ)),
    "weight_scale": ("F32", np.ascontiguousarray(GROUPS.T)),
    "weight_zero_point": ("I32", words(ZEROS, AWQ)),
}
BAD: list[tuple[Tensors, Any, Any, type[LconvertError], str]] = [
    (FP8, [FP8_TENSOR, FP8_TENSOR], None, UnsupportedError, "2 levels of quantization"),
    (
        FP8,
        spec("fp6_e2m3", "per_group"),
        None,
        UnsupportedError,
        "weights of 'fp6_e2m3', 'per_group' are not verified",
    ),
    (FP8, FP8_TENSOR | {"is_dynamic": True}, None, UnsupportedError, "are not verified by public code"),
    (FP8, None, None, InputError, "but config.json does not quantize it"),
    (FP8, FP8_TENSOR, spec("bfloat16", "per_tensor"), UnsupportedError, "inputs of 'bfloat16', 'per_tensor'"),
    (
        FP8,
        FP8_TENSOR,
        spec("int8", "per_channel", is_dynamic=True, symmetric=False),
        UnsupportedError,
        "inputs of 'int8'",
    ),
    (FP8, FP8_TENSOR, FP8_TENSOR, InputError, "the tensor input_scale is missing"),
    (FP8, spec("fp8_e4m3", "per_block", block_size=[16]), None, InputError, r"block_size \[16\] must be two"),
    (
        FP8,
        spec("fp8_e4m3", "per_block", block_size=[16, 16], scale_type="float8_e8m0fnu"),
        None,
        UnsupportedError,
        "e8m0 scales are not verified",
    ),
    (FP8 | {"weight": ("F8_E4M3", FLOATS | 0x7F)}, FP8_TENSOR, None, InputError, "row 0 holds a NaN"),
    (FP8 | {"weight_scale": ("F32", CHANNELS)}, FP8_TENSOR, None, InputError, r"has shape \(32,\)"),
    (FP8 | {"weight_scale": ("F32", -ONE)}, FP8_TENSOR, None, InputError, "is damaged, it must be positive"),
    (
        I8 | {"weight_scale": ("F32", -0.0 * CHANNELS)},
        INT8_CHANNEL,
        None,
        InputError,
        "the scale -0.0 in row 0",
    ),
    (I8, spec("int8", "per_channel", ch_axis=1), None, UnsupportedError, "a scale per input channel"),
    (
        I8,
        spec("int8", "per_channel", symmetric=False),
        None,
        UnsupportedError,
        "int8 weights with zero points",
    ),
    (
        I8 | {"weight_zero_point": ("I8", np.ones(32, np.int8))},
        INT8_CHANNEL,
        None,
        InputError,
        "a zero point is not 0",
    ),
    (MX, MXFP4 | {"group_size": 16}, None, UnsupportedError, "in groups of 16 with scales 'e8m0'"),
    (MX, MXFP4 | {"scale_format": "float32"}, None, UnsupportedError, "known are groups of 32 with e8m0"),
    (MX | {"weight_scale": ("U8", EXPONENTS | 0xFF)}, MXFP4, None, InputError, "a scale in row 0 is NaN"),
    (W4, UINT4 | {"symmetric": True}, None, UnsupportedError, "uint4 with symmetric True is not verified"),
    (W4, UINT4 | {"group_size": 48}, None, InputError, "128 input features do not divide into groups of 48"),
    (W4, UINT4 | {"group_size": None}, None, InputError, "group_size None"),
    (W4, INT4, None, InputError, "a zero point is not 0"),
    (
        {k: v for k, v in W4.items() if "zero" not in k},
        UINT4,
        None,
        InputError,
        "weight_zero_point is missing",
    ),
    (W4 | {"weight": ("I32", words(NIBBLES, AWQ)[:-1])}, UINT4, None, InputError, r"has shape \(127, 4\)"),
]


@pytest.mark.parametrize(
    ("tensors", "weight", "inputs", "kind", "message"), BAD, ids=[b[4][:40] for b in BAD]
)
def test_quark_modules_that_contradict_it(
    tensors: Tensors, weight: Any, inputs: Any, kind: type[LconvertError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        read(tensors, weight, inputs)


@pytest.mark.parametrize("pattern", [MODULE, "*o_proj", r"re:.*\.o_proj"])
def test_quark_excluded_modules(pattern: str) -> None:
    found = quark(FP8_TENSOR, exclude=[pattern])
    assert found.weight(MODULE, parts_of({"weight": ("BF16", np.zeros((2, 4), np.uint16))}), (2, 4)) is None
    with pytest.raises(
        InputError, match=r"is stored as weight, weight_scale, but config\.json does not quantize it"
    ):
        found.weight(MODULE, parts_of(FP8), (ROWS, COLS))
    quantized(found.weight("model.layers.0.self_attn.v_proj", parts_of(FP8), (ROWS, COLS)), FP8)
