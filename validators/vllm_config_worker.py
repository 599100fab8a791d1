"""vLLM's own config classes on a folder's quantization_config, in an interpreter that has vLLM: run as a script, it imports
nothing of lconvert.

Arguments: the folder and, optionally, an unpacked wheel of another build, which is imported instead: the CUDA wheel imports
without a GPU and knows which methods and schemes that build takes. Standard output gets one line of JSON: {"version", "platform",
"method", "refused"}, or {"missing"} where vLLM cannot be imported.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

# The order in which vllm/config/model.py asks methods whether a config is theirs; those that it does not list come first.
_ASKED_LAST = (
    "auto_gptq",
    "gptq",
    "gptq_marlin",
    "auto_awq",
    "awq",
    "awq_marlin",
    "inc",
    "moe_wna16",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mxfp8",
    "mxfp8",
    "modelopt_mixed",
    "mxfp4",
    "gpt_oss_mxfp4",
    "deepseek_v4_fp8",
    "humming",
)


def _method(about: dict[str, Any], config: dict[str, Any], quantization: Any) -> str:
    """The method that vLLM's engine resolves: the first that claims the config, else the one that the config names."""
    known = list(quantization.QUANTIZATION_METHODS)
    from types import SimpleNamespace

    hf = SimpleNamespace(model_type=config.get("model_type"), architectures=config.get("architectures"))
    for name in [n for n in known if n not in _ASKED_LAST] + [n for n in _ASKED_LAST if n in known]:
        try:
            claim = quantization.get_quantization_config(name).override_quantization_method(
                about, None, hf_config=hf
            )
        except ImportError:
            continue  # a method whose own package is missing here
        if claim is not None:
            return str(claim)
    return str(about.get("quant_method", ""))


def _refused(made: Any) -> list[str]:
    """Schemes of a compressed-tensors config that this build has no class for."""
    schemes = getattr(made, "target_scheme_map", None)
    find = getattr(made, "_get_scheme_from_parts", None)
    out: list[str] = []
    if schemes is None or find is None:
        return out
    for target, parts in schemes.items():
        try:
            find(parts.get("weights"), parts.get("input_activations"), format=parts.get("format"))
        except NotImplementedError as e:
            out.append(f"{target}: {e}")
        except Exception as e:  # noqa: BLE001 - it was found, and its kernels want another machine
            print(f"{target}: {type(e).__name__}: {e}", file=sys.stderr)
    return out


def main(folder: Path, wheel: str | None) -> dict[str, Any]:
    if wheel:
        sys.path.insert(0, wheel)
    try:
        vllm = importlib.import_module("vllm")
        quantization = importlib.import_module("vllm.model_executor.layers.quantization")
        platform = type(importlib.import_module("vllm.platforms").current_platform).__name__
    except Exception as e:  # noqa: BLE001 - whatever keeps it from being imported is the answer
        return {"missing": f"{type(e).__name__}: {e}"}
    config = json.loads((folder / "config.json").read_text())
    about = config["quantization_config"]
    method = _method(about, config, quantization)
    answer = {"version": vllm.__version__, "platform": platform, "method": method}
    try:
        made = quantization.get_quantization_config(method).from_config(about)
    except ImportError as e:
        return {"missing": str(e)}
    except Exception as e:  # noqa: BLE001 - whatever it raises is its refusal
        return {**answer, "refused": [f"{type(e).__name__}: {e}"]}
    return {**answer, "refused": _refused(made)}


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # standard output for the answer alone
    print(
        json.dumps(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)), file=out, flush=True
    )
