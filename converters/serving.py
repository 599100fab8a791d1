"""What runtimes refuse or ignore in a folder whose layout is sound: the rules of their loaders, each with its source.

vLLM 0.32/0.33 and TensorRT-LLM 1.3; a rule goes when its runtime learns better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lconvert.formats.scheme import Held
from lconvert.ir import E4M3, QTensor

Rule = Callable[[Held, tuple[int, ...]], str | None]


def _vllm_gptq(held: Held, shape: tuple[int, ...]) -> str | None:
    """vllm/model_executor/layers/quantization/auto_gptq.py: TYPE_MAP has (4, sym) and (8, sym); desc_act went with #54809."""
    q = held.weight
    if q is None:
        return None
    if q.g_idx is not None:
        return "vLLM no longer serves act-order (desc_act), and would ignore its g_idx"
    if q.zero is not None:
        return (
            "vLLM serves GPTQ with symmetric weights only; compressed-tensors holds zero points (--to vllm)"
        )
    if q.grid.bits not in (4, 8):
        return f"vLLM serves GPTQ of 4 and 8 bits, not {q.grid.bits}"
    return None


def _vllm_packed(held: Held, shape: tuple[int, ...]) -> str | None:
    q = held.weight
    if q is not None and q.g_idx is not None:
        return "vLLM no longer serves act-order (actorder group); --allow-requantize rounds the matrix again"
    return _vllm_block(held, shape)


def _vllm_block(held: Held, shape: tuple[int, ...]) -> str | None:
    """vllm/model_executor/layers/quantization/utils/fp8_utils.py validate_fp8_block_shape: shards must be whole blocks."""
    q = held.weight
    if q is None or q.grid != E4M3 or min(q.block) <= 1 or not isinstance(q.block[0], int):
        return None
    if any(n % b for n, b in zip(shape, q.block, strict=True)):
        return f"vLLM serves block FP8 only where {shape} divides into blocks of {q.block}; use --fp8 (a scale per row)"
    return None


def _vllm_modelopt(held: Held, shape: tuple[int, ...]) -> str | None:
    """vllm/model_executor/layers/quantization/modelopt.py: FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4, MXFP8."""
    q = held.weight
    if q is not None and q.grid.kind == "int":
        return "vLLM loads no integer algorithm of ModelOpt; compressed-tensors holds it (--to vllm)"
    if held.transform is not None:
        return "vLLM has no pre_quant_scale"
    return None


def _trt(held: Held, shape: tuple[int, ...]) -> str | None:
    """TensorRT-LLM, cpp/tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/fpA_intB_gemm_template.h: int4 weights in groups of 64
    or 128, of 128 alone beside FP8 activations."""
    q = held.weight
    if q is None or q.grid.kind != "int" or q.grid.bits != 4:
        return None
    groups = (64, 128) if held.activation is None else (128,)
    if q.block[1] not in groups:
        served = " or ".join(map(str, groups))
        return f"TensorRT-LLM's int4 kernels take groups of {served}, this weight has groups of {q.block[1]}"
    return None


RULES: Mapping[tuple[str, str], Rule] = {
    ("vllm", "gptq"): _vllm_gptq,
    ("vllm", "gptq_v2"): _vllm_gptq,
    ("vllm", "compressed-tensors"): _vllm_packed,
    ("vllm", "fp8"): _vllm_block,
    ("vllm", "modelopt"): _vllm_modelopt,
    ("tensorrt-llm", "modelopt"): _trt,
}

#: Formats that a runtime does not load at all.
UNSERVED: Mapping[tuple[str, str], str] = {
    (
        "vllm",
        "bitsandbytes",
    ): "vLLM 0.32 has no bitsandbytes loader any more (RFC vllm #39583); choose --nvfp4a16 or --w4a16",
}


def problem(runtime: str, format: str, held: Held, shape: tuple[int, ...]) -> str | None:
    """Why `runtime` would not serve this module as it is, or None."""
    rule = RULES.get((runtime, format))
    return UNSERVED.get((runtime, format)) or (rule(held, shape) if rule else None)


def notes(runtime: str, format: str, weights: list[QTensor]) -> list[str]:
    """What a user should know before serving."""
    widths = {q.grid.bits for q in weights if q.grid.kind == "int"}
    out = []
    if runtime == "vllm" and format == "compressed-tensors" and (odd := sorted(widths - {4, 8})):
        out.append(f"integer weights of {', '.join(map(str, odd))} bits need vLLM's Humming kernels (CUDA)")
    return out
