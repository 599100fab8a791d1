"""Quantized artifacts: what presets make of plain models, and quantized sources that are carried into other formats.

Sources stand for what calibrated methods leave: scales with all bits of their mantissa in use, codes that are not the
nearest ones, columns assigned to groups in another order, input scales beside their matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.converters import targets
from lconvert.converters.mxfp4_experts import EXPERTS
from lconvert.executor import execute
from lconvert.ir import E4M3, ActSpec, Entry, Model, QTensor, Tensor, Transform, dense
from lconvert.kernels.qtensor import values
from lconvert.passes import activations, kv, rtn
from lconvert.plan import refusals
from tests.conftest import ROOT


@dataclass(frozen=True)
class Made:
    """A folder made of a plain model: preset of one of the tables in converters/targets.py, written as `target`.

    table: whose presets.
    """

    preset: str
    target: str = ""
    group: int | None = None
    kv: bool = False
    table: str = "vllm"


_TABLES = {"vllm": targets.VLLM, "tensorrt-llm": targets.TENSORRT_LLM}

#: Kinds of artifacts besides GGUF types.
PRESETS: Mapping[str, Made] = {
    "w4a16": Made("w4a16"),
    "w4a16 g32": Made("w4a16", group=32),
    "w4a16-asym": Made("w4a16-asym", group=64),
    "w8a8": Made("w8a8"),
    "fp8": Made("fp8"),
    "fp8 kv": Made("fp8", kv=True),
    "fp8-static": Made("fp8-static"),
    "fp8-block": Made("fp8-block"),
    "nvfp4": Made("nvfp4"),
    "nvfp4a16": Made("nvfp4a16"),
    "mxfp4": Made("mxfp4"),
    "gptq": Made("gptq"),
    "gptq-v2": Made("gptq", "gptq_v2", group=64),
    "gptq-v2-asym": Made("w4a16-asym", "gptq_v2"),
    "awq": Made("awq"),
    "deepseek-fp8": Made("fp8-block", "fp8"),
    "modelopt-fp8": Made("fp8", table="tensorrt-llm"),
    "modelopt-fp8-pc": Made("fp8-pc-pt", table="tensorrt-llm"),
    "modelopt-nvfp4": Made("nvfp4", table="tensorrt-llm"),
    "modelopt-int4": Made("w4a16-awq", table="tensorrt-llm"),
}


@dataclass(frozen=True)
class Source:
    """A quantized folder: `change` of the plain model `base`, written as `target`. carried: targets that hold it exactly."""

    base: str
    target: str
    change: Callable[[Model], Model]
    carried: tuple[str, ...]


def _rounded(grid: str, group: int | str, targets: str = "") -> Callable[[Model], Model]:
    options: dict[str, Any] = {"grid": grid, "group": group} | ({"targets": targets} if targets else {})
    return lambda m: rtn.run(m, rtn.Options(**options))


def _matrices(model: Model) -> dict[str, Entry]:
    return {n: e for n, e in sorted(model.entries.items()) if isinstance(e.data, QTensor)}


def _calibrated(grid: str, group: int) -> Callable[[Model], Model]:
    """Rounded to nearest, then every scale moved, so that all its bits are in use and codes are not the nearest."""

    def change(model: Model) -> Model:
        rng, new = np.random.default_rng(8), {}
        made = _rounded(grid, group)(model)
        for name, e in _matrices(made).items():
            q = e.data
            assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
            x = values(q.scale, 0, q.scale.rows) * rng.uniform(0.75, 1.25, q.scale.shape)
            new[name] = replace(e, data=replace(q, scale=dense(x.astype(np.float16))))
        return made.with_entries(new)

    return change


def _act_order(model: Model) -> Model:
    """Columns of the down projections assigned to groups in random order."""
    rng, new = np.random.default_rng(4), {}
    made = _calibrated("int4", 32)(model)
    for name, e in _matrices(made).items():
        q = e.data
        assert isinstance(q, QTensor)
        if name.endswith(".down"):
            order = rng.permutation(np.arange(q.shape[1]) // q.block[1]).astype(np.int32)
            new[name] = replace(e, data=replace(q, g_idx=dense(order)))
    return made.with_entries(new)


def _nvfp4(model: Model) -> Model:
    """NVFP4 as compressed-tensors has it: global scales that divide, tied within fused modules, and no powers of two."""
    made, new = _rounded("fp4", 16)(model), {}
    for at, (name, e) in enumerate(_matrices(made).items()):
        q = e.data
        assert isinstance(q, QTensor) and isinstance(q.scale, QTensor) and isinstance(q.scale.scale, Tensor)
        by = {"q": 1.3, "k": 1.3, "v": 1.3, "gate": 1.7, "up": 1.7}.get(name.rpartition(".")[2], 1 + at / 64)
        scale = dense((np.float32(by) / q.scale.scale.load()).astype(np.float32))
        new[name] = replace(e, data=replace(q, scale=replace(q.scale, scale=scale, divisor=True)))
    return made.with_entries(new)


def _served(model: Model) -> Model:
    """FP8 weights and activations, and a cache of which every layer has scales of its own."""
    made = kv.run(activations.run(_rounded("fp8", -1)(model), activations.Options("fp8")), kv.Options())
    assert made.kv is not None
    n = np.arange(made.arch.layers, dtype=np.float32)
    k, v = dense(np.float32(0.0625) + n / 64), dense(np.float32(0.015625) + n / 128)
    cache = replace(made.kv, k=replace(made.kv.k, scale=k), v=replace(made.kv.v, scale=v))
    return replace(made, kv=cache)


def _blocks(model: Model) -> Model:
    return activations.run(_rounded("fp8", "block")(model), activations.Options("fp8", group=128))


def _static(model: Model) -> Model:
    """FP8 with a scale per tensor for weights and inputs; those of fused modules are one number."""
    made, rng, seen, new = _rounded("fp8", "tensor")(model), np.random.default_rng(6), {}, {}
    for name, e in _matrices(made).items():
        key = name.replace(".k", ".q").replace(".v", ".q").replace(".up", ".gate")
        scale = seen.setdefault(key, dense(rng.uniform(0.01, 0.1, 1).astype(np.float32)))
        new[name] = replace(e, activation=ActSpec(E4M3, "tensor", False, scale=scale))
    return made.with_entries(new)


def _smoothed(model: Model) -> Model:
    """int4 with an input scale beside the down projections, which no norm in front of them can take (AWQ before folding)."""
    made, rng = _calibrated("int4", 128)(model), np.random.default_rng(12)
    new = {}
    for name, e in _matrices(made).items():
        if name.endswith(".down"):
            x = rng.uniform(0.5, 2, e.shape[1]).astype(np.float32)
            new[name] = replace(e, transform=Transform("scale", "input", dense(x), False))
    return made.with_entries(new)


#: Name -> how it is made.
SOURCES: Mapping[str, Source] = {
    "llama-gptq": Source("llama", "gptq", _calibrated("int4", 32), ("vllm", "gptq", "gptq_v2", "awq", "gguf")),
    "demo-gptq": Source("demo", "gptq", _calibrated("int4", 128), ("vllm", "gptq", "gptq_v2", "awq", "gguf")),
    "llama-awq": Source("llama", "awq", _calibrated("uint4", 64), ("vllm", "gptq_v2", "awq", "gguf")),
    "demo-awq": Source("demo", "awq", _rounded("uint4", 32), ("vllm", "gptq_v2", "gguf")),
    "llama-w8a8": Source("llama", "compressed-tensors", lambda m: activations.run(_calibrated("int8", -1)(m), activations.Options("int8")), ("vllm", "gguf")),
    "llama-nvfp4": Source("llama", "compressed-tensors", _nvfp4, ("vllm", "modelopt", "gguf")),
    "demo-nvfp4": Source("demo", "compressed-tensors", _nvfp4, ("vllm", "modelopt", "gguf")),
    "llama-mxfp4": Source("llama", "compressed-tensors", _rounded("MXFP4", 32), ("vllm", "gguf")),
    "gpt_oss-mxfp4": Source("gpt_oss", "mxfp4", _rounded("MXFP4", 32, EXPERTS), ("vllm", "gguf")),
    "llama-fp8": Source("llama", "compressed-tensors", _served, ("vllm", "modelopt")),
    "llama-fp8-block": Source("llama", "fp8", _blocks, ("vllm", "modelopt", "fp8")),
    "llama-static": Source("llama", "compressed-tensors", _static, ("vllm", "modelopt")),
    "llama-act-order": Source("llama", "gptq", _act_order, ("vllm", "gptq", "gguf")),
    "llama-smoothed": Source("llama", "modelopt", _smoothed, ("vllm", "gguf")),
}  # fmt: skip


def write(model: Model, target: str, path: Path, original: Model | None = None) -> Path:
    """`model` as a target, without its manifest, which is left beside it as PATH.manifest."""
    plan = targets.plan(model, target, path.name, original=original)
    assert not refusals(plan), refusals(plan)[0]
    file = targets.TARGETS[target].kind == "gguf"
    execute(plan, path.parent if file else path)
    beside = path.with_name(path.name + ".manifest.json") if file else path / "config.json.manifest.json"
    beside.rename(path.with_name(path.name + ".manifest"))
    return path


def made(model: Model, kind: str, path: Path, work: Path) -> Path:
    """What a preset makes of a plain model. A short text under `work` shows the range of its activations."""
    m = PRESETS[kind]
    text = work / "calibration.txt"
    if not text.exists():
        whole = (ROOT / "validators" / "text" / "excerpt.txt").read_text(encoding="utf-8")
        text.write_text(whole[:1500], encoding="utf-8")
    table = _TABLES[m.table]
    recipe = targets.recipe(m.preset, table, calibration=str(text), group=m.group, kv=m.kv)
    served = targets.for_vllm(table[m.preset].format) if m.table == "vllm" else m.table
    return write(recipe.apply(model), m.target or served, path, model)
