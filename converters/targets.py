"""Every target by name, what `lconvert convert --to` and the carry matrix offer, and the schemes that flags stand for.

Imports without NumPy: the help of verbs is made of these tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lconvert.converters import methods
from lconvert.errors import OptionError
from lconvert.ir import Model
from lconvert.plan import KINDS, Plan
from lconvert.primitives.job import Calibration
from lconvert.recipe import Recipe, Step, step


@dataclass(frozen=True)
class Target:
    """kind: which planner. format, runtime: of a Hugging Face folder (checkpoint.Options); `otherwise` is taken where `format`
    cannot hold everything as faithfully and it can, `experts` for a gpt-oss whose experts are MXFP4."""

    about: str
    kind: str = "checkpoint"
    format: str = ""
    runtime: str = ""
    otherwise: str = ""
    experts: str = ""


TARGETS: Mapping[str, Target] = {
    "gguf": Target("a GGUF file for llama.cpp", "gguf"),
    "vllm": Target(
        "a folder that vLLM serves: compressed-tensors, ModelOpt where only that is exact, gpt-oss's own",
        format="compressed-tensors",
        runtime="vllm",
        otherwise="modelopt",
        experts="mxfp4",
    ),
    "tensorrt-llm": Target(
        "a ModelOpt folder within TensorRT-LLM's rules, or gpt-oss's own",
        format="modelopt",
        runtime="tensorrt-llm",
        experts="mxfp4",
    ),
    "vllm-gptq": Target("a GPTQ folder within vLLM's rules", format="gptq", runtime="vllm"),
    "vllm-awq": Target("an AWQ folder within vLLM's rules", format="awq", runtime="vllm"),
    "compressed-tensors": Target("a compressed-tensors folder", format="compressed-tensors"),
    "gptq": Target("a GPTQ folder, v1", format="gptq"),
    "gptq_v2": Target("a GPTQ folder, v2 (zero points as they are)", format="gptq_v2"),
    "awq": Target("an AWQ folder, gemm layout", format="awq"),
    "fp8": Target("a block-FP8 folder as DeepSeek's", format="fp8"),
    "modelopt": Target("a ModelOpt folder (hf_quant_config.json)", format="modelopt"),
    "bitsandbytes": Target("a bitsandbytes folder for QLoRA", format="bitsandbytes"),
    "mxfp4": Target("a folder as gpt-oss is released: experts in MXFP4, all else plain", format="mxfp4"),
    "onnx": Target("an ONNX graph for ONNX Runtime: a folder with model.onnx", "onnx"),
    "ir": Target("lconvert's own format, .lcir", "ir"),
    "dense": Target("a plain Hugging Face folder, dequantized", format="dense"),
}

#: What `--to` offers; the other two are what flags of hf-to-vllm stand for.
OFFERED = tuple(name for name in TARGETS if name not in ("vllm-gptq", "vllm-awq"))


def plan(model: Model, target: str, out_name: str, *, original: Model | None = None, **options: Any) -> Plan:
    """The plan of `model` as a target, under the name `out_name` (a file for gguf, a folder otherwise).

    options: dtype, allow_requantize, allow_loss. original: the model before passes, against which roundings are measured.
    """
    if target not in TARGETS:
        raise OptionError(f"target {target!r}; choose {', '.join(TARGETS)}")
    t = TARGETS[target]
    if options.get("dtype") and t.kind not in ("checkpoint", "onnx"):
        raise OptionError(f"--dtype does not apply to {target}, whose tensors keep their types")
    if t.kind == "gguf":
        from lconvert.converters import gguf, gguf_mixture

        types = gguf_mixture.Options(ftype="COPY")
        loss: Sequence[str] = options.get("allow_loss", ())
        requantize = bool(options.get("allow_requantize"))
        return gguf.plan(
            model, out_name, gguf.Options(types, allow_requantize=requantize, allow_loss=tuple(loss))
        )
    if t.kind == "ir":
        from lconvert.converters import lcir

        return lcir.plan(model, {})
    if t.kind == "onnx":
        from lconvert.converters import onnx

        return onnx.plan(model, onnx.Options(dtype=options.get("dtype")), original)
    from lconvert.converters import checkpoint, mxfp4_experts

    packed = bool(t.experts) and mxfp4_experts.wanted(model)
    chosen = checkpoint.Options(
        format=t.experts if packed else t.format,
        runtime=t.runtime,
        dtype=options.get("dtype"),
        allow_requantize=bool(options.get("allow_requantize")),
    )
    first = checkpoint.plan(model, chosen, original)
    if packed or not t.otherwise or _faith(first) <= KINDS.index("quantized"):
        return first
    second = checkpoint.plan(model, replace(chosen, format=t.otherwise), original)
    return second if _faith(second) < _faith(first) else first


def _faith(plan: Plan) -> int:
    """The worst verdict of a plan's quantized matrices and what belongs to them; plain tensors are rounded alike everywhere."""
    kinds = [i.verdict.kind for i in plan.items() if i.type == "-" or i.held]
    return max((KINDS.index(k) for k in kinds), default=0)


# --- what flags stand for --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """What a flag does to weights that are not quantized yet. steps: passes with options; calibrated: needs a text."""

    about: str
    format: str = "compressed-tensors"
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    calibrated: bool = False


#: Windows of a text that show the largest inputs.
PEAK_WINDOWS = 32


def _rtn(grid: str, group: int | str = 128) -> tuple[str, Mapping[str, Any]]:
    return "rtn", {"grid": grid, "group": group}


_INT8 = ("activations", {"grid": "int8"})
_FP8 = ("activations", {"grid": "fp8"})
_FP8_STATIC = ("activations", {"grid": "fp8", "dynamic": False})
_FP4 = ("activations", {"grid": "fp4"})

VLLM: Mapping[str, Preset] = {
    "w4a16": Preset("int4 weights, symmetric, groups of 128", steps=(_rtn("int4"),)),
    "w4a16-asym": Preset("int4 weights with zero points, groups of 128", steps=(_rtn("uint4"),)),
    "w8a16": Preset("int8 weights, a scale per row", steps=(_rtn("int8", -1),)),
    "w8a8": Preset("int8 weights and activations, dynamic per token", steps=(_rtn("int8", -1), _INT8)),
    "fp8": Preset(
        "FP8 weights (a scale per row) and activations, dynamic per token", steps=(_rtn("fp8", -1), _FP8)
    ),
    "fp8-static": Preset(
        "FP8 weights and activations, a scale per tensor",
        steps=(_rtn("fp8", "tensor"), _FP8_STATIC),
        calibrated=True,
    ),
    "fp8-block": Preset(
        "FP8 weights in blocks of 128 x 128",
        steps=(_rtn("fp8", "block"), ("activations", {"grid": "fp8", "group": 128})),
    ),
    "nvfp4": Preset("NVFP4 weights and activations", steps=(_rtn("fp4"), _FP4), calibrated=True),
    "nvfp4a16": Preset("NVFP4 weights", steps=(_rtn("fp4"),)),
    "mxfp4": Preset("MXFP4 weights (of gpt-oss the experts alone)", steps=(_rtn("MXFP4"),)),
    "gptq": Preset("int4 weights, symmetric, groups of 128, in a GPTQ folder", "gptq", (_rtn("int4"),)),
    "awq": Preset("int4 weights with zero points, groups of 128, in an AWQ folder", "awq", (_rtn("uint4"),)),
    "dense": Preset("plain weights", "dense"),
}

TENSORRT_LLM: Mapping[str, Preset] = {
    "fp8": Preset("FP8, a scale per tensor, static activations", "modelopt", (_rtn("fp8", "tensor"), _FP8_STATIC), calibrated=True),
    "fp8-pc-pt": Preset("FP8, a scale per row, activations per token", "modelopt", (_rtn("fp8", -1), _FP8)),
    "nvfp4": Preset("NVFP4 weights and activations", "modelopt", (_rtn("fp4"), _FP4), calibrated=True),
    "nvfp4a16": Preset("NVFP4 weights", "modelopt", (_rtn("fp4"),)),
    "w4a16-awq": Preset("int4 weights, symmetric, groups of 128", "modelopt", (_rtn("int4"),)),
    "w8a8-sq": Preset(
        "int8 weights per row, static int8 activations", "modelopt",
        (_rtn("int8", -1), ("activations", {"grid": "int8", "dynamic": False})), calibrated=True,
    ),
    "dense": Preset("plain weights", "dense"),
}  # fmt: skip


class ForLayout(Recipe):
    """The passes of a preset: MXFP4 is for the experts alone where the model's own folder layout has a place for no others."""

    def of(self, model: Model) -> Recipe:
        from lconvert.converters import mxfp4_experts

        if not mxfp4_experts.stacks(model):
            return self
        narrow = {"targets": mxfp4_experts.EXPERTS}
        steps = (
            replace(s, options=replace(s.options, **narrow))
            if getattr(s.options, "grid", "") == "MXFP4"
            else s
            for s in self.steps
        )
        return Recipe(self.name, tuple(steps), self.about, self.calibration)


def recipe(
    preset: str,
    table: Mapping[str, Preset],
    *,
    calibration: str = "",
    group: int | None = None,
    kv: bool = False,
    method: str = "",
) -> Recipe:
    """The passes of a preset, by a method; OptionError where a calibration text is missing or `group` does not apply."""
    p = table[preset]
    if p.calibrated and not calibration:
        raise OptionError(f"--{preset} has static scales, which a text must show; add --calibrate TEXT")
    steps: list[Step] = []
    for name, given in p.steps:
        options = dict(given)
        if name == "rtn" and group is not None:
            if not isinstance(options["group"], int) or not str(options["grid"]).lstrip("u").startswith(
                "int"
            ):
                raise OptionError(f"--group does not apply to --{preset}, whose blocks are fixed")
            options["group"] = group
        steps.append(step(name, options))
    if kv:
        steps.append(step("kv", {}))
    made = ForLayout(f"--{preset}", tuple(steps), p.about, Calibration(calibration, windows=PEAK_WINDOWS))
    return methods.applied(method, made, calibration) if method else made


def for_vllm(format: str) -> str:
    """The target that has this format within vLLM's rules."""
    if format == "dense":
        return "dense"
    return next(n for n, t in TARGETS.items() if (t.format, t.runtime) == (format, "vllm"))


# --- launching ---------------------------------------------------------------------------------------------


def launch(target: str, folder: str) -> str:
    """The command that serves an artifact."""
    t = TARGETS[target]
    if t.kind == "gguf":
        return f"llama-server -m {folder}"
    if t.runtime == "tensorrt-llm":
        return f"trtllm-serve {folder}"
    if t.kind == "checkpoint" and t.format != "bitsandbytes":
        return f"vllm serve {folder}"
    return ""
