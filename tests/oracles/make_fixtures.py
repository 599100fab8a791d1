"""Makes tests/fixtures/peers anew: the tiny source model, and what each peer made of it.

    python tests/oracles/make_fixtures.py [--env DIR] [--work DIR]

Runs base_model.py and make_checkpoints.py on it, then copies the cases of FIXTURES without tokenizers and logs. A case
that is left out here differs from a kept one in nothing that a reader sees but the number of bits.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "fixtures" / "peers"
FILES = ("config.json", "quantize_config.json", "hf_quant_config.json", "model.safetensors", "oracle.json")
FIXTURES = {
    "llmcompressor": (
        "w2a16-g32",
        "w3a16-asym-g32",
        "w4a16-sym-g32-gptq",
        "w4a16-asym-g32",
        "w4a16-embedding",
        "w4afp8-g32",
        "w8a8-static-asym",
        "fp8-dynamic-kv",
        "fp8-block",
        "nvfp4",
        "mxfp4a16",
        "mixed-int4-fp8",
    ),
    "tao": (
        "bnb-nf4",
        "bnb-nf4-double",
        "bnb-int8",
        "hqq-4",
        "hqq-4-axis0",
        "hqq-3",
        "torchao-int8",
        "torchao-fp8",
    ),
    "gptqmodel": (
        "gptq-2-g32",
        "gptq-3-g32",
        "gptq-4-g32",
        "gptq-4-g32-asym",
        "gptq-4-g32-desc",
        "gptq2-4-g32-asym",
        "gptq-mixed",
    ),
    "autoround": ("awq-4-g32", "own-4-g32", "own-4-g32-asym"),
    "modelopt": (
        "fp8-kv",
        "fp8-pc-pt",
        "fp8-block",
        "int4-awq",
        "w4a8-awq",
        "int8-sq",
        "nvfp4a16",
        "nvfp4-fp8",
        "nvfp4-kv-nvfp4",
        "mxfp4",
        "mxfp8",
        "mixed",
    ),
    "transformers": ("fp8-32", "fp8-32-ue8m0", "gpt-oss-mxfp4", "bitnet", "bitnet-auto"),
}


def copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the fixtures written by the peers.")
    parser.add_argument("--env", type=Path, default=Path("peer-envs"), help="where environments are kept")
    parser.add_argument("--work", type=Path, default=Path("peer-work"), help="where checkpoints are written")
    options = parser.parse_args()
    base, out = options.work / "base", options.work / "tiny"
    cases = [f"{peer}-{case}" for peer, names in FIXTURES.items() for case in names]
    make = [sys.executable, str(HERE / "make_checkpoints.py"), "--model", str(base), "--out", str(out)]
    subprocess.run([sys.executable, str(HERE / "base_model.py"), str(base)], check=True)
    subprocess.run([*make, "--env", str(options.env), "--only", *cases], check=True)
    copy(base, TARGET / "base")
    for case in cases:
        copy(out / case, TARGET / case)


if __name__ == "__main__":
    main()
