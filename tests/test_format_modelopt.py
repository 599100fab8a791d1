"""ModelOpt's unified checkpoints: values as ModelOpt's own classes compute them, its packing, its files, bad input.

The fingerprints of `GOLDEN` come from ModelOpt 0.47: the bytes of `noise` through `NVFP4QTensor`, `MXFP4QTensor`,
`MXFP8QTensor`, `FP8QTensor.dequantize` and `from_quantized_weight` in fp32, or through `pack_int4_in_uint8`. Its E2M1
table has one zero, so negative zeros are compared as zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lconvert.converters.hf_quantized import part
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import safetensors
from lconvert.formats.json_object import read_object
from lconvert.formats.modelopt import ModelOpt, Writer, parse
from lconvert.formats.modelopt_config import ALGORITHMS, SERVED, excluder
from lconvert.formats.scheme import Checkpoint, Held, Part, Weight, find
from lconvert.ir import (
    E2M1,
    E4M3,
    ActSpec,
    Entry,
    KVSpec,
    QTensor,
    Tensor,
    Transform,
    as_f32,
    dense,
    int_grid,
)
from lconvert.kernels.qtensor import dequantize, effective
from tests.conftest import ROOT, SHARED
from tests.int_checkpoints import fingerprint, noise
from tests.int_checkpoints import parts as parts_of

PEERS = sorted(p.parent for p in (ROOT / "tests" / "fixtures" / "peers").glob("modelopt-*/oracle.json"))
MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLS = 32, 128
WRITER = Writer()
Tensors = dict[str, tuple[str, NDArray[Any]]]


def sound(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """E4M3 bytes without NaN."""
    return np.where((codes & 0x7F) == 0x7F, codes ^ 1, codes).astype(np.uint8)


PAIRS = noise(ROWS * COLS // 2, 1).reshape(ROWS, -1)
BLOCK_SCALES = sound(noise(ROWS * COLS // 16, 2) & 0x7F).reshape(ROWS, -1)
EXPONENTS = (noise(ROWS * COLS // 32, 3) % 40 + 100).astype(np.uint8).reshape(ROWS, -1)
BYTES = sound(noise(ROWS * COLS, 4)).reshape(ROWS, COLS)
CHANNELS = (noise(ROWS, 5).astype(np.float32) + 1) / np.float32(977)
SQUARES = ((noise(16, 6).astype(np.float32) + 1) / np.float32(977)).reshape(2, 8)
INTS = (noise(ROWS * COLS, 7) & 15).astype(np.int8).reshape(ROWS, COLS) - np.int8(8)
GROUPS = ((noise(ROWS * COLS // 32, 8).astype(np.float32) + 1) / np.float32(977)).reshape(ROWS, -1)
PACKED = ((INTS[1::2].view(np.uint8) & 15) << 4 | INTS[::2].view(np.uint8) & 15).astype(np.uint8)
ONE = np.array(0.0123, np.float32)
GLOBAL = np.array(0.000173, np.float32)
INPUT = np.array(0.031, np.float32)
SMOOTH = (0x3F80 + noise(COLS, 10).astype(np.uint16)).astype(np.uint16)  # BF16 from 1 to 4


def floats(scale: NDArray[Any] = ONE) -> Tensors:
    return {"weight": ("F8_E4M3", BYTES), "weight_scale": ("F32", scale)}


FP4: Tensors = {
    "weight": ("U8", PAIRS),
    "weight_scale": ("F8_E4M3", BLOCK_SCALES),
    "weight_scale_2": ("F32", GLOBAL),
}
INT8: Tensors = {"weight": ("I8", BYTES.view(np.int8)), "weight_scale": ("F32", CHANNELS)}
INT4: Tensors = {"weight": ("U8", PACKED), "weight_scale": ("F32", GROUPS)}
STATIC: Tensors = {"input_scale": ("F32", INPUT)}
PRE: Tensors = {"pre_quant_scale": ("BF16", SMOOTH)}

#: quant_algo -> what the module stores.
STORED: Mapping[str, Tensors] = {
    "FP8": floats() | STATIC,
    "FP8_PER_CHANNEL_PER_TOKEN": floats(CHANNELS),
    "FP8_PB_WO": floats(SQUARES[:, None, :, None]),
    "W8A16": INT8,
    "W8A8_SQ_PER_CHANNEL": INT8 | STATIC | PRE,
    "W4A16_AWQ": INT4 | PRE,
    "W4A8_AWQ": INT4 | STATIC | PRE | {"weight_scale_2": ("F32", GLOBAL)},
    "NVFP4": FP4 | STATIC,
    "NVFP4_AWQ": FP4 | STATIC | PRE,
    "W4A16_NVFP4": FP4,
    "W4A8_NVFP4_FP8": FP4 | STATIC | {"weight_scale": ("F8_E4M3", BLOCK_SCALES[:, :4])},
    "mxfp4": {"weight": ("U8", PAIRS), "weight_scale": ("U8", EXPONENTS)},
    "W4A8_MXFP4_FP8": {"weight": ("U8", PAIRS), "weight_scale": ("U8", EXPONENTS)},
    "MXFP8": {"weight": ("F8_E4M3", BYTES), "weight_scale": ("U8", EXPONENTS)},
}
SIZES = {"FP8_PB_WO": 16, "W4A16_AWQ": 32, "W4A8_AWQ": 32}
GOLDEN = {
    "FP8": "305938afeb971df3",
    "FP8_PER_CHANNEL_PER_TOKEN": "083b8865b3f4f9f9",
    "FP8_PB_WO": "5fdb154c8f8ee2ae",
    "W8A16": "0b4f7253c2e183b9",
    "W8A8_SQ_PER_CHANNEL": "0b4f7253c2e183b9",
    "NVFP4": "04c739e60b0aacc2",
    "NVFP4_AWQ": "04c739e60b0aacc2",
    "W4A16_NVFP4": "04c739e60b0aacc2",
    "W4A8_NVFP4_FP8": "63a4366fd691dc89",
    "mxfp4": "2d33f62c55ede453",
    "W4A8_MXFP4_FP8": "2d33f62c55ede453",
    "MXFP8": "c4f03f3d3e97314d",
}
GOLDEN_INT4 = "887f18db639d1d76"


def scheme(folder: Path = Path("nowhere"), **config: Any) -> ModelOpt:
    found = find(Checkpoint("config.json", {"quant_method": "modelopt"} | config, folder))
    assert isinstance(found, ModelOpt)
    return found


def read(algo: str, tensors: Tensors, shape: tuple[int, int] = (ROWS, COLS), **config: Any) -> Weight:
    """The module, all of whose numbers are read."""
    size = {"group_size": SIZES[algo]} if algo in SIZES else {}
    found = scheme(**({"quant_algo": algo} | size | config)).weight(MODULE, parts_of(tensors), shape)
    assert found is not None
    assert isinstance(found.data, QTensor)
    assert found.used | found.inert == tensors.keys()
    dequantize(found.data)
    for side in (found.activation and found.activation.scale, found.transform and found.transform.param):
        if side is not None:
            side.load()
    return found


def held(weight: Weight) -> Held:
    assert isinstance(weight.data, QTensor)
    return Held(weight.data, weight.activation, weight.transform)


def quantized(algo: str) -> QTensor:
    data = read(algo, STORED[algo]).data
    assert isinstance(data, QTensor)
    return data


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", GOLDEN)
def test_values_are_those_of_modelopt(algo: str) -> None:
    x = dequantize(quantized(algo))
    assert fingerprint(x + np.float32(0)) == GOLDEN[algo]


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ"])
def test_int4_is_packed_as_modelopt_packs_it(algo: str) -> None:
    """`pack_int4_in_uint8` of codes * scales gave these bytes; they are read as the codes and scales."""
    assert fingerprint(STORED[algo]["weight"][1]) == GOLDEN_INT4
    q = quantized(algo)
    assert np.array_equal(q.codes.load(), INTS)
    assert np.array_equal(dequantize(q), INTS.astype(np.float32) * np.repeat(GROUPS, 32, axis=1))
    assert WRITER.store(Held(q, read(algo, STORED[algo]).activation))["weight"].read(
        0, ROWS // 2
    ).tobytes() == (PACKED.tobytes())


def test_e4m3_is_that_of_torch() -> None:
    x = torch.from_numpy(BYTES.copy()).view(torch.float8_e4m3fn).to(torch.float32) * float(ONE)
    assert np.array_equal(dequantize(quantized("FP8")), x.numpy())


@pytest.mark.parametrize("algo", STORED)
def test_slabs_of_rows_are_rows_of_the_whole(algo: str) -> None:
    q = quantized(algo)
    whole = dequantize(q)
    for start, stop in ((0, 1), (3, 4), (5, 10), (31, 32), (7, 7), (0, 32)):
        if q.block[0] in (1, -1):
            assert np.array_equal(dequantize(q, start, stop), whole[start:stop])
        codes = q.codes.read(start, stop)
        assert codes.tobytes() == q.codes.load()[start:stop].tobytes()


ACTIVATIONS = {
    "FP8": ("tensor", False, E4M3, None),
    "FP8_PER_CHANNEL_PER_TOKEN": ("token", True, E4M3, None),
    "FP8_PB_WO": ("group", True, E4M3, 128),
    "W8A8_SQ_PER_CHANNEL": ("tensor", False, int_grid(8, True), None),
    "W4A8_AWQ": ("tensor", False, E4M3, None),
    "NVFP4": ("group", True, E2M1, 16),
    "W4A8_NVFP4_FP8": ("tensor", False, E4M3, None),
    "MXFP8": ("group", True, E4M3, 32),
    "W4A8_MXFP4_FP8": ("tensor", True, E4M3, None),
}


@pytest.mark.parametrize("algo", STORED)
def test_activations(algo: str) -> None:
    found = read(algo, STORED[algo]).activation
    wanted = ACTIVATIONS.get("NVFP4" if algo == "NVFP4_AWQ" else algo)
    assert (found and (found.per, found.dynamic, found.grid, found.group)) == wanted
    if "input_scale" in STORED[algo]:
        assert found is not None and found.scale is not None
        assert found.scale.shape == (1,)
        assert found.scale.load()[0] == INPUT


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_unfolded_scale_of_the_input_is_never_lost(algo: str) -> None:
    """y = W (x * pre_quant_scale), whatever the algorithm and whether the configuration mentions it."""
    name = "mxfp4" if algo == "MXFP4" else algo
    found = read(name, STORED[name] | PRE)
    assert found.transform is not None and not found.transform.folded
    entry = Entry(MODULE, found.data, found.activation, found.transform)
    assert np.array_equal(effective(entry), dequantize(quantized(name)) * as_f32(SMOOTH, "BF16"))


def test_a_plain_module_with_a_scale_of_its_input_is_refused() -> None:
    tensors: Tensors = {"weight": ("BF16", np.zeros((ROWS, COLS), np.uint16))} | PRE
    with pytest.raises(
        InputError, match=r"is stored as pre_quant_scale, weight, but config.json excludes it by"
    ):
        scheme(quant_algo="NVFP4", ignore=[MODULE]).weight(MODULE, parts_of(tensors), (ROWS, COLS))
    with pytest.raises(InputError, match="is stored as BF16, expected U8"):
        scheme(quant_algo="NVFP4").weight(MODULE, parts_of(tensors), (ROWS, COLS))


def test_scales_of_weights_may_be_stored_in_less() -> None:
    """TensorRT-LLM has seen weight_scale_2 in BF16 (`NVFP4LinearMethod.load_weight_scales`); the type is kept."""
    q = read("NVFP4", STORED["NVFP4"] | {"weight_scale_2": ("BF16", np.array([0x3A00], np.uint16))}).data
    assert isinstance(q, QTensor) and isinstance(q.scale, QTensor) and isinstance(q.scale.scale, Tensor)
    assert q.scale.scale.dtype == "BF16" and q.scale.scale.shape == (1, 1)


def test_the_group_size_is_read_off_the_scales_where_no_file_tells_it() -> None:
    """config.json of ModelOpt 0.47 does not state it for W4A16_AWQ."""
    found = read("W4A16_AWQ", STORED["W4A16_AWQ"], group_size=None)
    assert isinstance(found.data, QTensor) and found.data.block == (1, 32)


def test_a_dynamic_scale_of_the_input() -> None:
    """Without input_scale TensorRT-LLM finds it for each input (`FP8QDQLinearMethod.apply`)."""
    found = read("FP8", floats()).activation
    assert found is not None and found.dynamic and found.scale is None


def test_an_input_scale_of_weight_only_nvfp4_is_inert() -> None:
    assert read("W4A16_NVFP4", STORED["NVFP4"]).inert == {"input_scale"}


# --- the peers' files ------------------------------------------------------------------------------------


def modules_of(folder: Path) -> tuple[ModelOpt, dict[str, dict[str, Part]]]:
    file = safetensors.read_header(folder / "model.safetensors")
    config = read_object(folder / "config.json")["quantization_config"]
    found = parse(Checkpoint(str(folder / "config.json"), config, folder))
    assert isinstance(found, ModelOpt)
    modules: dict[str, dict[str, Part]] = {}
    for name, info in file.tensors.items():
        module, _, suffix = name.rpartition(".")
        if "norm" not in name and not suffix.startswith(("k_", "v_")):
            modules.setdefault(module, {})[suffix] = part(file, info)
    return found, modules


def same_bytes(module: str, found: Weight, parts: Mapping[str, Part], writer: Writer = WRITER) -> None:
    assert writer.problem(held(found)) is None
    out = writer.store(held(found))
    assert out.keys() == parts.keys()
    for suffix, stored in out.items():
        there = parts[suffix]
        shape = (
            stored.shape if there.shape or stored.shape != (1, 1, 1, 1) else ()
        )  # a single block of FP8_PB_WO
        assert (stored.dtype, shape) == (there.dtype, there.shape), f"{module}.{suffix}"
        rows = stored.shape[0] if stored.shape else 1
        half = rows // 2
        wrote = stored.read(0, half).tobytes() + stored.read(half, rows).tobytes()
        assert wrote == there.data.load().tobytes(), f"{module}.{suffix}"


@pytest.mark.parametrize(
    ("name", "least", "most"), [("mo_NVFP4_DEFAULT_CFG", 0.09, 0.1), ("mo_INT4_AWQ_CFG", 0.11, 0.14)]
)
def test_checkpoints_of_a_trained_model(name: str, least: float, most: float) -> None:
    """Close to the model they were made of, stored again byte for byte, described as ModelOpt describes them."""
    folder, model = SHARED / "checkpoints" / name, SHARED / "models" / "wiki-mistral"
    if not folder.exists():
        pytest.skip("the shared checkpoints are not there")
    found, modules = modules_of(folder)
    base = safetensors.read_header(model / "model.safetensors")
    all_held: dict[str, Held] = {}
    for module, parts in modules.items():
        plain = safetensors.tensor(base, f"{module}.weight")
        weight = found.weight(module, parts, plain.shape)
        if weight is None:
            assert module in ("lm_head", "model.embed_tokens")
            all_held[module] = Held(None)
            continue
        y = as_f32(plain.load(), plain.dtype)
        x = effective(Entry(module, weight.data, weight.activation, weight.transform))
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert least < error < most
        if weight.transform is not None:
            lost = effective(Entry(module, weight.data))
            assert np.linalg.norm(lost - y) / np.linalg.norm(y) > 1.03 * error
        same_bytes(module, weight, parts)
        all_held[module] = held(weight)
    described_as(folder, WRITER.config(all_held, None))


def described_as(folder: Path, config: Mapping[str, Any]) -> None:
    """Equal to ModelOpt's files, but for the producer, the case of a name, and the keys that ModelOpt leaves out."""
    theirs = read_object(folder / "config.json")["quantization_config"]
    extra = {"group_size", "has_zero_point", "pre_quant_scale"} - theirs.keys()
    mine = {k: v for k, v in config.items() if k not in extra}
    side = WRITER.side_files(config)["hf_quant_config.json"]
    for found in (mine, theirs):
        found["producer"], found["quant_algo"] = None, str(found["quant_algo"]).upper()
        found["ignore"] = [n for n in found["ignore"] if n != "model.embed_tokens"]
        groups = found.get("config_groups", {})  # numbered in the order of the modules
        found["config_groups"] = sorted(groups.values(), key=lambda g: str(g["targets"]))
    assert mine == theirs
    there = read_object(folder / "hf_quant_config.json")["quantization"]
    there["quant_algo"] = str(there["quant_algo"]).upper()
    for inner in (there, side["quantization"]):
        if "exclude_modules" in inner:
            inner["exclude_modules"] = [n for n in inner["exclude_modules"] if n != "model.embed_tokens"]
    assert side["quantization"] == there


def same_values(x: NDArray[np.float32], q: QTensor, oracle: Mapping[str, Any]) -> None:
    """All of them by their hash, whose zeros may have lost their sign; integers, whose zeros gained one, by a sample."""
    sample = x.reshape(-1)[(np.arange(len(oracle["sample"])) * 7919) % x.size]
    assert sample.tolist() == oracle["sample"]
    if q.grid.kind == "float":
        assert oracle["sha256"] in (fingerprint(x, 64), fingerprint(x + np.float32(0), 64))


@pytest.mark.parametrize("folder", PEERS, ids=lambda p: p.name)
def test_peers_checkpoints(folder: Path) -> None:
    """What ModelOpt wrote is what ModelOpt computes from it, and is stored again byte for byte."""
    oracle = json.loads((folder / "oracle.json").read_text())["tensors"]
    if folder.name == "modelopt-nvfp4-svdquant":
        with pytest.raises(UnsupportedError, match="low-rank"):
            modules_of(folder)
        return
    found, modules = modules_of(folder)
    assert oracle.keys() <= modules.keys()
    all_held: dict[str, Held] = {}
    for module, parts in modules.items():
        shape = tuple(oracle[module]["shape"]) if module in oracle else parts["weight"].shape
        weight = found.weight(module, parts, shape)
        assert (weight is not None) == (module in oracle)
        if weight is None:
            all_held[module] = Held(None)
            continue
        assert isinstance(weight.data, QTensor)
        assert weight.used | weight.inert == parts.keys()
        same_values(dequantize(weight.data), weight.data, oracle[module])
        all_held[module] = held(weight)
        if WRITER.problem(held(weight)) is None:
            ranged = parts["weight_scale_2"].data.load() if found.settings.algo == "W4A8_AWQ" else None
            same_bytes(module, weight, parts, WRITER if ranged is None else Writer(float(ranged)))
    written = {ALGORITHMS[n] for n in ("MXFP4", "W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8")}
    if any(WRITER.problem(h) for h in all_held.values()):
        assert ALGORITHMS[str(found.settings.algo)] in written
    elif found.settings.kv != "NVFP4":
        described_as(folder, WRITER.config(all_held, found.kv))


# --- the configuration -----------------------------------------------------------------------------------


def nested(**inner: Any) -> dict[str, Any]:
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}


def test_both_files_are_one_description(tmp_path: Path) -> None:
    side = nested(
        quant_algo="W4A16_AWQ", kv_cache_quant_algo=None, group_size=32, exclude_modules=["lm_head"]
    )
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(side))
    found = scheme(tmp_path, quant_algo="W4A16_AWQ", ignore=["lm_head"])
    assert found.settings.group == 32
    assert found.method == "ModelOpt W4A16_AWQ, group 32"
    alone = parse(
        Checkpoint(str(tmp_path / "hf_quant_config.json"), side | {"quant_method": "modelopt"}, tmp_path)
    )
    assert isinstance(alone, ModelOpt)
    assert replace(alone.settings, where="") == replace(found.settings, where="")


@pytest.mark.parametrize(
    ("flat", "inner", "message"),
    [
        (
            {"quant_algo": "FP8"},
            {"quant_algo": "NVFP4"},
            "quant_algo is 'FP8' in the first and 'NVFP4' in the second",
        ),
        ({"group_size": 64}, {"group_size": 128}, "group_size is 64 in the first and 128"),
        ({"ignore": ["a"]}, {"exclude_modules": ["b"]}, "the list of excluded modules is"),
        (
            {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            {"kv_cache_quant_algo": "INT8"},
            "the KV cache's algorithm is 'FP8' in the first and 'INT8'",
        ),
    ],
)
def test_files_that_disagree(
    tmp_path: Path, flat: dict[str, Any], inner: dict[str, Any], message: str
) -> None:
    both = {"quant_algo": "W4A16_AWQ"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(nested(**(both | inner))))
    with pytest.raises(InputError, match=message) as e:
        scheme(tmp_path, **(both | flat))
    assert "config.json and " in str(e.value) and str(tmp_path / "hf_quant_config.json") in str(e.value)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"quant_algo": "NVFP4_SVD"}, UnsupportedError, "low-rank product .* export the model with NVFP4"),
        ({"quant_algo": "W4A16_GPTQ"}, UnsupportedError, "unknown quant_algo 'W4A16_GPTQ'; known are FP8, "),
        (
            {"quant_algo": "FP8", "group_size": "128"},
            InputError,
            "group_size '128' must be a positive whole number",
        ),
        ({"quant_algo": "FP8", "group_size": True}, InputError, "group_size True must be"),
        ({"quant_algo": "FP8", "ignore": "lm_head"}, InputError, "ignore is 'lm_head', expected a list"),
        ({"quant_algo": "FP8", "ignore": [3]}, InputError, "expected a list of names"),
        (
            {"quant_algo": "FP8", "clamp_val": [1, 2]},
            UnsupportedError,
            "key 'clamp_val' = .1, 2. is not one that",
        ),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, UnsupportedError, "stores no zero points"),
        ({"quant_algo": "FP8", "kv_cache_scheme": "NVFP4_AFFINE"}, UnsupportedError, "k_bias and v_bias"),
        (
            {"quant_algo": "FP8", "kv_cache_scheme": "FP4"},
            UnsupportedError,
            "unknown KV cache algorithm 'FP4'",
        ),
        (
            {"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 6, "type": "float"}},
            UnsupportedError,
            "unknown kv_cache_scheme",
        ),
        ({"quant_algo": "MIXED_PRECISION"}, InputError, "MIXED_PRECISION without quantized_layers"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": [1]}, InputError, "expected an object"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}},
            InputError,
            "quantized_layers 'a': {} names no quant_algo",
        ),
        ({"quantization": 3}, InputError, "quantization is 3, expected an object"),
        ({}, InputError, "neither quant_algo nor a KV cache algorithm"),
    ],
)
def test_configurations_that_cannot_be_read(
    config: dict[str, Any], kind: type[LconvertError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        scheme(**config)


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({"num_bits": 8, "type": "float", "dynamic": False}, ActSpec(E4M3, "tensor", False)),
        ("INT8", ActSpec(int_grid(8, True), "tensor", False)),
        ("NVFP4", ActSpec(E2M1, "group", True, 16)),
    ],
)
def test_kv_caches(stated: Any, wanted: ActSpec) -> None:
    assert scheme(quant_algo="FP8", kv_cache_scheme=stated).kv == KVSpec(wanted, wanted)
    only = scheme(kv_cache_scheme=stated)
    assert only.kv == KVSpec(wanted, wanted)
    assert only.weight(MODULE, parts_of({"weight": ("BF16", np.zeros((2, 4), np.uint16))}), (2, 4)) is None


def test_mixed_precision() -> None:
    layers = {
        MODULE: {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.mlp.experts": {"quant_algo": "FP8"},
    }
    found = scheme(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    here = found.weight(MODULE, parts_of(STORED["NVFP4"]), (ROWS, COLS))
    assert here is not None and isinstance(here.data, QTensor) and here.data.grid == E2M1
    expert = found.weight("model.layers.1.mlp.experts.3.up_proj", parts_of(STORED["FP8"]), (ROWS, COLS))
    assert expert is not None and isinstance(expert.data, QTensor) and expert.data.grid == E4M3
    with pytest.raises(InputError, match=r"config\.json does not list it as quantized"):
        found.weight("model.layers.2.mlp.up_proj", parts_of(STORED["FP8"]), (ROWS, COLS))
    plain = parts_of({"weight": ("BF16", np.zeros((2, 4), np.uint16))})
    assert found.weight("model.layers.2.mlp.up_proj", plain, (2, 4)) is None
    with pytest.raises(InputError, match=r"plain BF16, but config\.json lists it as quantized"):
        found.weight(MODULE, plain, (2, 4))


def test_mixed_precision_of_older_releases(tmp_path: Path) -> None:
    listed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {MODULE: {"quant_algo": "FP8"}}}
    (tmp_path / "quant_cfg.json").write_text(json.dumps(listed))
    found = scheme(tmp_path, quant_algo="MIXED_PRECISION")
    assert found.settings.layers == {MODULE: ("FP8", None)}
    assert scheme(tmp_path, quant_algo="FP8").settings.layers is None


def test_nvfp4_without_quantized_inputs_is_weight_only() -> None:
    """As vLLM reads it (`ModelOptNvFp4Config._from_config`)."""
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    found = scheme(quant_algo="NVFP4", config_groups={"group_0": group})
    assert (found.settings.algo, found.settings.group) == ("W4A16_NVFP4", 16)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("lm_head", "lm_head", "model.lm_head2"),
        ("model.layers.0.*", "model.layers.0.mlp.up_proj", "model.layers.01.mlp.up_proj"),
        ("model.layers.0.*", "model.layers.0", "model.layers.1"),
        ("model.layers.1*", "model.layers.17.mlp", "model.layers.2.mlp"),
        ("model.layers.1", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        ("*router*", "model.layers.0.mlp.router", "model.layers.0.mlp.up_proj"),
    ],
)
def test_excluded_modules(pattern: str, inside: str, outside: str) -> None:
    excluded = excluder((pattern,))
    assert excluded(inside) == pattern
    assert excluded(outside) is None


@given(st.lists(st.text("ab.*?[", max_size=8), max_size=4), st.text("ab.", max_size=12))
def test_excluded_as_fnmatch_of_a_module_or_its_parents(patterns: list[str], name: str) -> None:
    from fnmatch import fnmatchcase

    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    wanted = any(fnmatchcase(n, p) or n == p.removesuffix(".*") for n in above for p in patterns)
    assert (excluder(tuple(patterns))(name) is not None) == wanted


# --- tensors that contradict it --------------------------------------------------------------------------

BAD: list[tuple[str, Tensors, str]] = [
    ("NVFP4", {"weight": ("U8", PAIRS)}, "the tensor weight_scale is missing"),
    ("NVFP4", {k: v for k, v in FP4.items() if k != "weight_scale_2"}, "weight_scale_2 is missing"),
    ("NVFP4", FP4 | {"weight": ("I8", PAIRS.view(np.int8))}, "weight: is stored as I8, expected U8"),
    ("NVFP4", FP4 | {"weight": ("U8", PAIRS[:, :-1])}, r"has shape \(32, 63\), but .* implies \(32, 64\)"),
    ("NVFP4", FP4 | {"weight_scale": ("F32", GROUPS)}, "weight_scale: is stored as F32, expected F8_E4M3"),
    ("NVFP4", FP4 | {"weight_scale": ("F8_E4M3", BLOCK_SCALES | 0x7F)}, "row 0 holds a NaN"),
    ("NVFP4", FP4 | {"weight_scale": ("F8_E4M3", BLOCK_SCALES & 0 | 0x80)}, "row 0 is negative zero"),
    ("NVFP4", FP4 | {"weight_scale_2": ("F32", np.array(np.nan, np.float32))}, "weight_scale_2: the scale nan is damaged"),
    ("NVFP4", FP4 | {"weight_scale_2": ("F32", np.array([1, 2], np.float32))}, r"has shape \(2,\)"),
    ("NVFP4", STORED["NVFP4"] | {"input_scale": ("F32", np.array(-1, np.float32))}, "the scale -1.0 is damaged"),
    ("FP8", floats() | {"weight": ("F8_E5M2", BYTES)}, "is stored as F8_E5M2, expected F8_E4M3"),
    ("FP8", floats() | {"weight": ("F8_E4M3", BYTES | 0x7F)}, "row 0 holds a NaN"),
    ("FP8", floats(CHANNELS), r"has shape \(32,\), but the configuration implies \(\)"),
    ("FP8", floats(np.array(0, np.float32)), "the scale 0.0 is damaged, it must be positive"),
    ("FP8_PER_CHANNEL_PER_TOKEN", floats(CHANNELS[:-1]), r"has shape \(31,\)"),
    ("FP8_PER_CHANNEL_PER_TOKEN", floats(np.where(CHANNELS > 0.1, -0.0, CHANNELS)), "the scale -0.0 in row .* is damaged"),
    ("FP8_PB_WO", floats(np.array(1, np.float32)), r"is one number, but there are \(2, 8\) blocks"),
    ("MXFP8", STORED["MXFP8"] | {"weight_scale": ("U8", EXPONENTS | 0xFF)}, "a scale in row 0 is NaN"),
    ("W8A8_SQ_PER_CHANNEL", INT8, "the tensor input_scale is missing"),
    ("W4A16_AWQ", INT4 | {"weight": ("U8", np.concatenate([PACKED, PACKED]))}, r"has shape \(32, 128\), but .* \(16, 128\)"),
    ("W4A16_AWQ", INT4 | {"weight_scale": ("F32", GROUPS[:, :2])}, r"has shape \(32, 2\), but .* implies \(32, 4\)"),
    ("W4A16_AWQ", INT4 | {"weight_scale": ("F32", GROUPS * np.float32(np.inf))}, "the scale inf in row 0 is damaged"),
    ("W4A16_AWQ", INT4 | {"pre_quant_scale": ("BF16", SMOOTH[:-1])}, r"has shape \(127,\)"),
    ("W4A16_AWQ", INT4 | {"pre_quant_scale": ("BF16", SMOOTH * 0)}, "the scale 0.0 at 0 is damaged, it must be positive"),
    ("W4A8_AWQ", INT4 | STATIC, "weight_scale_2 is missing"),
    ("W4A8_AWQ", STORED["W4A8_AWQ"] | {"weight_scale_2": ("F32", np.array(np.inf, np.float32))}, "the scale inf is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("algo", "tensors", "message"), BAD, ids=[f"{a}-{m[:30]}" for a, _, m in BAD])
def test_tensors_that_contradict_the_configuration(algo: str, tensors: Tensors, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(algo, tensors)


def test_shapes_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="24 input features do not divide into groups of 16"):
        read("NVFP4", STORED["NVFP4"], (32, 24))
    with pytest.raises(InputError, match="31 output features do not pair up in bytes"):
        read("W4A16_AWQ", STORED["W4A16_AWQ"], (31, 128))
    with pytest.raises(InputError, match="128 input features do not divide into groups of 48"):
        read("W4A16_AWQ", STORED["W4A16_AWQ"], group_size=48)
    with pytest.raises(UnsupportedError, match="NVFP4 in groups of 32; NVFP4 has groups of 16"):
        read("NVFP4", STORED["NVFP4"], group_size=32)
    with pytest.raises(InputError, match=r"neither hf_quant_config\.json nor the scales tell the group size"):
        read("W4A16_AWQ", INT4 | {"weight_scale": ("F32", GROUPS[:, :3])}, group_size=None)


def test_an_excluded_module_that_is_quantized() -> None:
    with pytest.raises(
        InputError, match=r"excludes it by 'model.layers.0\*'; the two do not belong together"
    ):
        read("NVFP4", STORED["NVFP4"], ignore=["lm_head", "model.layers.0*"])


def test_a_tensor_that_nobody_explains_is_left_over() -> None:
    found = scheme(quant_algo="FP8").weight(
        MODULE, parts_of(STORED["FP8"] | {"svdquant_lora_a": INT8["weight"]}), (32, 128)
    )
    assert found is not None and "svdquant_lora_a" not in found.used | found.inert


# --- writing ---------------------------------------------------------------------------------------------

WRITTEN = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A16", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4", "NVFP4_AWQ",
    "W4A16_NVFP4", "MXFP8",
)  # fmt: skip


@pytest.mark.parametrize("algo", WRITTEN)
def test_what_is_read_is_written_byte_for_byte(algo: str) -> None:
    writer = Writer(float(GLOBAL)) if algo == "W4A8_AWQ" else WRITER
    found = read(algo, STORED[algo])
    assert writer.algorithm(held(found)) == algo
    same_bytes(MODULE, found, parts_of(STORED[algo]), writer)
    if "pre_quant_scale" in STORED[algo]:
        without = {k: v for k, v in STORED[algo].items() if k != "pre_quant_scale"}
        same_bytes(MODULE, read(algo, without), parts_of(without), writer)


def test_blocks_of_fp8_are_written_as_both_loaders_want_them() -> None:
    q = quantized("FP8")
    scale = dense(np.arange(1, 7, dtype=np.float32).reshape(3, 2))
    codes = dense(np.zeros((300, 256), np.uint8))
    blocks = Held(
        replace(q, shape=(300, 256), codes=codes, block=(128, 128), scale=scale),
        ActSpec(E4M3, "group", True, 128),
    )
    assert WRITER.problem(blocks) is None
    stored = WRITER.store(blocks)["weight_scale"]
    assert stored.shape == (3, 1, 2, 1)
    assert stored.read(1, 3).reshape(-1).tolist() == [3, 4, 5, 6]
    config = WRITER.config({MODULE: blocks}, None)
    assert "group_size" not in WRITER.side_files(config)["hf_quant_config.json"]["quantization"]


def test_w4a8_awq_gets_a_range_in_which_its_values_fit_fp8() -> None:
    found = read("W4A8_AWQ", STORED["W4A8_AWQ"])
    q = found.data
    assert isinstance(q, QTensor)
    got = WRITER.store(held(found))["weight_scale_2"].read(0, 1)[0]
    assert got == np.abs(dequantize(q)).max() / np.float32(448)
    nothing = replace(q, codes=dense(np.zeros((ROWS, COLS), np.int8)))
    assert WRITER.store(replace(held(found), weight=nothing))["weight_scale_2"].read(0, 1)[0] == 1


@pytest.mark.parametrize("algo", WRITTEN)
@pytest.mark.parametrize("kv", [None, KVSpec(ActSpec(E4M3, "tensor", False), ActSpec(E4M3, "tensor", False))])
def test_what_is_written_is_described_and_read_back(algo: str, kv: KVSpec | None, tmp_path: Path) -> None:
    found = read(algo, STORED[algo])
    config = WRITER.config({MODULE: held(found), "lm_head": Held(None)}, kv)
    for name, content in WRITER.side_files(config).items():
        (tmp_path / name).write_text(json.dumps(content))
    back = find(Checkpoint("config.json", json.loads(json.dumps(config)), tmp_path))
    assert isinstance(back, ModelOpt)
    assert back.settings.algo == algo
    assert back.kv == kv
    again = back.weight(MODULE, parts_of(STORED[algo]), (ROWS, COLS))
    assert again is not None and isinstance(again.data, QTensor) and isinstance(found.data, QTensor)
    assert (again.data.block, again.data.grid) == (found.data.block, found.data.grid)
    with pytest.raises(InputError, match="excludes it by 'lm_head'"):
        back.weight("lm_head", parts_of(STORED[algo]), (ROWS, COLS))


def test_mixed_precision_is_described_and_read_back() -> None:
    modules = {
        "model.layers.0.mlp.up_proj": held(read("FP8", STORED["FP8"])),
        "model.layers.0.mlp.down_proj": held(read("W4A16_AWQ", STORED["W4A16_AWQ"])),
        "lm_head": Held(None),
    }
    config = WRITER.config(modules, None)
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == {
        "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.down_proj": {
            "quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": False, "pre_quant_scale": True,
        },
    }  # fmt: skip
    assert [g["targets"] for g in config["config_groups"].values()] == [
        [n] for n in config["quantized_layers"]
    ]
    side = WRITER.side_files(config)["hf_quant_config.json"]
    assert side["quantization"]["quantized_layers"] == config["quantized_layers"]
    back = scheme(**{k: v for k, v in config.items() if k != "quant_method"})
    assert back.weight(MODULE, parts_of(STORED["W4A16_AWQ"]), (ROWS, COLS)) is not None


def test_nvfp4_with_and_without_scaled_inputs_is_one_algorithm() -> None:
    modules = {
        "a.q_proj": held(read("NVFP4", STORED["NVFP4"])),
        "a.o_proj": held(read("NVFP4_AWQ", STORED["NVFP4_AWQ"])),
    }
    config = WRITER.config(modules, None)
    assert config["quant_algo"] == "NVFP4_AWQ" and config["pre_quant_scale"] is True
    assert WRITER.side_files(config)["hf_quant_config.json"]["quantization"]["group_size"] == 16


def test_scales_that_tensorrt_llm_would_not_read() -> None:
    found = held(read("W4A16_AWQ", STORED["W4A16_AWQ"]))
    with pytest.raises(
        UnsupportedError, match=r"a.q_proj: has an unfolded scale of its input, .* fold it into the norm"
    ):
        WRITER.config({"a.q_proj": found}, None)
    assert WRITER.config({"a.o_proj": found}, None)["quant_algo"] == "W4A16_AWQ"
    smooth = held(
        read("W8A8_SQ_PER_CHANNEL", STORED["W8A8_SQ_PER_CHANNEL"])
    )  # ModelOpt writes these, nothing fuses them
    assert WRITER.config({"a.q_proj": smooth}, None)["quant_algo"] == "W8A8_SQ_PER_CHANNEL"


def test_names_that_vllm_would_confuse() -> None:
    found = held(read("FP8", STORED["FP8"]))
    with pytest.raises(
        UnsupportedError, match=r"a\.mlp.gate is not quantized and its name is contained in a\.mlp.gate_proj"
    ):
        WRITER.config({"a.mlp.gate": Held(None), "a.mlp.gate_proj": found}, None)


def test_only_an_fp8_cache_is_written() -> None:
    side = ActSpec(int_grid(8, True), "tensor", False)
    with pytest.raises(
        UnsupportedError, match="KV cache is written as FP8 with one static scale per layer only"
    ):
        WRITER.config({}, KVSpec(side, side))
    fp8 = ActSpec(E4M3, "tensor", False)
    config = WRITER.config({"lm_head": Held(None)}, KVSpec(fp8, fp8))
    assert "quant_algo" not in config
    assert scheme(**{k: v for k, v in config.items() if k != "quant_method"}).kv == KVSpec(fp8, fp8)
    assert WRITER.kv_names == ("{attn}.k_proj.k_scale", "{attn}.v_proj.v_scale")


def problems() -> list[tuple[Held, str]]:
    fp8, int4, fp4 = quantized("FP8"), quantized("W4A16_AWQ"), quantized("W4A16_NVFP4")
    static = replace(ALGORITHMS["FP8"].activation, scale=dense(np.ones(1, np.float32)))  # type: ignore[type-var]
    pre = Transform("scale", "input", dense(np.ones(COLS, np.float32)), folded=False)
    assert isinstance(fp4.scale, QTensor)
    odd = replace(int4, shape=(31, COLS), codes=dense(INTS[:31].copy()), scale=dense(GROUPS[:31].copy()))
    return [
        (Held(None, None, pre), "a plain weight cannot have an unfolded scale"),
        (Held(replace(int4, zero=dense(np.zeros((32, 4), np.uint8)))), "this weight has zero"),
        (Held(replace(fp8, divisor=True), static), "this weight has a dividing scale"),
        (
            Held(replace(fp4, scale=replace(fp4.scale, divisor=True))),
            "no algorithm of ModelOpt has float weights of 4 bits",
        ),
        (
            Held(replace(int4, block=(1, -1), scale=dense(GROUPS[:, :1].copy()))),
            r"int weights of 4 bits in blocks \(1, -1\)",
        ),
        (Held(replace(int4, grid=int_grid(4, False))), "no algorithm of ModelOpt has int weights"),
        (Held(fp8), "FP8 would hold the weight, but its input is quantized in another way"),
        (Held(fp8, replace(static, scale=None)), "quantized in another way"),
        (Held(fp8, replace(static, zero=dense(np.ones(1, np.int8)))), "quantized in another way"),
        (Held(fp8, static, pre), "FP8 has no pre_quant_scale, and this weight needs one"),
        (Held(fp4, None, pre), "W4A16_NVFP4 has no pre_quant_scale"),
        (
            Held(int4, None, Transform("rotate", "input", None, folded=False)),
            "no transform rotate of the input",
        ),
        (Held(odd), "two rows share a byte, 31 rows do not pair up"),
    ]


@pytest.mark.parametrize("case", range(13))
def test_what_cannot_be_written(case: int) -> None:
    given_, message = problems()[case]
    assert len(problems()) == 13
    with pytest.raises(ValueError, match=message):
        raise ValueError(WRITER.problem(given_))


def test_a_folded_transform_is_history() -> None:
    done = Transform("scale", "input", dense(np.ones(COLS, np.float32)), folded=True)
    given_ = Held(quantized("W4A16_AWQ"), None, done)
    assert WRITER.problem(given_) is None
    assert "pre_quant_scale" not in WRITER.store(given_)


def test_every_served_algorithm_is_known() -> None:
    assert set().union(*SERVED.values()) <= {*ALGORITHMS, "MIXED_PRECISION"}
