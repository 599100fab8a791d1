"""What benchmarks/quality.py compares: methods on a grid, and who runs them under which case of benchmarks/peers.

Within a row everybody has the same bits, group and symmetry. Options that a peer sets by itself are left as they are (GPTQModel damps
by 0.05, the others by 0.01; llm-compressor orders columns by activations and keeps groups where they are (static) unless told otherwise,
GPTQModel orders them within groups); what differs from that is in the name of the case, and in the JSON. ModelOpt's MXFP4 rounds
inputs, too, but its checkpoints do not say so: it is among those of weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OURS = "lconvert"
LLMC, GPTQM, AUTOROUND, MODELOPT = "llmcompressor", "gptqmodel", "autoround", "modelopt"
LLAMACPP = "llama.cpp"
#: Key -> name in tables and plots.
MAKERS: Mapping[str, str] = {
    OURS: "lconvert",
    LLMC: "llm-compressor",
    GPTQM: "GPTQModel",
    AUTOROUND: "AutoRound",
    MODELOPT: "ModelOpt",
    LLAMACPP: "llama.cpp",
}


@dataclass(frozen=True)
class Method:
    """name: of the method; grid: what it rounds to; cases: maker -> its cases."""

    name: str
    grid: str
    cases: Mapping[str, tuple[str, ...]]


def _gptq(code: str, *more: str) -> dict[str, tuple[str, ...]]:
    """GPTQ and GPTAQ by everybody who has them; `more` are other options of the same grid."""
    return {
        OURS: (f"gptq-{code}", f"gptaq-{code}"),
        LLMC: (f"gptq-{code}", *(f"gptq-{code}-{m}" for m in more)),
        GPTQM: (f"gptq-{code}", f"gptaq-{code}", *(f"gptq-{code}-{m}" for m in more)),
    }


METHODS = (
    Method("RTN", "int4 g128", {OURS: ("rtn-w4g128", "rtn-mse-w4g128", "rtn-w4g128-importance", "rtn-w4g128-importance-signed"), LLMC: ("rtn-w4g128", "rtn-w4g128-mse"), MODELOPT: ("rtn-w4g128",),
                                AUTOROUND: ("rtn-w4g128",)}),
    Method("RTN", "int4 g32", {OURS: ("rtn-w4g32", "rtn-mse-w4g32", "rtn-w4g32-importance", "rtn-w4g32-importance-signed"), LLMC: ("rtn-w4g32", "rtn-w4g32-mse")}),
    Method("RTN", "int3 g128", {OURS: ("rtn-w3g128", "rtn-mse-w3g128", "rtn-w3g128-importance", "rtn-w3g128-importance-signed"), LLMC: ("rtn-w3g128", "rtn-w3g128-mse")}),
    Method("GPTQ", "int4 g128", _gptq("w4g128", "plain", "actorder", "mse")),
    Method("GPTQ", "int4 g32", _gptq("w4g32", "mse")),
    Method("GPTQ", "int3 g128", _gptq("w3g128", "mse")),
    Method("GPTQ", "uint4 g128", {OURS: ("gptq-w4g128-asym", "gptaq-w4g128-asym"), LLMC: ("gptq-w4g128-asym",), GPTQM: ("gptq-w4g128-asym",)}),
    Method("AWQ", "int4 g128", {OURS: ("awq-w4g128",), LLMC: ("awq-w4g128",), MODELOPT: ("awq-w4g128",), GPTQM: ("awq-w4g128",)}),
    Method("AWQ", "uint4 g128", {OURS: ("awq-w4g128-asym",), LLMC: ("awq-w4g128-asym",), GPTQM: ("awq-w4g128-asym",)}),
    *(Method("AutoRound", grid, {OURS: (f"autoround-{code}", f"autoround-{code}-signed"), AUTOROUND: (f"autoround-{code}",)})
      for grid, code in (("int4 g128", "w4g128"), ("int4 g32", "w4g32"), ("int3 g128", "w3g128"), ("int2 g32", "w2g32"))),
    Method("RTN", "W8A8", {OURS: ("w8a8",), LLMC: ("w8a8",), MODELOPT: ("w8a8",)}),
    Method("SmoothQuant", "W8A8", {OURS: ("smoothquant-w8a8",), LLMC: ("smoothquant-w8a8",), MODELOPT: ("smoothquant-w8a8",)}),
    Method("RTN", "FP8 dynamic", {OURS: ("fp8-dynamic",), LLMC: ("fp8-dynamic",), MODELOPT: ("fp8-dynamic",)}),
    Method("RTN", "FP8 static", {OURS: ("fp8-static",), LLMC: ("fp8-static",), MODELOPT: ("fp8-static",)}),
    Method("RTN", "NVFP4 weights", {OURS: ("nvfp4",), LLMC: ("nvfp4a16",), MODELOPT: ("nvfp4a16",)}),
    Method("GPTQ", "NVFP4 weights", {OURS: ("gptq-nvfp4",), LLMC: ("nvfp4a16-gptq",)}),
    Method("RTN", "NVFP4 W4A4", {OURS: ("nvfp4-w4a4",), LLMC: ("nvfp4",), MODELOPT: ("nvfp4", "nvfp4-mse", "nvfp4-4over6", "nvfp4-hessian")}),
    Method("RTN", "MXFP4 weights", {OURS: ("mxfp4",), LLMC: ("mxfp4a16",), MODELOPT: ("mxfp4",)}),
    Method("GPTQ", "MXFP4 weights", {OURS: ("gptq-mxfp4",), LLMC: ("mxfp4a16-gptq",)}),
    Method("RTN", "MXFP4 W4A4", {OURS: ("mxfp4-w4a4",), LLMC: ("mxfp4",)}),
    *(Method("SparseGPT", f"{kind}", {OURS: (f"sparsegpt-{code}",), LLMC: (f"sparsegpt-{code}",)})
      for kind, code in (("50%", "50"), ("2:4", "2of4"))),
    *(Method("Wanda", f"{kind}", {OURS: (f"wanda-{code}",), LLMC: (f"wanda-{code}",)})
      for kind, code in (("50%", "50"), ("2:4", "2of4"))),
    Method("GPTQ", "Q4_K", {OURS: ("gptq-q4_k",)}),
    Method("AutoRound", "Q4_K", {OURS: ("autoround-q4_k",)}),
    Method("GPTQ", "Q3_K", {OURS: ("gptq-q3_k",)}),
    Method("GPTQ", "Q2_K", {OURS: ("gptq-q2_k",)}),
)  # fmt: skip

#: llama.cpp's mixtures, with and without an importance matrix.
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K")
