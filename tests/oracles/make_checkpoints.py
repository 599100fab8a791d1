"""Writes quantized checkpoints with the tools of others, as truth for the readers of quantized checkpoints.

    python tests/oracles/make_checkpoints.py --model DIR --out DIR [--text FILE] [--only NAME ...] [--env DIR]

One virtual environment per peer is made with uv below --env and kept there; inside it the script peer_PEER.py writes
OUT/PEER-CASE with the checkpoint and oracle.json, and beside it OUT/PEER-CASE.dequantized.safetensors (see
peer_io.write_oracle). NAME is a peer (gptqmodel) or one of its cases (gptqmodel-awq-gemm-g32). Everything runs on the
CPU: torch must be resolvable as the +cpu build named in CPU_TORCH (uv's UV_FIND_LINKS or UV_INDEX say where; pip's
find-links are handed on to uv).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU_TORCH = "torch==2.13.0+cpu"
# Not needed for language models, and there is no CPU build of them beside the torch above.
NEVER = tuple(f'{name} ; sys_platform == "never"' for name in ("torchvision", "torchaudio", "torchcodec"))


@dataclass(frozen=True)
class Peer:
    """What to install for a peer; `overrides` replace what its packages ask for; `shares` names another's environment."""

    packages: tuple[str, ...]
    overrides: tuple[str, ...] = NEVER
    shares: str | None = None


PEERS = {
    "llmcompressor": Peer(("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0")),
    "tao": Peer(
        (
            "torchao==0.18.0",
            "bitsandbytes==0.50.2",
            "hqq==0.2.8",
            "transformers==5.23.0",
            "accelerate==1.15.0",
        )
    ),
    "transformers": Peer((), shares="tao"),
    "gptqmodel": Peer(("gptqmodel==7.7.0", "transformers==5.23.0"), overrides=(*NEVER, CPU_TORCH)),
    "modelopt": Peer(("nvidia-modelopt[hf]==0.47.0", "transformers==5.14.1")),
    "autoround": Peer(("auto-round==0.16.1", "compressed-tensors==0.19.0", "transformers==5.23.0")),
}

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
}


def uv_environment() -> dict[str, str]:
    """The process environment, with pip's find-links for uv, which does not read pip's configuration."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"],
        capture_output=True,
        text=True,
        check=False,
    )
    links = asked.stdout.strip() if asked.returncode == 0 else ""
    found = {"UV_FIND_LINKS": links} if links and "UV_FIND_LINKS" not in os.environ else {}
    # GPTQModel builds CUDA extensions unless told not to.
    return {**os.environ, "UV_SYSTEM_CERTS": "1", "BUILD_CUDA_EXT": "0", **found}


def python_of(name: str, root: Path) -> Path:
    """The interpreter of the peer's environment below `root`, made on the first call."""
    peer = PEERS[name]
    if peer.shares:
        return python_of(peer.shares, root)
    folder = root / name
    python = folder / "bin" / "python"
    if (folder / ".complete").exists():
        return python
    constraints, overrides = root / f"{name}.constraints.txt", root / f"{name}.overrides.txt"
    root.mkdir(parents=True, exist_ok=True)
    constraints.write_text(f"{CPU_TORCH}\n")
    overrides.write_text("\n".join(peer.overrides) + "\n")
    install = ["--python", str(python), "--constraint", str(constraints), "--override", str(overrides)]
    environment = uv_environment()
    for command in (
        ["uv", "venv", "--clear", "--python", "3.11", str(folder)],
        ["uv", "pip", "install", *install, CPU_TORCH, *peer.packages],
    ):
        subprocess.run(command, check=True, env=environment)
    (folder / ".complete").touch()
    return python


def run(name: str, cases: Sequence[str], options: argparse.Namespace) -> bool:
    """Runs a peer's script in its environment; False when a case failed (the script says which)."""
    command = [str(python_of(name, options.env)), str(HERE / f"peer_{name}.py")]
    command += ["--model", str(options.model), "--out", str(options.out)]
    if options.text:
        command += ["--text", str(options.text)]
    if cases:
        command += ["--only", *cases]
    return subprocess.run(command, env={**os.environ, **OFFLINE}, check=False).returncode == 0


def chosen(names: Sequence[str]) -> dict[str, list[str]]:
    """Peer -> the cases asked for, empty for all. ValueError when a name belongs to no peer."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        peer = name.partition("-")[0]
        if peer not in PEERS:
            raise ValueError(f"no peer is called {peer!r}; there are {', '.join(PEERS)}")
        wanted.setdefault(peer, [])
        if name != peer:
            wanted[peer].append(name)
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the source model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="calibration text; without it random token ids")
    parser.add_argument("--only", nargs="*", default=list(PEERS), help="peers or PEER-CASE names")
    parser.add_argument("--env", type=Path, default=Path("peer-envs"), help="where the environments are kept")
    options = parser.parse_args()
    options.env = options.env.resolve()
    failed = [peer for peer, cases in chosen(options.only).items() if not run(peer, cases, options)]
    if failed:
        raise SystemExit(f"cases failed with: {', '.join(failed)}")


if __name__ == "__main__":
    main()
