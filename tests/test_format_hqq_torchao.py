"""HQQ and torchao: peers' checkpoints are read as the numbers they mean; damage is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lconvert
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import hqq, torchao
from lconvert.formats.scheme import Checkpoint, Part, Weight
from lconvert.ir import E4M3, ActSpec, QTensor, as_f32, int_grid
from lconvert.kernels.qtensor import dequantize
from tests import int_checkpoints as made
from tests.checkpoints import bf16

PEERS = made.FIXTURES / "peers"
MODULE = "model.layers.0.mlp.up_proj"
Arrays = dict[str, NDArray[Any]]
Change = Callable[[Arrays], None]


def peer(name: str) -> Path:
    if not (PEERS / name / "model.safetensors").exists():
        pytest.skip(f"the fixture tests/fixtures/peers/{name}, written by hqq or torchao, is missing")
    return PEERS / name


def refused(message: str) -> Any:
    return pytest.raises((InputError, UnsupportedError), match=message)


def wide(array: NDArray[Any]) -> NDArray[np.float32]:
    return as_f32(array, "BF16" if array.dtype == np.uint16 else "F32")


# --- the peers' checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["4", "4-axis0", "3"])
def test_hqq_means_what_hqq_dequantizes(case: str, tmp_path: Path) -> None:
    """The peer's script left every default of transformers in config.json, some of which no Llama has."""
    folder = peer(f"tao-hqq-{case}")
    shutil.copytree(folder, tmp_path / "model")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = json.loads((peer("base") / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = lconvert.read(tmp_path / "model")
    made.compare_with_oracle(model, tmp_path / "model")
    assert any("run across rows" in line for line in model.report) == (case == "4-axis0")


@pytest.mark.parametrize("case", ["int8", "fp8"])
def test_torchao_means_what_torchao_dequantizes(case: str) -> None:
    folder = peer(f"tao-torchao-{case}")
    model = lconvert.read(folder)
    made.compare_with_oracle(model, folder)
    grids = {e.data.grid for e in model.entries.values() if isinstance(e.data, QTensor)}
    assert grids == {int_grid(8, True) if case == "int8" else E4M3}


# --- HQQ: an independent packer --------------------------------------------------------------------------

HQQ = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
_PER_WORD = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_STORED_BITS = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1: 1}


def text(value: str) -> NDArray[np.uint8]:
    return np.frombuffer(value.encode(), np.uint8)


def packed(
    shape: tuple[int, int], bits: int, group: int, axis: int = 1, seed: int = 0
) -> tuple[Arrays, NDArray[np.float32]]:
    """The tensors of one HQQLinear and its values, one weight at a time."""
    rng = np.random.default_rng(seed)
    n, k = shape
    count, per = n * k // group, _PER_WORD[bits]
    codes = rng.integers(0, 1 << bits, n * k)
    scale, zero = (bf16(rng.random(count, np.float32) + np.float32(a)) for a in (0.01, 3.0))
    member = [i % count if axis == 0 else i // group for i in range(n * k)]
    values = [(np.float32(c) - wide(zero)[m]) * wide(scale)[m] for c, m in zip(codes, member, strict=True)]
    grouped = codes.reshape((group, count) if axis == 0 else (count, group))
    step = -(-len(grouped) // per)
    words = np.zeros((step, grouped.shape[1]), np.int64)
    for row, line in enumerate(grouped):
        words[row % step] |= line << (_STORED_BITS[bits] * (per - 1 - row // step))
    side = (1, count) if axis == 0 else (count, 1)
    arrays: Arrays = {
        "W_q": words.astype(np.int32 if bits == 3 else np.uint8),
        "scale": scale.reshape(side),
        "zero": zero.reshape(side),
        "shape": np.array(shape, np.int64),
        "packing": text("3bit_32" if bits == 3 else f"{_STORED_BITS[bits]}bit_u8"),
        "compute_dtype": text("torch.bfloat16"),
        "unpack_view_dtype": text("torch.int32" if bits == 3 else "torch.uint8"),
    }
    arrays |= {
        k: np.array(v, np.int32) for k, v in {"nbits": bits, "group_size": group, "axis": axis}.items()
    }
    on, off = np.array(1, np.uint8), np.array(0, np.uint8)
    arrays |= dict.fromkeys(("channel_wise", "encoded_state_dict", "stores_quant_config", "optimize"), on)
    arrays |= dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta", "round_zero"), off)
    return arrays, np.array(values, np.float32).reshape(shape)


def hqq_scheme(**changes: Any) -> hqq.Hqq:
    return hqq.parse(Checkpoint("config.json", HQQ | changes, Path("/nowhere")))


def read_hqq(arrays: Arrays, shape: tuple[int, ...], **config: Any) -> QTensor:
    found = hqq_scheme(**config).weight(MODULE, made.parts(arrays), shape)
    assert found is not None and isinstance(found.data, QTensor)
    assert found.used | found.inert == arrays.keys()
    return found.data


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.sampled_from((8, 16, 40)), st.sampled_from((64, 96, 160))),
    bits=st.sampled_from((8, 6, 5, 4, 3, 2, 1)),
    group=st.sampled_from((8, 16, 32, 64)),
    axis=st.sampled_from((0, 1)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_hqq_against_an_independent_packer(
    shape: tuple[int, int], bits: int, group: int, axis: int, seed: int, data: st.DataObject
) -> None:
    rows = group if axis == 0 else shape[0] * shape[1] // group
    assume(bits == 3 or rows % (8 // bits) == 0)
    arrays, values = packed(shape, bits, group, axis, seed)
    q = read_hqq(arrays, shape)
    assert np.array_equal(dequantize(q), values)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    assert np.array_equal(dequantize(q, start, stop), values[start:stop])
    assert q.block == ((1, 1) if axis == 0 else (1, np.gcd(shape[1], group)))


def put(suffix: str, value: Any) -> Change:
    return lambda arrays: arrays.__setitem__(suffix, value)


def drop(suffix: str) -> Change:
    return lambda arrays: arrays.__delitem__(suffix)


def fill(suffix: str, value: int) -> Change:
    return lambda arrays: arrays.__setitem__(suffix, np.full_like(arrays[suffix], value))


def flag(name: str, value: int = 1) -> Change:
    return put(name, np.array(value, np.uint8))


def number(name: str, value: int) -> Change:
    return put(name, np.array(value, np.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("W_q"), rf"{MODULE}: the tensor W_q is missing, there are axis, .*; download it again"),
        (drop("zero"), r"the tensor zero is missing"),
        (drop("nbits"), r"the tensor nbits is missing"),
        (
            flag("view_as_float"),
            r"view_as_float: is set: the codes are stored under the name of a float type",
        ),
        (flag("quant_scale"), r"quant_scale: is set: the scales are quantized themselves"),
        (flag("quant_zero"), r"quant_zero: is set: the zero points are quantized themselves"),
        (flag("offload_meta"), r"offload_meta: is set: scales and zero points are stored as one tensor"),
        (flag("channel_wise", 0), r"channel_wise: is off: one scale for the whole matrix"),
        (number("nbits", 7), r"HQQ of 7 bits along axis 1; known are 1 to 6 and 8 bits"),
        (number("axis", 2), r"HQQ of 5 bits along axis 2"),
        (number("group_size", 0), r"8 x 64 weights do not divide into groups of 0"),
        (number("group_size", 48), r"8 x 64 weights do not divide into groups of 48"),
        (number("group_size", 1 << 30), r"do not divide into groups of 1073741824"),
        (put("nbits", np.array([5], np.int32)), r"nbits: has shape \(1,\)"),
        (put("packing", text("4bit_u8")), r"packing: is '4bit_u8', but 5 bits are packed as 8bit_u8"),
        (put("packing", text("x" * 100)), r"packing: a text of 100 bytes, 64 is the most"),
        (put("shape", np.array([64, 8])), r"shape: is \[64, 8\], but config\.json implies \[8, 64\]"),
        (put("W_q", np.zeros((15, 32), np.uint8)), r"W_q: has shape \(15, 32\)"),
        (put("W_q", np.zeros((16, 32), np.int32)), r"W_q: is stored as I32, expected U8"),
        (fill("W_q", 32), r"W_q: holds the code 32, which is no 5-bit number"),
        (put("scale", np.ones((1, 16), np.float32)), r"tensor scale: has shape \(1, 16\)"),
        (fill("scale", 0x7FC0), r"the scale nan in row 0 is damaged"),
        (fill("zero", 0x7F80), r"zero: holds zero points that are not finite"),
    ],
)
def test_damaged_hqq_is_refused(change: Change, message: str) -> None:
    arrays, _ = packed((8, 64), 5, 32)
    change(arrays)
    with refused(message):
        dequantize(read_hqq(arrays, (8, 64)))


def test_rows_that_do_not_pack() -> None:
    arrays, _ = packed((8, 64), 4, 32)
    arrays["group_size"] = np.array(512, np.int32)
    with refused(r"1 grouped rows do not pack 2 to a word"):
        read_hqq(arrays, (8, 64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nbits": 4}, r"config\.json: quantization_config has the unknown key 'nbits'; HQQ's are"),
        ({"skip_modules": "lm_head"}, r"skip_modules is 'lm_head', expected a list"),
        (
            {"skip_modules": ["up_proj"]},
            r"up_proj: is stored quantized, but config\.json has it among skip_modules",
        ),
        ({"quant_config": 4}, r"quant_config is 4, expected an object"),
        ({"quant_config": {"q_proj": 4}}, r"quant_config of 'q_proj': weight_quant_params is None"),
        (
            {"quant_config": {"weight_quant_params": 4}},
            r"quant_config: weight_quant_params is 4, expected an object",
        ),
        (
            {"quant_config": {"weight_quant_params": {"axis": "x"}}},
            r"quant_config: axis is 'x', expected a number",
        ),
        (
            {"quant_config": {"weight_quant_params": {}, "scale_quant_params": {"nbits": 8}}},
            r"scale_quant_params quantizes scales or zero points; quantize the model without it",
        ),
        (
            {"quant_config": {"weight_quant_params": {"nbits": 4}}},
            r"nbits: is 5, but config\.json has nbits 4",
        ),
        (
            {"quant_config": {"mlp.up_proj": {"weight_quant_params": {"axis": 0}}}},
            r"axis: is 1, but .* has axis 0",
        ),
    ],
)
def test_hqq_configs_are_refused(config: dict[str, Any], message: str) -> None:
    arrays, _ = packed((8, 64), 5, 32)
    with refused(message):
        read_hqq(arrays, (8, 64), **config)


def test_hqq_configs_that_agree() -> None:
    arrays, values = packed((8, 64), 5, 32)
    one = {"weight_quant_params": {"nbits": 5, "group_size": 32, "axis": 1}, "scale_quant_params": None}
    other = {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 0}}
    for stated in (one, {"mlp.up_proj": one, "self_attn.q_proj": other}, {"self_attn.q_proj": other}, None):
        assert np.array_equal(dequantize(read_hqq(arrays, (8, 64), quant_config=stated)), values)
    assert hqq_scheme(quant_config=one).report == ()
    assert hqq_scheme(quant_config=one).method == "hqq 5 bit, group 32"
    weight: Arrays = {"weight": np.zeros((8, 64), np.float32)}
    assert hqq_scheme().weight(MODULE, made.parts(weight), (8, 64)) is None
    with refused(r"of shape \(2, 4, 64\) are not a matrix"):
        read_hqq(arrays, (2, 4, 64))


# --- torchao ---------------------------------------------------------------------------------------------

_BF16 = {"_type": "torch.dtype", "_data": "bfloat16"}
_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
_KINDS = {"int8": "Int8Tensor", "intx": "IntxUnpackedToInt8Tensor", "float8": "Float8Tensor"}


def subclass(
    kind: str, block: tuple[int, int], asymmetric: bool = False, seed: int = 0, **data: Any
) -> tuple[Arrays, dict[str, Any], NDArray[np.float32]]:
    """Tensors (8, 64), description and values of one subclassed weight; intx has 4 bits."""
    rng = np.random.default_rng(seed)
    count = (8 // block[0], 64 // block[1])
    half = 8 if kind == "intx" else 128
    scale = rng.random(count, np.float32) + np.float32(0.01)
    spread = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)
    names = ["qdata", "scale"]
    arrays: Arrays = {"_weight_scale": scale}
    if kind == "float8":
        codes = rng.integers(0, 0x7F, (8, 64)).astype(np.uint8) | (rng.integers(0, 2, (8, 64)) << 7).astype(
            np.uint8
        )
        exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
        size = np.where(
            exponent, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7), mantissa / 8 * 2.0**-6
        )
        values = np.where(codes >> 7, -size, size).astype(np.float32)
    else:
        codes = rng.integers(-half, half, (8, 64)).astype(np.int8)
        zero = rng.integers(-half, half, count).astype(np.int8) if asymmetric else np.zeros(count, np.int8)
        arrays["_weight_zero_point"] = zero
        names.append("zero_point")
        values = codes.astype(np.float32) - np.repeat(np.repeat(zero, block[0], 0), block[1], 1)
    arrays["_weight_qdata"] = codes
    if kind == "intx":
        data = {
            "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "activation_quantization": None,
        } | data
    data = {"block_size": list(block), "dtype": _BF16} | data
    return arrays, {"_type": _KINDS[kind], "_data": data, "_tensor_data_names": names}, values * spread


def weigh(arrays: Arrays, description: Any, shape: tuple[int, ...] = (8, 64), **config: Any) -> Weight | None:
    """The module read; a float8 qdata is stored as such."""
    metadata = {} if description is None else {f"{MODULE}.weight": description}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    stored = made.parts(arrays)
    if "_weight_qdata" in stored and stored["_weight_qdata"].dtype == "U8":
        found = stored["_weight_qdata"]
        stored["_weight_qdata"] = Part("F8_E4M3", found.data, found.columns, found.where)
    scheme = torchao.parse(
        Checkpoint("config.json", {"quant_method": "torchao"} | config, Path("/nowhere"), metadata)
    )
    return scheme.weight(MODULE, stored, shape)


def read_ao(arrays: Arrays, description: Any, shape: tuple[int, ...] = (8, 64), **config: Any) -> QTensor:
    found = weigh(arrays, description, shape, **config)
    assert found is not None and isinstance(found.data, QTensor) and found.used == arrays.keys()
    return found.data


@pytest.mark.parametrize("block", [(1, 64), (1, 16), (8, 64), (4, 32)])
@pytest.mark.parametrize(
    ("kind", "asymmetric"),
    [("int8", False), ("int8", True), ("intx", False), ("intx", True), ("float8", False)],
)
def test_torchao_by_definition(kind: str, asymmetric: bool, block: tuple[int, int]) -> None:
    arrays, description, values = subclass(kind, block, asymmetric)
    q = read_ao(arrays, description)
    assert np.array_equal(dequantize(q), values)
    assert np.array_equal(dequantize(q, 3, 6), values[3:6])
    assert q.block == (-1 if block[0] == 8 else block[0], -1 if block[1] == 64 else block[1])
    assert (q.zero is not None) == asymmetric
    if kind != "float8":
        assert q.grid == int_grid(4 if kind == "intx" else 8, not asymmetric)


def test_one_scale_may_be_a_scalar() -> None:
    for shape in ((), (1,)):
        arrays, description, values = subclass("float8", (8, 64))
        arrays["_weight_scale"] = arrays["_weight_scale"].reshape(shape)
        assert np.array_equal(dequantize(read_ao(arrays, description)), values)


_INT8 = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": _ROW}}
_FLOAT8 = {
    "_type": "QuantizeTensorToFloat8Kwargs",
    "_data": {"granularity": {"_type": "PerTensor", "_data": {}}},
}


@pytest.mark.parametrize(
    ("kind", "data", "activation"),
    [
        ("int8", {"act_quant_kwargs": None}, None),
        ("int8", {"act_quant_kwargs": _INT8}, ActSpec(int_grid(8, True), "token", True)),
        (
            "int8",
            {"act_quant_kwargs": {**_INT8, "_data": {"granularity": _ROW, "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}}}},
            ActSpec(int_grid(8, False), "token", True),
        ),
        ("float8", {"act_quant_kwargs": _FLOAT8, "mm_config": None}, ActSpec(E4M3, "tensor", True)),
        ("intx", {"activation_quantization": "int8_asym_per_token"}, ActSpec(int_grid(8, False), "token", True)),
    ],
)  # fmt: skip
def test_inputs_of_torchao(kind: str, data: dict[str, Any], activation: ActSpec | None) -> None:
    arrays, description, _ = subclass(kind, (1, 64), **data)
    found = weigh(arrays, description)
    assert found is not None and found.activation == activation


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("int8", {"block_size": [1, 48]}, r"blocks of \[1, 48\] do not divide 8 x 64"),
        ("int8", {"block_size": None}, r"block_size is None, expected two positive numbers such as \[1, 32\]"),
        ("int8", {"block_size": [1, 0]}, r"block_size is \[1, 0\], expected two positive"),
        ("int8", {"block_size": [1, 16]}, r"_weight_scale: has shape \(8, 1\).* implies \(8, 4\)"),
        ("int8", {"sparse": 1}, r"the attribute 'sparse' is unknown"),
        ("int8", {"act_quant_kwargs": 3}, r"act_quant_kwargs is 3; known is QuantizeTensorToInt8Kwargs"),
        ("int8", {"act_quant_kwargs": _INT8 | {"_data": 3}}, r"act_quant_kwargs holds 3, expected an object"),
        (
            "int8",
            {"act_quant_kwargs": _INT8 | {"_data": {"granularity": _ROW, "reduce_range": True}}},
            r"act_quant_kwargs has 'reduce_range' = True, which is not read",
        ),
        (
            "int8",
            {"act_quant_kwargs": _INT8 | {"_data": {"granularity": {"_type": "PerGroup", "_data": {}}}}},
            r"granularity is .*; known is PerRow or PerTensor",
        ),
        (
            "int8",
            {"act_quant_kwargs": _INT8 | {"_data": {"granularity": {"_type": "PerRow", "_data": {"dim": 0}}}}},
            r"rows along \{'dim': 0\} of the input",
        ),
        (
            "float8",
            {"act_quant_kwargs": _FLOAT8 | {"_data": {"granularity": _ROW, "hp_value_ub": 3.0}}},
            r"act_quant_kwargs has 'hp_value_ub' = 3\.0, which is not read",
        ),
        ("intx", {"target_dtype": {"_type": "torch.dtype", "_data": "uint4"}}, r"target_dtype is 'uint4'; known are int1"),
        ("intx", {"target_dtype": {"_type": "torch.dtype", "_data": []}}, r"target_dtype is \[\]; known are int1"),
        ("intx", {"activation_quantization": "int4"}, r"activation_quantization 'int4'; known is int8_asym_per_token"),
    ],
)  # fmt: skip
def test_descriptions_are_refused(kind: str, data: dict[str, Any], message: str) -> None:
    arrays, description, _ = subclass(kind, (1, 64))
    description["_data"] |= data
    with refused(message):
        read_ao(arrays, description)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (None, r"description .*up_proj\.weight in the safetensors header is missing, and _weight_qdata.* another tool has dropped"),
        ("{", r"is no sound JSON; download the file again"),
        ("[" * 8000, r"is no sound JSON"),
        (" " * 9000, r"has 9000 bytes, 8192 is the most"),
        ("3", r"is 3, expected an object with a _type"),
        ({"_type": 3}, r"expected an object with a _type"),
        ({"_type": "Tensor"}, r"is of a Tensor, but _weight_qdata, .* are stored; the header and the tensors do not belong"),
        ({"_type": "Int4Tensor"}, r"is of the type 'Int4Tensor', whose layout belongs to a kernel; known are Int8Tensor"),
        ({"_type": "Int8Tensor"}, r"names the tensors None, stored are _weight_qdata"),
        ({"_type": "Int8Tensor", "_tensor_data_names": ["qdata"]}, r"names the tensors \['qdata'\], stored are"),
        ({"_type": "Int8Tensor", "_tensor_data_names": ["qdata", "scale", "zero_point"]}, r"_data is None, expected an object"),
    ],
)  # fmt: skip
def test_hostile_descriptions_are_refused(description: Any, message: str) -> None:
    arrays, _, _ = subclass("int8", (1, 64))
    with refused(message):
        read_ao(arrays, description)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("intx", fill("_weight_qdata", 8), r"holds the code 8, which is no int4"),
        ("intx", fill("_weight_zero_point", -9), r"holds the zero point -9, which is no int4"),
        ("int8", put("_weight_scale", np.full((8, 1), np.nan, np.float32)), r"the scale nan in row 0 is damaged"),
        ("int8", put("_weight_qdata", np.zeros((8, 32), np.int8)), r"_weight_qdata: has shape \(8, 32\)"),
        ("int8", put("_weight_zero_point", np.zeros((8, 1), np.int32)), r"zero_point: is stored as I32, expected I8"),
        ("float8", fill("_weight_qdata", 0x7F), r"row 0 holds a NaN"),
    ],
)  # fmt: skip
def test_damaged_torchao_is_refused(kind: str, change: Change, message: str) -> None:
    arrays, description, _ = subclass(kind, (1, 64))
    change(arrays)
    with refused(message):
        dequantize(read_ao(arrays, description))


def test_tensors_beside_the_known_ones() -> None:
    arrays, description, _ = subclass("int8", (1, 64))
    arrays["_weight_act_pre_scale"] = np.ones(64, np.float32)
    description["_tensor_data_names"].append("act_pre_scale")
    with refused(r"_weight_act_pre_scale: static or scaled inputs of an Int8Tensor are not read"):
        read_ao(arrays, description)
    arrays, description, _ = subclass("float8", (1, 64))
    stored = made.parts(arrays)
    stored["_weight_qdata"] = Part(
        "F8_E5M2", stored["_weight_qdata"].data, stored["_weight_qdata"].columns, "here"
    )
    metadata = {f"{MODULE}.weight": json.dumps(description)}
    scheme = torchao.parse(Checkpoint("config.json", {"quant_method": "torchao"}, Path("/nowhere"), metadata))
    with refused(r"here: E5M2 weights have no place in runtimes"):
        scheme.weight(MODULE, stored, (8, 64))


def test_plain_modules_and_configs_of_torchao() -> None:
    weight: Arrays = {"weight": np.zeros((8, 64), np.float32)}
    assert weigh(weight, None) is None and weigh(weight, {"_type": "Tensor"}) is None
    arrays, description, _ = subclass("int8", (1, 64))
    with refused(r"is of a Int8Tensor, but weight are stored"):
        weigh(weight, description)
    with refused(r"unknown key 'bits'; torchao's are"):
        weigh(arrays, description, bits=4)
    with refused(r"modules_to_not_convert is 3, expected a list"):
        weigh(arrays, description, modules_to_not_convert=3)
    with refused(r"is quantized, but config\.json has it among modules_to_not_convert; correct the list"):
        weigh(arrays, description, modules_to_not_convert=["up_proj"])
    with refused(r"of shape \(2, 4, 64\) are not a matrix"):
        weigh(arrays, description, (2, 4, 64))


@settings(max_examples=100, deadline=None)
@given(
    changes=made.configs(
        ("block_size", "dtype", "act_quant_kwargs", "reduce_range", "target_dtype", "mm_config")
    ),
    kind=st.sampled_from(tuple(_KINDS)),
)
def test_any_description_is_read_or_refused(changes: dict[str, Any], kind: str) -> None:
    arrays, description, _ = subclass(kind, (1, 64))
    description["_data"] |= changes
    try:
        dequantize(read_ao(arrays, description))
    except LconvertError as e:
        assert len(str(e)) < 1000


@settings(max_examples=100, deadline=None)
@given(made.configs(sorted(hqq._KEYS)), made.configs(("nbits", "group_size", "axis", "scale_quant_params")))
def test_any_hqq_config_is_read_or_refused(changes: dict[str, Any], params: dict[str, Any]) -> None:
    arrays, _ = packed((8, 64), 5, 32)
    try:
        read_hqq(arrays, (8, 64), **({"quant_config": {"weight_quant_params": params}} | changes))
    except LconvertError as e:
        assert len(str(e)) < 1000
