"""compressed-tensors read and written, against the package itself: its decompression, its matching, its config classes.

Two releases are oracles. What llm-compressor wrote with 0.19 lies in fixtures with the values that it computed in fp32;
0.17 runs in vLLM's environment (LCONVERT_VLLM_PYTHON, else .venv-vllm), where one process does all cases.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lconvert.converters import hf, hf_quantized
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import compressed_tensors, safetensors
from lconvert.formats.compressed_tensors import Writer
from lconvert.formats.compressed_tensors_config import read_args, read_config
from lconvert.formats.scheme import Checkpoint, Held, Part, Stored, Weight
from lconvert.ir import (
    E2M1,
    E4M3,
    E8M0,
    ActSpec,
    Grid,
    KVSpec,
    QTensor,
    Tensor,
    Transform,
    dense,
    int_grid,
)
from lconvert.kernels.qtensor import dequantize
from lconvert.spec import blocks
from tests.checkpoints import LLAMA, bf16, random_tensors, write_tensors
from tests.conftest import ROOT

PEERS = ROOT / "tests" / "fixtures" / "peers"
PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
MODULE = "model.layers.0.mlp.up_proj"
WRITER = Writer()
Tensors = dict[str, tuple[str, Any]]


# --- peers' files ----------------------------------------------------------------------------------------


def stored_modules(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, at in hf._tensors(folder).items():
        module, _, suffix = name.rpartition(".")
        if module and suffix.startswith(("weight", "input_")) and not module.endswith("norm"):
            found.setdefault(module, {})[suffix] = at
    return found


def logical_shape(parts: Mapping[str, Part]) -> tuple[int, ...]:
    if "weight" in parts:
        return parts["weight"].shape
    if "weight_shape" in parts:
        return tuple(parts["weight_shape"].data.load().tolist())
    rows, half = parts["weight_packed"].shape
    return rows, 2 * half


def read_modules(folder: Path) -> dict[str, Weight]:
    """Every quantized module of a folder; each stored tensor of theirs must have been used."""
    config = json.loads((folder / "config.json").read_text())
    scheme = hf_quantized.scheme(folder, config, hf._tensors(folder))
    assert scheme is not None
    out = {}
    for module, found in stored_modules(folder).items():
        parts = {s: hf_quantized.part(*at) for s, at in found.items()}
        weight = scheme.weight(module, parts, logical_shape(parts))
        if weight is not None:
            assert weight.used == parts.keys()
            out[module] = weight
    return out


def same_bytes(module: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """What a writer stores is, byte for byte, what the file holds; slabs of rows join to the whole."""
    assert stored.keys() == module.keys()
    for suffix, tensor in stored.items():
        file, info = module[suffix]
        n = tensor.shape[0]
        whole = tensor.read(0, n).tobytes()
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), suffix
        assert whole == file.path.read_bytes()[info.start : info.stop], suffix
        if not tensor.whole and n > 1:
            assert tensor.read(0, n // 3).tobytes() + tensor.read(n // 3, n).tobytes() == whole


def peers(tool: str) -> list[str]:
    return sorted(p.name for p in PEERS.glob(f"{tool}-*") if p.is_dir()) or ["none"]


@pytest.mark.parametrize("name", peers("llmcompressor"))
def test_llm_compressors_files_mean_what_it_says_and_are_written_back(name: str) -> None:
    """fp32 values equal in all bits to compressed-tensors 0.19's, and the bytes of every tensor come back."""
    folder = PEERS / name
    if not folder.is_dir():
        pytest.skip(f"the peers' fixtures are missing: {PEERS.relative_to(ROOT)}")
    oracle = json.loads((folder / "oracle.json").read_text())["tensors"]
    weights, modules = read_modules(folder), stored_modules(folder)
    assert weights.keys() == oracle.keys()
    for module, weight in weights.items():
        assert isinstance(weight.data, QTensor)
        values = dequantize(weight.data)
        assert list(values.shape) == oracle[module]["shape"]
        assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == oracle[module]["sha256"], module
        held = Held(weight.data, weight.activation)
        if name == "llmcompressor-w4afp8-g32":
            assert "vLLM takes symmetric int8" in str(WRITER.problem(held))
        else:
            assert WRITER.problem(held) is None
            same_bytes(modules[module], WRITER.store(held))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if name != "llmcompressor-w4afp8-g32" and weights:
        held_all = {m: Held(w.data, w.activation) for m, w in weights.items()}
        plain = [m for m in modules if m not in weights and "embed" not in m]
        scheme = compressed_tensors.parse(Checkpoint("config.json", config, folder))
        ours = WRITER.config(held_all | {m: Held(None) for m in plain}, scheme.kv)
        again = read_config("ours", ours)
        for module in [*weights, *plain]:
            assert again.rule(module)[0] == scheme.config.rule(module)[0], module
        assert (again.kv, ours["format"]) == (scheme.config.kv, config["format"])


@pytest.mark.parametrize("name", ["llmc_gptq_asym_g32", "llmc_w8a8", "llmc_kv"])
def test_trained_checkpoints_come_back_byte_for_byte(name: str, shared: Path) -> None:
    folder = shared / "checkpoints" / name
    modules = stored_modules(folder)
    weights = read_modules(folder)
    assert len(weights) == 14
    for module, weight in weights.items():
        assert isinstance(weight.data, QTensor)
        same_bytes(modules[module], WRITER.store(Held(weight.data, weight.activation)))


# --- compressed-tensors 0.17, which vLLM pins ----------------------------------------------------------------


def number(value: float, dtype: str = "F32", shape: tuple[int, ...] = (1, 1)) -> Tensor:
    array = np.full(shape, value, np.float32)
    return (
        dense(bf16(array), "BF16")
        if dtype == "BF16"
        else dense(array.astype({"F16": "f2", "F32": "f4"}[dtype]))
    )


def quantized(
    grid: Grid, block: tuple[int, int], shape: tuple[int, int] = (96, 128), dtype: str = "BF16", seed: int = 0
) -> QTensor:
    """Random codes, scales and zero points."""
    rng = np.random.default_rng(seed)
    if grid.kind == "int":
        low = -(1 << (grid.bits - 1)) if grid.signed else 0
        codes = rng.integers(low, low + (1 << grid.bits), shape).astype("i1" if grid.signed else "u1")
    else:
        codes = rng.integers(0, 1 << grid.bits, shape).astype("u1")
        codes[(codes & 0x7F) == 0x7F] = 0
    count = blocks(shape, block)
    scales = (rng.random(count) * 0.02 + 1e-3).astype(np.float32)
    scale = (
        dense(bf16(scales), "BF16")
        if dtype == "BF16"
        else dense(scales.astype({"F16": "f2", "F32": "f4"}[dtype]))
    )
    zero = None
    if grid.kind == "int" and not grid.signed:
        zero = dense(rng.integers(0, 1 << grid.bits, count).astype("u1"))
    return QTensor(shape, dense(codes), grid, block, scale, zero)


def nvfp4(shape: tuple[int, int] = (96, 128)) -> QTensor:
    q = quantized(E2M1, (1, 16), shape)
    codes = dense(np.random.default_rng(1).integers(1, 0x7F, (shape[0], shape[1] // 16)).astype("u1"))
    return replace(q, scale=QTensor(codes.shape, codes, E4M3, (-1, -1), number(413.7), divisor=True))


def mx(grid: Grid, shape: tuple[int, int] = (96, 128)) -> QTensor:
    q = quantized(grid, (1, 32), shape)
    codes = dense(np.random.default_rng(2).integers(110, 130, (shape[0], shape[1] // 32)).astype("u1"))
    return replace(q, scale=QTensor(codes.shape, codes, E8M0, (-1, -1), number(1.0)))


def signed(bits: int) -> Grid:
    return int_grid(bits, True)


def unsigned(bits: int) -> Grid:
    return int_grid(bits, False)


INT8_TOKEN = ActSpec(signed(8), "token", True)
FP8_TOKEN = ActSpec(E4M3, "token", True)
STATIC = number(0.037, "F32", (1,))
NVFP4_INPUT = ActSpec(E2M1, "group", True, 16, number(911.3, "F32", (1,)), divisor=True)

#: name -> (what is written, the format it must get).
CASES: Mapping[str, tuple[Held, str]] = {
    "w2": (Held(quantized(signed(2), (1, 32))), "pack-quantized"),
    "w4": (Held(quantized(signed(4), (1, 32))), "pack-quantized"),
    "w4-f16": (Held(quantized(signed(4), (1, 64), dtype="F16")), "pack-quantized"),
    "w4-asym": (Held(quantized(unsigned(4), (1, 32), (92, 128))), "pack-quantized"),
    "w4-channel": (Held(quantized(signed(4), (1, -1))), "pack-quantized"),
    "w4-channel-asym": (Held(quantized(unsigned(4), (1, -1))), "pack-quantized"),
    "w8-asym": (Held(quantized(unsigned(8), (1, 64))), "pack-quantized"),
    "w8a8-dynamic": (Held(quantized(signed(8), (1, -1)), INT8_TOKEN), "int-quantized"),
    "w8a8-dynamic-asym": (
        Held(quantized(signed(8), (1, -1), dtype="F32"), ActSpec(unsigned(8), "token", True)),
        "int-quantized",
    ),
    "w8a8-static": (
        Held(quantized(signed(8), (-1, -1)), ActSpec(signed(8), "tensor", False, scale=STATIC)),
        "int-quantized",
    ),
    "w8a8-static-asym": (
        Held(
            quantized(signed(8), (1, -1)),
            ActSpec(unsigned(8), "tensor", False, scale=STATIC, zero=dense(np.array([131], "u1"))),
        ),
        "int-quantized",
    ),
    "fp8-static": (
        Held(quantized(E4M3, (-1, -1), dtype="F32"), ActSpec(E4M3, "tensor", False, scale=STATIC)),
        "float-quantized",
    ),
    "fp8-dynamic": (Held(quantized(E4M3, (1, -1)), FP8_TOKEN), "float-quantized"),
    "fp8-block": (
        Held(quantized(E4M3, (128, 128), (256, 384)), ActSpec(E4M3, "group", True, 128)),
        "float-quantized",
    ),
    "fp8-weight-only": (Held(quantized(E4M3, (1, -1))), "naive-quantized"),
    "nvfp4": (Held(nvfp4(), NVFP4_INPUT), "nvfp4-pack-quantized"),
    "nvfp4a16": (Held(nvfp4()), "nvfp4-pack-quantized"),
    "mxfp4": (Held(mx(E2M1), ActSpec(E2M1, "group", True, 32)), "mxfp4-pack-quantized"),
    "mxfp4a16": (Held(mx(E2M1)), "mxfp4-pack-quantized"),
    "mxfp8": (Held(mx(E4M3), ActSpec(E4M3, "group", True, 32)), "mxfp8-quantized"),
}
#: Written in the dense layout, which 0.17 does not read; these are checked with 0.19 through the fixtures.
ODD = {
    f"w{b}{'-asym' * a}": Held(quantized((signed, unsigned)[a](b), (1, 32)))
    for b in (3, 5, 6, 7)
    for a in (0, 1)
}

#: Ways to name modules: (targets of two groups, ignore). Which group a module gets is asked of compressed-tensors.
NAMINGS: tuple[tuple[list[str], list[str], list[str]], ...] = (
    (["Linear"], ["re:.*mlp.*"], ["lm_head"]),
    (["Linear"], [MODULE], []),
    (["re:.*up_proj"], ["re:.*mlp.*"], []),
    (["re:.*mlp.*"], ["re:.*up_proj"], []),
    (["re:.*up_proj", "Linear"], [MODULE, "Embedding"], ["re:.*o_proj$"]),
    (["re:up_proj"], ["re:model.layers.[0-9]+.self_attn"], ["Linear"]),
    (["Embedding"], ["Linear"], ["re:.*layers\\.1\\..*"]),
    (["Linear"], ["lm_head"], ["model.embed_tokens", "up_proj"]),
)
NAMES = [
    "lm_head", "model.embed_tokens",
    *(f"model.layers.{i}.{m}" for i in (0, 1, 11) for m in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")),
]  # fmt: skip

WORKER = r"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from compressed_tensors import __version__
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils.match import is_match, match_targets

root = Path(sys.argv[1])
job = json.loads((root / "job.json").read_text())
linear, embedding = torch.nn.Linear(2, 2), torch.nn.Embedding(2, 2)


def scheme_of(config, name):
    module = embedding if "embed" in name else linear
    targets = {t: s for s in config.config_groups.values() for t in s.targets}
    matched = match_targets(name, module, targets)
    if not matched or is_match(name, module, config.ignore):
        return None
    return targets[matched[0]]


def widened(state):
    half = (torch.bfloat16, torch.float16)
    return {k: t.to(torch.float32) if t.dtype in half else t for k, t in state.items()}


def values(state, scheme, form):
    if "weight_packed" in state and state["weight_packed"].dtype == torch.uint8:
        packed, scale = state["weight_packed"], state["weight_scale"]
        scale = decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
        overall = state.get("weight_global_scale")
        return dequantize(codes, scale.float(), args=scheme.weights, global_scale=overall, dtype=torch.float32)
    return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"].float()


out = {}
formats = {}
for name, config in job["configs"].items():
    parsed = QuantizationConfig(**config)
    scheme = scheme_of(parsed, job["module"])
    formats[name] = scheme.format
    state = {k.rpartition(".")[2]: t for k, t in load_file(root / f"{name}.safetensors").items()}
    names = set(BaseCompressor.get_value_from_registry(scheme.format).compression_param_names(scheme))
    assert names - {"weight_global_scale", "input_global_scale"} <= set(state), (name, names, set(state))
    out[name] = values(widened(state), scheme, scheme.format).contiguous()

torch.manual_seed(5)
for name, args in job["made"].items():
    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = 128 // args.group_size
    half = 2 ** (args.num_bits - 1)
    state = {
        "weight": torch.randn(70, 128) * 0.02,
        "weight_scale": torch.rand(70, groups).to(torch.bfloat16).float() * 0.01 + 0.001,
    }
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, (70, groups), dtype=torch.int8)
    if args.actorder == "group":
        state["weight_g_idx"] = torch.randperm(128).to(torch.int32) % groups
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    save_file({f"{job['module']}.{k}": t.contiguous() for k, t in packed.items()}, root / f"made-{name}.safetensors")
    out[f"made-{name}"] = values(packed, scheme, "pack-quantized").contiguous()

matches = []
for first, second, ignore in job["namings"]:
    weights = [{"num_bits": b, "strategy": "channel"} for b in (4, 8)]
    groups = {f"g{i}": {"targets": t, "weights": w} for i, (t, w) in enumerate(zip((first, second), weights))}
    config = QuantizationConfig(config_groups=groups, ignore=ignore)
    found = [scheme_of(config, n) for n in job["names"]]
    matches.append([None if s is None else s.weights.num_bits for s in found])

for name in job["folders"]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.bfloat16)
    model(torch.tensor([[1, 2, 3]]))  # decompresses
    out[f"folder-{name}"] = model.get_submodule(job["module"]).weight.detach().float().contiguous()
    assert all(torch.isfinite(p.float()).all() for p in model.parameters())
save_file(out, root / "values.safetensors")
(root / "answer.json").write_text(json.dumps({"version": __version__, "matches": matches, "formats": formats}))
"""


def made_args(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | more


#: What 0.17 packs: odd widths with padded words, and columns in the order of act-order.
MADE = {
    **{f"w{b}": made_args(b) for b in (2, 3, 4, 5, 6, 7, 8)},
    **{f"w{b}-asym": made_args(b, symmetric=False) for b in (3, 4, 5, 7)},
    "actorder": made_args(4, actorder="group"),
    "actorder-asym": made_args(4, actorder="group", symmetric=False),
}
#: Whole folders for transformers: name -> what its linear modules hold.
FOLDERS = {
    "int4": lambda shape: Held(quantized(signed(4), (1, 32), shape)),
    "int4-asym": lambda shape: Held(quantized(unsigned(4), (1, 64), shape)),
    "int8": lambda shape: Held(quantized(signed(8), (1, -1), shape), INT8_TOKEN),
    "fp8": lambda shape: Held(quantized(E4M3, (1, -1), shape), FP8_TOKEN),
}


def with_config(held: Mapping[str, Held], kv: KVSpec | None = None) -> dict[str, Any]:
    return json.loads(json.dumps(WRITER.config(held, kv)))  # type: ignore[no-any-return]


def tensors_of(module: str, held: Held) -> Tensors:
    assert WRITER.problem(held) is None, WRITER.problem(held)
    return {f"{module}.{s}": (t.dtype, t.read(0, t.shape[0])) for s, t in WRITER.store(held).items()}


def write_folder(folder: Path, make: Any) -> Held:
    """A Llama whose linear modules are quantized, the first o_proj, which is plain, and the head excepted."""
    tensors = random_tensors(LLAMA)
    held: dict[str, Held] = {}
    for name, (_, array) in list(tensors.items()):
        module = name.removesuffix(".weight")
        if "_proj" in name and "layers.0.self_attn.o_proj" not in name:
            del tensors[name]
            held[module] = make(array.shape)
            tensors |= tensors_of(module, held[module])
        elif array.ndim == 2 and "embed" not in name:
            held[module] = Held(None)
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(
        json.dumps({**LLAMA, "quantization_config": WRITER.config(held, None)})
    )
    return held[MODULE]


@dataclass(frozen=True)
class Pinned:
    """What compressed-tensors 0.17 said."""

    root: Path
    values: Mapping[str, Any]
    answer: Mapping[str, Any]
    folders: Mapping[str, Held]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Pinned:
    if not PYTHON.exists():
        pytest.skip(f"the vLLM environment is missing, and compressed-tensors 0.17 with it: {PYTHON}")
    from safetensors.numpy import load_file

    root = tmp_path_factory.mktemp("pinned")
    configs = {}
    for name, (held, _) in CASES.items():
        configs[name] = with_config({MODULE: held, "lm_head": Held(None)})
        write_tensors(root / f"{name}.safetensors", tensors_of(MODULE, held))
    folders = {name: write_folder(root / name, make) for name, make in FOLDERS.items()}
    job = {
        "configs": configs,
        "module": MODULE,
        "made": MADE,
        "namings": NAMINGS,
        "names": NAMES,
        "folders": list(FOLDERS),
    }
    (root / "job.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [PYTHON, "-P", "-c", WORKER, root],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return Pinned(
        root, load_file(root / "values.safetensors"), json.loads((root / "answer.json").read_text()), folders
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_decompresses_to_the_same_numbers(pinned: Pinned, name: str) -> None:
    """Its config passes QuantizationConfig, its tensors decompress in fp32 to equal bits, and reading gives it back."""
    held, form = CASES[name]
    assert held.weight is not None
    assert pinned.answer["formats"][name] == form
    assert np.array_equal(pinned.values[name], dequantize(held.weight))
    config = with_config({MODULE: held, "lm_head": Held(None)})
    again = read(pinned.root / f"{name}.safetensors", config, held.weight.shape)
    assert isinstance(again.data, QTensor)
    assert np.array_equal(dequantize(again.data), dequantize(held.weight))
    assert spelled(again.activation) == spelled(held.activation)
    assert with_config({MODULE: Held(again.data, again.activation), "lm_head": Held(None)}) == config


@pytest.mark.parametrize("name", MADE)
def test_padded_words_and_act_order_of_old_releases(pinned: Pinned, name: str) -> None:
    config = top({"targets": ["Linear"], "weights": MADE[name]})
    weight = read(pinned.root / f"made-{name}.safetensors", config, (70, 128))
    assert isinstance(weight.data, QTensor)
    assert np.array_equal(dequantize(weight.data), pinned.values[f"made-{name}"])
    slabs = [dequantize(weight.data, a, b) for a, b in ((0, 7), (7, 33), (33, 70))]
    assert np.array_equal(np.concatenate(slabs), dequantize(weight.data))
    held = Held(weight.data)
    if "actorder" in name:
        assert weight.data.g_idx is not None and "reordered" in str(WRITER.problem(held))
    else:  # the scales are BF16 numbers, stored as F32
        assert "F32 must become F16 or BF16" in str(WRITER.problem(held))


def test_modules_match_as_they_do_in_compressed_tensors(pinned: Pinned) -> None:
    assert pinned.answer["version"].startswith("0.17")
    for (first, second, ignore), wanted in zip(NAMINGS, pinned.answer["matches"], strict=True):
        groups = {
            f"g{i}": {"targets": t, "weights": {"num_bits": b, "strategy": "channel"}}
            for i, (t, b) in enumerate(((first, 4), (second, 8)))
        }
        found = read_config(
            "config.json", {"format": "pack-quantized", "config_groups": groups, "ignore": ignore}
        )
        rules = [found.rule(name)[0] for name in NAMES]
        assert [None if r is None else r.weights.bits for r in rules] == wanted, (first, second, ignore)


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_loads_the_folder(pinned: Pinned, name: str) -> None:
    """Scales are BF16 here, and 0.17 computes in the type of the scale: (code - zero) is exact, one product rounds."""
    q = pinned.folders[name].weight
    assert q is not None
    exact, found = dequantize(q), pinned.values[f"folder-{name}"]
    assert np.array_equal(bf16(found.copy()), bf16(exact))


@pytest.mark.parametrize("name", ODD)
def test_odd_widths_are_dense_streams(name: str, tmp_path: Path) -> None:
    """32 codes of b bits take b words, as vLLM 0.32 and compressed-tensors 0.19 expect."""
    held = ODD[name]
    assert held.weight is not None
    bits = held.weight.grid.bits
    stored = WRITER.store(held)
    assert stored["weight_packed"].shape == (96, 4 * bits)
    write_tensors(tmp_path / "x.safetensors", tensors_of(MODULE, held))
    again = read(tmp_path / "x.safetensors", with_config({MODULE: held}), (96, 128))
    assert isinstance(again.data, QTensor)
    assert np.array_equal(dequantize(again.data), dequantize(held.weight))


# --- the config --------------------------------------------------------------------------------------------


def top(*groups: Any, **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": g for i, g in enumerate(groups)}
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named}
    return base | {"quantization_status": "compressed", "ignore": []} | more


def spelled(a: ActSpec | None) -> Any:
    if a is None:
        return None
    scale = None if a.scale is None else (a.scale.dtype, a.scale.load().tolist())
    return (
        a.grid,
        a.per,
        a.dynamic,
        a.group,
        a.divisor,
        scale,
        None if a.zero is None else a.zero.load().tolist(),
    )


def parts_in(path: Path) -> dict[str, Part]:
    file = safetensors.read_header(path)
    return {n.removeprefix(MODULE + "."): hf_quantized.part(file, info) for n, info in file.tensors.items()}


def read(path: Path, config: dict[str, Any], shape: tuple[int, ...]) -> Weight:
    scheme = compressed_tensors.parse(Checkpoint("config.json", config, path.parent))
    weight = scheme.weight(MODULE, parts_in(path), shape)
    assert weight is not None
    assert weight.used == parts_in(path).keys()
    return weight


W4 = {"targets": ["Linear"], "weights": made_args(4)}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (top(W4, quantization_status="initialized"), UnsupportedError, "save_compressed=True"),
        (top(W4, quantization_status="calibration"), UnsupportedError, "not yet compressed"),
        (top(W4, sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedError, "sparse layouts were removed"),
        (top(W4, transform_config={"config_groups": {"R1": {}}}), UnsupportedError, "rotates activations"),
        (top(W4, format="marlin-24"), UnsupportedError, "2:4 sparsity"),
        (top(W4, format="fakequant"), UnsupportedError, "float weights"),
        (top(W4, format="mixed-precision"), InputError, "no such format"),
        (top(W4, format=None), InputError, "no such format"),
        (top(W4, format=["a"]), InputError, "no such format"),
        (top(W4, surprise=1), InputError, "unknown key 'surprise'"),
        (top(W4 | {"surprise": 1}), InputError, "the group has the unknown key"),
        (top(W4 | {"weights": made_args(4, zero_scale=1)}), InputError, "the scheme has the unknown key 'zero_scale'"),
        (top(W4 | {"weights": made_args(9)}), InputError, "9 bits are outside 2 to 8"),
        (top(W4 | {"weights": made_args(1)}), InputError, "1 bits are outside"),
        (top(W4 | {"weights": made_args(4, group_size=None)}), InputError, "needs a positive group_size"),
        (top(W4 | {"weights": made_args(4, group_size="32")}), InputError, "expected a whole number"),
        (top(W4 | {"weights": made_args(4, strategy="rows")}), InputError, "strategy is 'rows'"),
        (top(W4 | {"weights": made_args(4, symmetric=1)}), InputError, "symmetric is 1"),
        (top(W4 | {"weights": made_args(4, dynamic=True)}), InputError, "cannot be quantized dynamically"),
        (top(W4 | {"weights": made_args(4, type="float")}), InputError, "packs 2 to 8 bit integers"),
        (top(W4, format="nvfp4-pack-quantized"), InputError, "4-bit floats in groups of 16"),
        (top(W4 | {"weights": made_args(8, type="float", symmetric=False)}, format="float-quantized"), InputError, "symmetric"),
        (top(W4 | {"weights": None}), UnsupportedError, "but no weights"),
        (top(W4 | {"weights": 4}), InputError, "expected an object"),
        (top(W4 | {"output_activations": KV}), UnsupportedError, "output_activations cannot be carried"),
        (top(W4 | {"targets": "Linear"}), InputError, "expected a list of names"),
        (top(W4, ignore=[3]), InputError, "expected a list of names"),
        (top(W4, ignore=["re:("]), InputError, "no valid regular expression"),
        (top(W4, ignore=["re:(a+)+b"]), UnsupportedError, "too long to match"),
        (top(W4, ignore=["re:(a|a)*b"]), UnsupportedError, "too long to match"),
        (top(W4, ignore=["re:" + ".*a" * 9]), UnsupportedError, "too long to match"),
        (top(W4, W4 | {"weights": made_args(8)}), InputError, "is in two groups that differ"),
        (top(["Linear"]), UnsupportedError, "names of presets"),
        (top(W4, config_groups=[]) | {"config_groups": [1]}, InputError, "expected an object"),
        (top(W4, kv_cache_scheme=KV | {"strategy": "attn_head"}), UnsupportedError, "KV cache"),
        (top(W4, kv_cache_scheme=KV | {"symmetric": False}), UnsupportedError, "KV cache"),
        (top(W4, kv_cache_scheme=KV | {"num_bits": 4}), UnsupportedError, "KV cache"),
        (
            top({"targets": ["Linear"], "weights": KV | {"strategy": "block", "block_structure": [128, 0]}}),
            InputError,
            "block_structure is",
        ),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_read(config: dict[str, Any], error: type[LconvertError], words: str) -> None:
    with pytest.raises(error, match=words) as e:
        compressed_tensors.parse(Checkpoint("config.json", config, Path()))
    assert str(e.value).startswith("config.json")


def test_words_of_old_and_new_configs() -> None:
    kv = compressed_tensors.parse(Checkpoint("c", top(format="dense", kv_cache_scheme=KV), Path()))
    assert kv.kv == KVSpec(ActSpec(E4M3, "tensor", False), ActSpec(E4M3, "tensor", False))
    assert kv.method == "compressed-tensors (dense; KV cache float8 per tensor)"
    assert read_args("a", {"group_size": -1}).strategy == "channel"
    assert read_args("a", {"group_size": 64, "num_bits": 4}).strategy == "group"
    assert read_args("a", {}).strategy == "tensor"
    assert read_args("a", KV | {"strategy": "block", "block_structure": "64x128"}).block == (64, 128)
    assert [read_args("a", {"actorder": o}).reordered for o in ("group", "dynamic", True)] == [True] * 3
    assert [read_args("a", {"actorder": o}).reordered for o in ("static", "weight", None, False)] == [
        False
    ] * 4
    old = top(W4, sparsity_config={"format": "dense", "global_sparsity": 0.1}, quantization_status="frozen")
    scheme = compressed_tensors.parse(Checkpoint("c", old, Path()))
    assert scheme.method == "compressed-tensors (pack-quantized int4 per group 32)"
    assert scheme.report == ("sparsity_config: its format is dense, which changes no number",)


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=5),
       st.sampled_from(["format", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config", "transform_config",
                        "quantization_status", "weights", "targets", "num_bits", "type", "strategy", "group_size",
                        "dynamic", "block_structure", "actorder", "symmetric", "input_activations"]))  # fmt: skip
def test_any_value_of_any_key_is_read_or_refused(value: Any, key: str) -> None:
    """Hostile JSON ends in an error of ours or in a scheme, never in a traceback."""
    group: dict[str, Any] = {"targets": ["Linear"], "weights": made_args(4)}
    config = top(group)
    place = (
        group["weights"]
        if key in group["weights"] or key in ("dynamic", "block_structure", "actorder")
        else group
    )
    (config if key in config or key.endswith("config") or key == "kv_cache_scheme" else place)[key] = value
    try:
        compressed_tensors.parse(Checkpoint("config.json", config, Path()))
    except LconvertError as e:
        assert "config.json" in str(e)


# --- damaged tensors ---------------------------------------------------------------------------------------


def damaged(path: Path, held: Held, change: Any, config: dict[str, Any] | None = None) -> Weight:
    """Reads what `change` made of the stored tensors of a sound module, and all numbers in it."""
    found = config or with_config({MODULE: held})
    tensors = {n.removeprefix(MODULE + "."): t for n, t in tensors_of(MODULE, held).items()}
    change(tensors)
    write_tensors(path / "x.safetensors", {f"{MODULE}.{n}": t for n, t in tensors.items()})
    assert held.weight is not None
    weight = read(path / "x.safetensors", found, held.weight.shape)
    assert isinstance(weight.data, QTensor)
    dequantize(weight.data)
    if weight.activation is not None:
        spelled(weight.activation)
    return weight


def put(suffix: str, dtype: str | None = None, value: Any = None, at: Any = 0, shape: Any = None) -> Any:
    """A change: another type, shape or one other element."""

    def change(tensors: Tensors) -> None:
        kind, array = tensors[suffix]
        array = array.copy()
        if value is not None:
            array.reshape(-1)[at] = value
        if shape is not None:
            array = np.resize(array, shape)
        tensors[suffix] = (dtype or kind, array)

    return change


def drop(suffix: str) -> Any:
    return lambda tensors: tensors.pop(suffix)


def add(suffix: str, dtype: str, array: Any) -> Any:
    return lambda tensors: tensors.__setitem__(suffix, (dtype, array))


G_IDX = np.arange(128, dtype=np.int32) // 32


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("w4", drop("weight_scale"), "the tensor weight_scale is missing"),
        ("w4", drop("weight_shape"), "the tensor weight_shape is missing"),
        ("w4", drop("weight_packed"), "the tensor weight_packed is missing"),
        ("w4", put("weight_shape", value=95), r"says \(95, 128\)"),
        ("w4", put("weight_packed", shape=(96, 15)), "rows of 15 words"),
        ("w4", put("weight_packed", shape=(95, 16)), r"the configuration implies \(96, -1\)"),
        ("w4", put("weight_packed", dtype="F32"), "is stored as F32, expected I32"),
        ("w4", put("weight_scale", shape=(96, 2)), r"implies \(96, 4\)"),
        ("w4", put("weight_scale", value=0x8000, at=9), "scale -0.0 in row 2 is damaged"),
        ("w4", put("weight_scale", value=0x7FC0, at=9), "scale nan in row 2"),
        ("w4", add("weight", "BF16", np.zeros((96, 128), "u2")), "was saved before it was compressed"),
        ("w4", add("weight_zero_point", "I8", np.ones((96, 4), "i1")), "only zeros of type I8"),
        (
            "w4",
            add("weight_g_idx", "I32", G_IDX[::-1] + 1),
            "must name each of 4 groups 32 times, found 1 to 4",
        ),
        ("w4", add("weight_g_idx", "I32", np.where(G_IDX == 1, 0, G_IDX)), "each of 4 groups 32 times"),
        ("w4-asym", drop("weight_zero_point"), "the tensor weight_zero_point is missing"),
        ("w4-asym", put("weight_zero_point", shape=(13, 4)), r"implies \(12, 4\)"),
        ("w8a8-static", drop("input_scale"), "the tensor input_scale is missing"),
        ("w8a8-static", put("input_scale", value=0.0), "must be positive"),
        ("w8a8-static", put("input_scale", shape=(2,)), r"has shape \(2,\)"),
        ("w8a8-static", put("weight_scale", value=0xFF80), "the scale -inf is damaged"),
        ("w8a8-static", add("input_zero_point", "I8", np.ones(1, "i1")), "is not 0, but the config says"),
        ("w8a8-static-asym", drop("input_zero_point"), "the tensor input_zero_point is missing"),
        ("w8a8-dynamic", put("weight", dtype="U8"), "is stored as U8, expected I8"),
        ("fp8-dynamic", put("weight", value=0x7F, at=300), "row 2 holds a NaN"),
        ("fp8-dynamic", put("weight", value=0xFF, at=300), "row 2 holds a NaN"),
        ("fp8-dynamic", put("weight", dtype="F8_E5M2"), "is stored as F8_E5M2"),
        ("fp8-block", put("weight_scale", shape=(2, 2)), r"implies \(2, 3\)"),
        ("nvfp4", put("weight_scale", value=0x80, at=9), "the scale -0.0 in row 1"),
        ("nvfp4", put("weight_scale", value=0x7F, at=9), "row 1 holds a NaN"),
        ("nvfp4", put("weight_scale", dtype="U8"), "expected F8_E4M3"),
        ("nvfp4", put("weight_global_scale", value=0.0), "must be positive"),
        ("nvfp4", put("weight_global_scale", value=np.inf), "the scale inf is damaged"),
        ("nvfp4", drop("input_global_scale"), "the tensor input_global_scale is missing"),
        ("nvfp4", put("weight_packed", shape=(96, 32)), r"implies \(96, 64\)"),
        ("mxfp4", put("weight_scale", value=255, at=5), "a scale in row 1 is NaN"),
        ("mxfp8", drop("weight_scale"), "the tensor weight_scale is missing"),
    ],
)
def test_damaged_tensors_are_named(name: str, change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as e:
        damaged(tmp_path, CASES[name][0], change)
    assert MODULE in str(e.value)


def test_codes_and_zeros_beyond_their_width(tmp_path: Path) -> None:
    """int-quantized stores narrow codes in whole bytes, so that they can be out of range."""
    q = quantized(signed(8), (1, 32))
    held = Held(q)
    group = {"targets": ["Linear"], "weights": made_args(8, symmetric=False), "format": "int-quantized"}

    def plain(zero: int) -> Any:
        def change(tensors: Tensors) -> None:
            tensors.clear()
            tensors["weight"] = ("I8", np.full((96, 128), 7, "i1"))
            tensors["weight_scale"] = ("BF16", q.scale.read(0, 96))  # type: ignore[union-attr]
            tensors["weight_zero_point"] = ("I8", np.full((96, 4), zero, "i1"))

        return change

    weight = damaged(tmp_path, held, plain(-3), top(group))
    assert isinstance(weight.data, QTensor) and isinstance(weight.data.scale, Tensor)
    wide = np.repeat(weight.data.scale.load().astype(np.uint32) << 16, 32, axis=1).view(np.float32)
    assert np.array_equal(dequantize(weight.data), np.float32(10) * wide)
    group["weights"] = made_args(4, symmetric=False)
    assert np.array_equal(
        dequantize(damaged(tmp_path, held, plain(-8), top(group)).data), np.float32(15) * wide
    )  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a zero point does not fit 4 bits \(-8 to 7\)"):
        damaged(tmp_path, held, plain(8), top(group))
    group["weights"] = made_args(3, symmetric=False)
    with pytest.raises(InputError, match="7 at row 0, column 0 does not fit 3 bits"):
        damaged(tmp_path, held, plain(0), top(group))


def test_config_and_tensors_that_do_not_belong_together(tmp_path: Path) -> None:
    held = CASES["w4"][0]
    none = lambda tensors: None
    three = top({"targets": ["Linear"], "weights": made_args(3)})
    with pytest.raises(InputError, match=r"rows of 16 words, but 128 codes of 3 bits take 12 \(or 13 before"):
        damaged(tmp_path, held, none, three)
    with pytest.raises(
        InputError, match=r"config\.json ignores 'Linear'; config.json and the weights do not belong"
    ):
        damaged(tmp_path, held, none, top(W4, ignore=["Linear"]))
    with pytest.raises(InputError, match=r"no target of config\.json matches it"):
        damaged(tmp_path, held, none, top(W4 | {"targets": ["Embedding"]}))
    with pytest.raises(InputError, match="actorder is group, but weight_g_idx is missing"):
        damaged(tmp_path, held, none, top(W4 | {"weights": made_args(4, actorder="group")}))
    with pytest.raises(InputError, match="128 input features do not divide into groups of 48"):
        damaged(tmp_path, held, none, top(W4 | {"weights": made_args(4, group_size=48)}))
    with pytest.raises(UnsupportedError, match="only static scales per tensor"):
        damaged(tmp_path, held, none, top(W4 | {"input_activations": KV | {"strategy": "channel"}}))
    with pytest.raises(UnsupportedError, match="groups of 32 must have exponents"):
        damaged(
            tmp_path,
            held,
            none,
            top(W4 | {"input_activations": KV | {"strategy": "group", "group_size": 32, "dynamic": True}}),
        )
    narrow = replace(quantized(signed(3), (1, -1), (96, 16)))
    found = Held(narrow)
    with pytest.raises(UnsupportedError, match="16 codes of 3 bits look the same dense and padded"):
        damaged(tmp_path, found, none)


def test_inert_tensors_and_plain_modules(tmp_path: Path) -> None:
    """Zeros of symmetric weights, an index of unset or ordered columns; routers that a class target would mean."""
    held = CASES["w4"][0]
    for extra in (
        add("weight_zero_point", "I8", np.zeros((96, 4), "i1")),
        add("weight_g_idx", "I32", np.full(128, -1, np.int32)),
        add("weight_g_idx", "I32", G_IDX),
    ):
        weight = damaged(tmp_path, held, extra)
        assert isinstance(weight.data, QTensor) and weight.data.g_idx is None
        assert WRITER.problem(Held(weight.data)) is None
    scheme = compressed_tensors.parse(Checkpoint("config.json", top(W4), tmp_path))
    write_tensors(tmp_path / "plain.safetensors", {f"{MODULE}.weight": ("BF16", np.zeros((4, 8), "u2"))})
    parts = parts_in(tmp_path / "plain.safetensors")
    assert scheme.weight("model.layers.0.mlp.gate", parts, (4, 8)) is None
    assert scheme.weight("model.embed_tokens", parts, (4, 8)) is None
    with pytest.raises(
        InputError, match=r"config\.json quantizes 'Linear' as pack-quantized: it was saved before"
    ):
        scheme.weight(MODULE, parts, (4, 8))


# --- what cannot be written ----------------------------------------------------------------------------------

W4_CODES = quantized(signed(4), (1, 32))
W8_CODES = quantized(signed(8), (1, -1))
FP8_CODES = quantized(E4M3, (1, -1))
_SCALE = nvfp4().scale
assert isinstance(_SCALE, QTensor)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Held(W4_CODES, transform=Transform("scale", "input", number(1, "F32", (128,)), False)), "pre_quant_scale"),
        (Held(replace(W4_CODES, g_idx=dense(G_IDX))), "columns are reordered"),
        (Held(replace(W4_CODES, offset=W4_CODES.scale)), "offsets"),
        (Held(replace(W4_CODES, mask=dense(np.ones((96, 128), bool)))), "masks"),
        (Held(quantized(signed(4), (1, 32), dtype="F32")), "F32 must become F16 or BF16"),
        (Held(quantized(signed(4), (-1, -1))), "per group or channel, not per tensor"),
        (Held(quantized(signed(4), (1, 48))), r"blocks \(1, 48\)"),
        (Held(quantized(signed(4), (4, 1), (96, 128))), r"blocks \(4, 1\)"),
        (Held(quantized(signed(1), (1, 32))), "integers of 1 bits"),
        (Held(replace(W4_CODES, zero=dense(np.zeros((96, 4), "u1")))), "signed ones have none"),
        (Held(replace(quantized(unsigned(4), (1, 32)), zero=None)), "need zero points"),
        (Held(replace(W4_CODES, scale=W4_CODES)), "plain numbers of type"),
        (Held(W4_CODES, INT8_TOKEN), "symmetric int8 per tensor or channel"),
        (Held(quantized(unsigned(8), (1, -1)), INT8_TOKEN), "symmetric int8 per tensor or channel"),
        (Held(W8_CODES, FP8_TOKEN), "activations must be int8"),
        (Held(W8_CODES, ActSpec(signed(8), "tensor", True)), "static per tensor or dynamic per token"),
        (Held(W8_CODES, ActSpec(signed(8), "tensor", False)), "need one scale"),
        (Held(W8_CODES, ActSpec(unsigned(8), "tensor", False, scale=STATIC)), "have a zero point"),
        (Held(FP8_CODES, INT8_TOKEN), "must be FP8, static per tensor"),
        (Held(FP8_CODES, ActSpec(E4M3, "token", True, scale=STATIC)), "activation_scale_ub"),
        (Held(quantized(E4M3, (1, 32))), "no FP8 weights in groups"),
        (Held(quantized(E4M3, (128, 128), (128, 128)), FP8_TOKEN), "dynamic in groups of 128"),
        (Held(replace(nvfp4(), scale=replace(_SCALE, divisor=False))), "only for powers of two"),
        (Held(quantized(E2M1, (1, 64))), "FP8 scales per 16 columns"),
        (Held(nvfp4(), FP8_TOKEN), "must be NVFP4"),
        (Held(nvfp4(), replace(NVFP4_INPUT, divisor=False)), "exact only for powers of two"),
        (Held(mx(E2M1), FP8_TOKEN), "MX floats in groups of 32"),
        (Held(replace(mx(E4M3), scale=replace(mx(E4M3).scale, scale=number(2.0)))), "no scale beside their exponents"),  # type: ignore[type-var]
        (Held(replace(W4_CODES, grid=Grid("codebook", 4, values=(0.0,) * 16))), "none of compressed-tensors'"),
    ],
)  # fmt: skip
def test_problems_are_told(held: Held, words: str) -> None:
    assert words.replace("\\", "") in str(WRITER.problem(held))


def test_a_power_of_two_divides_as_well_as_it_multiplies() -> None:
    stored = WRITER.store(
        Held(nvfp4(), replace(NVFP4_INPUT, scale=number(1 / 256, "F32", (1,)), divisor=False))
    )
    assert stored["input_global_scale"].read(0, 1).tolist() == [256.0]


def test_groups_targets_and_exceptions_of_a_config() -> None:
    """One scheme is named by its class, and by name where a runtime's class differs; several by their modules."""
    a, b = Held(W4_CODES), Held(FP8_CODES, FP8_TOKEN)
    layers = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    one = with_config({layers[0]: a, layers[1]: a, "lm_head": Held(None)})
    assert [g["targets"] for g in one["config_groups"].values()] == [["Linear"]]
    assert (one["format"], one["ignore"], one["version"]) == ("pack-quantized", ["lm_head"], "0.19.0")
    head = with_config({layers[0]: a, layers[1]: Held(None), "lm_head": a})
    assert (head["config_groups"]["group_0"]["targets"], head["ignore"]) == (
        ["Linear", "lm_head"],
        [layers[1]],
    )
    two = with_config({layers[0]: a, layers[1]: b, "lm_head": b})
    assert [g["targets"] for g in two["config_groups"].values()] == [[layers[0]], [layers[1], "lm_head"]]
    assert (two["format"], two["config_groups"]["group_1"]["format"]) == (
        "mixed-precision",
        "float-quantized",
    )
    assert two["config_groups"]["group_0"]["weights"]["actorder"] is None
    static = ActSpec(E4M3, "tensor", False, scale=number(0.1, "F32", (2,)))
    only = with_config({layers[0]: Held(None)}, KVSpec(static, static))
    assert (only["format"], only["config_groups"], only["kv_cache_scheme"]["num_bits"]) == ("dense", {}, 8)
    assert (
        WRITER.side_files(only) == {}
        and WRITER.store(Held(None)) == {}
        and WRITER.problem(Held(None)) is None
    )
    assert WRITER.kv_names == ("{attn}.k_scale", "{attn}.v_scale")
    for bad in (replace(static, grid=signed(8)), replace(static, dynamic=True), replace(static, per="head")):
        with pytest.raises(UnsupportedError, match="vLLM's KV cache is FP8"):
            WRITER.config({}, KVSpec(static, bad))
    with pytest.raises(UnsupportedError, match="vLLM's KV cache is FP8"):
        WRITER.config({}, KVSpec(static, static, sinks=4))


def test_a_whole_folder_is_read_with_its_kv_scales(shared: Path) -> None:
    model = hf.read(shared / "checkpoints" / "llmc_kv")
    assert model.kv is not None and model.kv.k.scale is not None and model.kv.k.scale.shape == (2,)
    up = model.entries["layers.0.mlp.up"]
    assert (
        isinstance(up.data, QTensor)
        and up.data.block == (1, -1)
        and spelled(up.activation) == spelled(FP8_TOKEN)
    )
    assert isinstance(model.entries["head"].data, Tensor)
    assert any("compressed-tensors (float-quantized" in line for line in model.report)
