"""bitsandbytes: peers' bytes are read as the numbers they mean and written back unchanged; damage is refused in words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lconvert
from lconvert.converters import checkpoint
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import bitsandbytes as bnb
from lconvert.formats.scheme import Checkpoint, Held
from lconvert.ir import E4M3, ActSpec, Grid, KVSpec, QTensor, Tensor, Transform, dense, int_grid
from lconvert.kernels.qtensor import dequantize
from lconvert.passes import rtn, rtn_float
from tests import int_checkpoints as made
from tests.checkpoints import write_llama

PEERS = made.FIXTURES / "peers"
MODULE = "model.layers.0.mlp.up_proj"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = "weight.quant_state.bitsandbytes__"
ENVIRONMENT = "LCONVERT_BITSANDBYTES_PYTHON"


def parse(config: dict[str, Any]) -> bnb.BitsAndBytes:
    return bnb.parse(Checkpoint("config.json", config, Path("/nowhere")))


def peer(name: str) -> Path:
    if not (PEERS / name / "model.safetensors").exists():
        pytest.skip(f"the fixture tests/fixtures/peers/{name}, written by bitsandbytes, is missing")
    return PEERS / name


def stored(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a safetensors file, read without lconvert."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    head = json.loads(raw[8 : 8 + size])
    head.pop("__metadata__", None)
    return {
        name: (t["dtype"], t["shape"], raw[8 + size + t["data_offsets"][0] : 8 + size + t["data_offsets"][1]])
        for name, t in head.items()
    }


# --- an independent packer -------------------------------------------------------------------------------


def packed(
    shape: tuple[int, int], block: int = 64, kind: str = "nf4", double: bool = False, seed: int = 0
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """The tensors of one module and its values, one weight at a time."""
    rng = np.random.default_rng(seed)
    n, k = shape
    size, count = n * k, -(-n * k // block)
    codes = rng.integers(0, 16, size)
    table = np.array(bnb.TABLES[kind], np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    arrays: dict[str, NDArray[Any]] = {"weight.quant_map": table}
    if double:
        second = rng.integers(0, 256, count).astype(np.uint8)
        outer = rng.random(-(-count // 256), np.float32) + np.float32(0.01)
        book = np.sort(rng.standard_normal(256, np.float32))
        offset = np.float32(0.1861221343278885)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        scales = [book[second[i]] * outer[i // 256] + offset for i in range(count)]
        arrays |= {
            "weight.absmax": second,
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": book,
        }
    else:
        scales = list(rng.random(count, np.float32) + np.float32(0.01))
        arrays["weight.absmax"] = np.array(scales, np.float32)
    values = np.array([table[c] * scales[i // block] for i, c in enumerate(codes)], np.float32)
    even = [*codes.tolist(), 0] if size % 2 else codes.tolist()
    pairs = [16 * a + b for a, b in zip(even[::2], even[1::2], strict=True)]
    arrays["weight"] = np.array(pairs, np.uint8).reshape(-1, 1)
    arrays[STATE + kind] = as_state(state)
    return arrays, values.reshape(shape)


def as_state(state: Any) -> NDArray[np.uint8]:
    text = state if isinstance(state, bytes) else json.dumps(state).encode()
    return np.frombuffer(text, np.uint8)


def eight(shape: tuple[int, int] = (8, 64)) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(2)
    return {
        "weight": rng.integers(-127, 128, shape).astype(np.int8),
        "SCB": rng.random(shape[0], np.float32) + np.float32(0.1),
        "weight_format": np.array(0, np.uint8),
    }


def read(
    arrays: dict[str, NDArray[Any]], shape: tuple[int, int], config: dict[str, Any] | None = None
) -> QTensor:
    found = parse(config or {"quant_method": "bitsandbytes", "load_in_4bit": True}).weight(
        MODULE, made.parts(arrays), shape
    )
    assert found is not None and isinstance(found.data, QTensor)
    assert found.used == arrays.keys() and found.activation is None
    return found.data


# --- the peer's files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_four_bits_mean_what_bitsandbytes_dequantizes(kind: str) -> None:
    """All weights bit for bit, among them rows of 160 values in blocks of 64."""
    folder = peer(f"tao-bnb-{kind}")
    model = lconvert.read(folder)
    made.compare_with_oracle(model, folder)
    blocks = {e.data.block for e in model.entries.values() if isinstance(e.data, QTensor)}
    assert blocks == {(1, 64), (1, 32)}
    maps = [
        v for name, v in stored(folder / "model.safetensors").items() if name.endswith(".weight.quant_map")
    ]
    table = np.array(bnb.TABLES[kind[:3]], np.float32)
    assert maps and all(data == table.tobytes() for _, _, data in maps)


def test_eight_bits_are_one_unit_from_bitsandbytes_kernel() -> None:
    """(code * SCB) * fl(1/127) there, code * fl(SCB / 127) here."""
    folder = peer("tao-bnb-int8")
    model = lconvert.read(folder)
    oracle = json.loads((folder / "oracle.json").read_text())["tensors"]
    found = {
        e.provenance[0].split()[0]: e.data for e in model.entries.values() if isinstance(e.data, QTensor)
    }
    assert found.keys() == oracle.keys()
    for name, expected in oracle.items():
        w = dequantize(found[name]).reshape(-1)
        sample = w[np.arange(len(expected["sample"])) * 7919 % w.size]
        np.testing.assert_array_max_ulp(sample, np.array(expected["sample"], np.float32), maxulp=1)
    assert any("llm_int8_threshold 6" in line for line in model.report)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_peers_files_come_back_byte_for_byte(kind: str, tmp_path: Path) -> None:
    folder = peer(f"tao-bnb-{kind}")
    plan = checkpoint.plan(lconvert.read(folder), checkpoint.Options(format="bitsandbytes"))
    assert {item.verdict.kind for item in plan.items()} == {"exact"}
    execute(plan, tmp_path / "out")
    assert stored(tmp_path / "out" / "model.safetensors") == stored(folder / "model.safetensors")
    config, source = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path / "out", folder)
    )
    differing = {key for key, value in config.items() if source[key] != value}
    assert differing <= {"llm_int8_skip_modules"} and config["llm_int8_skip_modules"] == ["lm_head"]


def test_nf4_is_the_table_that_the_pass_rounds_to() -> None:
    assert Grid("codebook", 4, values=bnb.TABLES["nf4"]) == rtn_float.NF4


# --- round trips -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 24), st.sampled_from((64, 128, 160, 96, 30, 7, 320, 1024))),
    block=st.sampled_from(bnb.SIZES),
    kind=st.sampled_from(("nf4", "fp4")),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_reader_and_writer_against_an_independent_packer(
    shape: tuple[int, int], block: int, kind: str, double: bool, seed: int, data: st.DataObject
) -> None:
    """Any width: blocks of the flattened weight, whole and in slabs, and back to the same bytes."""
    arrays, values = packed(shape, block, kind, double, seed)
    q = read(arrays, shape)
    assert np.array_equal(dequantize(q), values)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    assert np.array_equal(dequantize(q, start, stop), values[start:stop])
    writer = bnb.Writer()
    assert writer.problem(Held(q)) is None
    state = json.loads(arrays[STATE + kind].tobytes())
    written = writer.store(Held(q))
    if json.loads(made.stored_bytes(written[STATE + kind])[2])["blocksize"] == state["blocksize"]:
        assert written.keys() == arrays.keys()
        for suffix, tensor in written.items():
            assert made.stored_bytes(tensor) == made.array_bytes(arrays[suffix]), suffix
    again = {
        s: np.frombuffer(b, _NUMPY[d]).reshape(t)
        for s, w in written.items()
        for d, t, b in [made.stored_bytes(w)]
    }
    assert np.array_equal(dequantize(read(again, shape)), values)
    for suffix, tensor in written.items():  # any rows, as the executor asks for them
        rows = tensor.shape[0]
        a, b = sorted((data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))))
        assert np.array_equal(tensor.read(a, b), again[suffix][a:b]), suffix


_NUMPY = {"U8": np.uint8, "F32": np.float32}


def test_eight_bits_by_definition() -> None:
    arrays = eight()
    q = read(arrays, (8, 64), EIGHT)
    exact = arrays["weight"].astype(np.float64) * arrays["SCB"][:, None] / 127
    np.testing.assert_array_max_ulp(dequantize(q), exact.astype(np.float32), maxulp=1)
    assert (q.grid, q.block) == (int_grid(8, True), (1, -1)) and q.codes.load() is not None
    del arrays["weight_format"]
    assert np.array_equal(dequantize(read(arrays, (8, 64), EIGHT)), dequantize(q))


def test_codes_are_read_by_rows() -> None:
    arrays, values = packed((64, 128))
    parts, seen = made.parts(arrays), []
    original = parts["weight"].data

    def watched(start: int, stop: int) -> NDArray[Any]:
        seen.append((start, stop))
        return original.read(start, stop)

    parts["weight"] = replace(parts["weight"], data=replace(original, read=watched))
    found = parse(FOUR).weight(MODULE, parts, (64, 128))
    assert found is not None and isinstance(found.data, QTensor) and seen == []
    assert np.array_equal(dequantize(found.data, 3, 5), values[3:5])
    assert seen == [(192, 320)]


def test_plain_modules_stay_plain() -> None:
    weight = {"weight": np.zeros((4, 64), np.float32)}
    assert parse(FOUR).weight(MODULE, made.parts(weight), (4, 64)) is None


# --- what is refused: the config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bnb_4bit_quant_map": 1},
            r"config\.json: quantization_config has the unknown key 'bnb_4bit_quant_map'",
        ),
        ({"load_in_4bit": False}, r"neither of load_in_4bit and load_in_8bit is true; set the one"),
        ({"load_in_8bit": True}, r"both of load_in_4bit and load_in_8bit are true"),
        ({"load_in_4bit": "yes"}, r"load_in_4bit of quantization_config is 'yes', expected true or false"),
        (
            {"bnb_4bit_quant_storage": "bfloat16"},
            r"bnb_4bit_quant_storage 'bfloat16' .* bnb_4bit_quant_storage uint8",
        ),
        ({"bnb_4bit_quant_type": "af4"}, r"bnb_4bit_quant_type 'af4' is unknown; known are nf4 and fp4"),
        (
            {"llm_int8_skip_modules": "lm_head"},
            r"llm_int8_skip_modules is 'lm_head', expected a list of names",
        ),
        ({"llm_int8_threshold": "6"}, r"llm_int8_threshold is '6', expected a number"),
        (
            {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
            r"llm_int8_has_fp16_weight keeps the weights in 16 bits .* load the model without a quantization_config",
        ),
    ],
)
def test_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, UnsupportedError), match=message):
        parse(FOUR | change)


@settings(max_examples=100, deadline=None)
@given(made.configs(sorted(bnb._KEYS)))
def test_any_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        parse(FOUR | changes)
    except LconvertError as e:
        assert len(str(e)) < 1000


# --- what is refused: the tensors ------------------------------------------------------------------------

Change = Callable[[dict[str, NDArray[Any]]], None]


def state_with(**changes: Any) -> Change:
    def change(arrays: dict[str, NDArray[Any]]) -> None:
        state = json.loads(arrays[STATE + "nf4"].tobytes()) | changes
        arrays[STATE + "nf4"] = as_state({k: v for k, v in state.items() if v is not ...})

    return change


def put(suffix: str, value: Any) -> Change:
    return lambda arrays: arrays.__setitem__(suffix, value)


def drop(suffix: str) -> Change:
    return lambda arrays: arrays.__delitem__(suffix)


def spoil(suffix: str, at: int, value: float) -> Change:
    def change(arrays: dict[str, NDArray[Any]]) -> None:
        arrays[suffix] = arrays[suffix].copy()
        arrays[suffix][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop(STATE + "nf4"),
            rf"{MODULE}: a 4-bit module has one tensor weight\.quant_state.* found none, only weight",
        ),
        (
            put(STATE + "af4", as_state({})),
            r"found \['af4', 'nf4'\]; config\.json and the weights do not belong together",
        ),
        (
            put(STATE + "nf4", as_state(b"{")),
            r"quant_state\.bitsandbytes__nf4: holds no sound JSON; download the file again",
        ),
        (put(STATE + "nf4", as_state(b"[" * 4000)), r"holds no sound JSON"),
        (put(STATE + "nf4", as_state(b"\xff\xfe{")), r"holds no sound JSON"),
        (put(STATE + "nf4", as_state([1])), r"expected a JSON object, found \[1\]"),
        (
            put(STATE + "nf4", as_state(b" " * 5000)),
            r"5000 bytes are too many for a quant_state, 4096 is the most",
        ),
        (state_with(blocksize=48), r"blocksize is 48, expected one of 32, 64, 128"),
        (state_with(blocksize=True), r"blocksize is True, expected one of"),
        (state_with(blocksize=...), r"blocksize is missing, expected one of"),
        (state_with(quant_type="fp4"), r"quant_type is 'fp4', expected 'nf4'"),
        (state_with(dtype="int8"), r"dtype is 'int8', expected one of bfloat16, float16, float32"),
        (state_with(shape=[128, 16]), r"shape is \[128, 16\], expected \[16, 128\], as config\.json implies"),
        (
            state_with(nested_offset=0.5),
            r"unknown key 'nested_offset'; without weight\.nested_absmax it cannot",
        ),
        (
            put("weight", np.zeros((1023, 1), np.uint8)),
            r"tensor weight: has shape \(1023, 1\).* implies \(1024, 1\)",
        ),
        (put("weight", np.zeros((1024, 1), np.int8)), r"tensor weight: is stored as I8, expected U8"),
        (
            put("weight.absmax", np.ones(31, np.float32)),
            r"weight\.absmax: has shape \(31,\).* implies \(32,\)",
        ),
        (
            put("weight.absmax", np.ones(32, np.uint8)),
            r"weight\.absmax: is stored as U8, expected F32 or F16 or BF16",
        ),
        (drop("weight.absmax"), r"the tensor weight\.absmax is missing; the checkpoint is incomplete"),
        (drop("weight.quant_map"), r"the tensor weight\.quant_map is missing"),
        (spoil("weight.quant_map", 3, np.nan), r"weight\.quant_map: holds values that are not finite"),
        (
            spoil("weight.quant_map", 3, 0.5),
            r"quant_map: is not the table of nf4, which bitsandbytes uses whatever",
        ),
        (spoil("weight.absmax", 5, np.inf), r"the scale inf in row 5 is damaged; download the file again"),
        (spoil("weight.absmax", 5, -0.0), r"the scale -0\.0 in row 5 is damaged"),
    ],
)
def test_damaged_tensors_are_refused(change: Change, message: str) -> None:
    arrays, _ = packed((16, 128))
    change(arrays)
    with pytest.raises((InputError, UnsupportedError), match=message):
        dequantize(read(arrays, (16, 128)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (state_with(nested_blocksize=128), r"nested_blocksize is 128, expected 256"),
        (state_with(nested_dtype="bfloat16"), r"nested_dtype is 'bfloat16', expected float32"),
        (state_with(nested_offset=float("nan")), r"nested_offset is nan, expected a finite number"),
        (state_with(nested_offset=...), r"nested_offset is missing, expected a finite number"),
        (
            put("weight.nested_absmax", np.ones(2, np.float32)),
            r"nested_absmax: has shape \(2,\).* implies \(1,\)",
        ),
        (put("weight.absmax", np.ones(32, np.float32)), r"weight\.absmax: is stored as F32, expected U8"),
        (drop("weight.nested_quant_map"), r"the tensor weight\.nested_quant_map is missing"),
        (drop("weight.nested_absmax"), r"unknown key 'nested_blocksize'; without weight\.nested_absmax"),
        (spoil("weight.nested_absmax", 0, np.nan), r"the scale nan in row 0 is damaged"),
    ],
)
def test_damaged_double_quantization_is_refused(change: Change, message: str) -> None:
    arrays, _ = packed((16, 128), double=True)
    change(arrays)
    with pytest.raises((InputError, UnsupportedError), match=message):
        dequantize(read(arrays, (16, 128)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("SCB"), r"the tensor SCB is missing"),
        (put("SCB", np.ones(7, np.float32)), r"SCB: has shape \(7,\)"),
        (put("weight", np.zeros((8, 64), np.uint8)), r"tensor weight: is stored as U8, expected I8"),
        (put("weight_format", np.array(2, np.uint8)), r"weight_format: 2 is a layout for one GPU's kernel"),
        (spoil("SCB", 1, np.nan), r"the scale nan in row 1 is damaged"),
    ],
)
def test_damaged_eight_bits_are_refused(change: Change, message: str) -> None:
    arrays = eight()
    change(arrays)
    with pytest.raises((InputError, UnsupportedError), match=message):
        dequantize(read(arrays, (8, 64), EIGHT))


def test_contradictions_with_the_config() -> None:
    arrays, _ = packed((16, 128))
    with pytest.raises(
        InputError, match=r"up_proj: is stored as nf4, but config\.json has bnb_4bit_quant_type fp4"
    ):
        read(arrays, (16, 128), FOUR | {"bnb_4bit_quant_type": "fp4"})
    for name in ("up_proj", "model.layers.0", MODULE):
        with pytest.raises(InputError, match=r"has it among llm_int8_skip_modules; correct the list"):
            read(arrays, (16, 128), FOUR | {"llm_int8_skip_modules": [name]})
    assert read(arrays, (16, 128), FOUR | {"llm_int8_skip_modules": ["model.layers.0.mlp.up"]}).shape == (
        16,
        128,
    )
    with pytest.raises(InputError, match=r"tensor weight: is stored as U8, expected I8"):
        read(arrays, (16, 128), EIGHT)
    with pytest.raises(UnsupportedError, match=r"of shape \(2, 8, 128\) are not a matrix"):
        parse(FOUR).weight(MODULE, made.parts(arrays), (2, 8, 128))


# --- writing ---------------------------------------------------------------------------------------------


def nested() -> QTensor:
    return read(packed((16, 128), double=True)[0], (16, 128))


def inner(**changes: Any) -> Callable[[QTensor], Held]:
    def change(_: QTensor) -> Held:
        q = nested()
        assert isinstance(q.scale, QTensor)
        return Held(replace(q, scale=replace(q.scale, **changes)))

    return change


_ONES = dense(np.ones((16, 2), np.float32))
_WORDS = r"quantizes scales to 8 bits on a table, with one F32 scale per 256 and one offset for all"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q: Held(q, ActSpec(E4M3, "token", True)),
            r"quantize weights only, this module quantizes its input",
        ),
        (
            lambda q: Held(q, None, Transform("scale", "input", _ONES, folded=False)),
            r"no place for an unfolded scale of the input",
        ),
        (lambda q: Held(replace(q, grid=int_grid(4, True))), r"the 16 values of nf4 or fp4 only"),
        (lambda q: Held(replace(q, zero=_ONES)), r"no zero points, offsets or column orders"),
        (lambda q: Held(replace(q, divisor=True)), r"no zero points, offsets or column orders"),
        (lambda q: Held(replace(q, mask=_ONES)), r"no place for masks, outliers or low-rank"),
        (
            lambda q: Held(replace(q, block=(2, 64))),
            r"groups along the inputs of each row, not blocks of \(2, 64\)",
        ),
        (
            lambda q: Held(replace(q, scale=dense(np.ones((16, 2), np.float16)))),
            r"scales in F32, these are F16; widen them, which is exact",
        ),
        (
            lambda q: Held(
                replace(q, block=(1, 16), scale=dense(np.arange(128, dtype=np.float32).reshape(16, 8)))
            ),
            r"blocks of 32, 64, 128 \.\.\. 4096 values, these groups are 16 wide",
        ),
        (inner(grid=int_grid(8, False)), _WORDS),
        (inner(offset=None), _WORDS),
        (inner(offset=dense(np.arange(16, dtype=np.float32).reshape(16, 1))), _WORDS),
        (
            inner(scale=dense(np.arange(16, dtype=np.float32).reshape(16, 1)), block=(1, -1)),
            r"quantizes scales in runs of 256 over the flattened weight, these runs lie elsewhere",
        ),
    ],
)
def test_what_the_writer_cannot_hold(change: Callable[[QTensor], Held], message: str) -> None:
    held = change(read(packed((16, 128))[0], (16, 128)))
    reason = bnb.Writer().problem(held)
    assert reason is not None and re.search(message, reason), reason


def test_one_group_per_row_is_a_block() -> None:
    """A row of 64 in one group is a block of 64."""
    q = replace(read(packed((16, 64))[0], (16, 64)), block=(1, -1))
    assert bnb.Writer().problem(Held(q)) is None
    state = made.stored_bytes(bnb.Writer().store(Held(q))[STATE + "nf4"])[2]
    assert json.loads(state)["blocksize"] == 64
    assert bnb.Writer().problem(Held(None)) is None and bnb.Writer().store(Held(None)) == {}


def test_groups_that_differ_everywhere_are_not_all_read() -> None:
    """Whether groups of 32 are halves of blocks of 64 is seen in the first rows."""
    q = read(packed((512, 64), 32)[0], (512, 64))
    seen = []
    assert isinstance(q.scale, Tensor)
    original = q.scale

    def watched(start: int, stop: int) -> NDArray[Any]:
        seen.append((start, stop))
        return original.read(start, stop)

    held = Held(replace(q, scale=replace(original, read=watched)))
    assert bnb.Writer().problem(held) is None
    assert seen and max(stop for _, stop in seen) <= 64


def test_config_of_a_model() -> None:
    nf4, fp4 = (Held(read(packed((16, 128), kind=k)[0], (16, 128))) for k in ("nf4", "fp4"))
    writer = bnb.Writer(dtype="float16")
    config = writer.config({MODULE: nf4, "lm_head": Held(None)}, None)
    assert config["load_in_4bit"] and config["bnb_4bit_compute_dtype"] == "float16"
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", False)
    assert config["llm_int8_skip_modules"] == ["lm_head"] and writer.side_files(config) == {}
    assert parse(config).kind == "nf4"
    assert writer.config({MODULE: Held(nested())}, None)["bnb_4bit_use_double_quant"] is True
    with pytest.raises(UnsupportedError, match=r"one type for all modules, this model has fp4 and nf4"):
        writer.config({MODULE: nf4, "model.layers.1.mlp.up_proj": fp4}, None)
    with pytest.raises(
        UnsupportedError, match=r"one type for all modules, this model has no quantized module"
    ):
        writer.config({MODULE: Held(None)}, None)
    with pytest.raises(
        UnsupportedError, match=r"would skip model\.layers\.0\.mlp\.up_proj along with the plain up_proj"
    ):
        writer.config({MODULE: nf4, "up_proj": Held(None)}, None)
    static = ActSpec(E4M3, "tensor", False)
    with pytest.raises(UnsupportedError, match=r"no words for a quantized KV cache"):
        writer.config({MODULE: nf4}, KVSpec(static, static))


_LOADS = """
import hashlib, json, sys, torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
out = {}
for name, module in model.named_modules():
    if isinstance(module, Linear4bit):
        module.weight.quant_state.dtype = torch.float32
        w = dequantize_4bit(module.weight.data, module.weight.quant_state) + 0
        out[name] = hashlib.sha256(w.numpy().tobytes()).hexdigest()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
finite = bool(torch.isfinite(model(torch.arange(3, 19)[None]).logits).all())
print(json.dumps({"weights": out, "finite": finite}))
"""


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    """Quantized here to nf4: bitsandbytes dequantizes every weight to the same bits."""
    python = os.environ.get(ENVIRONMENT) or (sys.executable if find_spec("bitsandbytes") else None)
    if python is None:
        pytest.skip(f"bitsandbytes is not installed; {ENVIRONMENT} may name an interpreter that has it")
    original = lconvert.read(write_llama(tmp_path / "model", num_hidden_layers=1))
    model = rtn.run(original, rtn.Options(grid="nf4", group=64))
    execute(checkpoint.plan(model, checkpoint.Options(format="bitsandbytes"), original), tmp_path / "out")
    offline = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | offline
    done = subprocess.run(
        [python, "-P", "-c", _LOADS, str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    written = lconvert.read(tmp_path / "out")
    expected = {
        e.provenance[0].split()[0]: hashlib.sha256((dequantize(e.data) + np.float32(0)).tobytes()).hexdigest()
        for e in written.entries.values()
        if isinstance(e.data, QTensor)
    }
    assert len(expected) == 7 and found == {"weights": expected, "finite": True}
