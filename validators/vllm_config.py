"""What vLLM's own config classes say of a quantized folder: of the build that is installed, and of one that is only unpacked.

The CUDA wheel can be imported without a GPU, and knows more methods and schemes than the CPU build (and refuses others), so a
machine without a GPU can ask what the build in production will say: `wheel` under [runtimes.vllm] in lconvert.toml.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lconvert.interpreters import interpreter
from lconvert.validators import foreign, vllm_config_worker
from lconvert.validators.proof import Proof, quantization_config
from lconvert.validators.runtimes.config import settings

_BUILDS = {"CpuPlatform": "CPU build", "CudaPlatform": "CUDA build", "UnspecifiedPlatform": "not run here"}


def check(proof: Proof, target: str) -> None:
    """A gate per build, where vLLM is the runtime of the proof and the folder was not written for TensorRT-LLM."""
    if "vllm" not in proof.runtimes or target == "trtllm" or not quantization_config(proof.path):
        return
    configured = settings("vllm")
    python = proof.options.python.get("vllm") or configured.python
    if python is None and find_spec("vllm") is None:
        return  # the runtime itself says what is missing
    for wheel in (None, configured.wheel) if configured.wheel else (None,):
        found = ask(interpreter(python) if python else sys.executable, proof.path, wheel)
        which = "" if wheel is None else f" ({wheel.name})"
        if "missing" in found:
            proof.not_proven.append(f"structure: config class of vLLM{which}: {found['missing']}")
            continue
        build = _BUILDS.get(found["platform"], found["platform"])
        what = f"{found['method']} accepts it ({found['version']}, {build})"
        proof.count("structure", f"config class of vLLM{which}", found["refused"], what)


def ask(python: str, folder: Path, wheel: Path | None) -> dict[str, Any]:
    """What `vllm_config_worker` answers; {"missing": why} where there is no answer."""
    paths = (folder, wheel) if wheel else (folder,)
    how = foreign.started(python, vllm_config_worker.__file__, *paths)
    try:
        done = subprocess.run(**how, capture_output=True, timeout=foreign.TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return {"missing": f"{python}: {e}"}
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    if done.returncode or not lines:
        return {"missing": foreign.failure(python, done.stderr)}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
