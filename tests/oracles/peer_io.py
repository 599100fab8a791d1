"""What the scripts of all peers share: the command line, calibration tokens, and the file of oracle values.

The scripts run inside the environment of one peer (make_checkpoints.py makes it), so this file needs only what every
peer brings: torch, transformers, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

Case = Callable[[Path, Path, torch.Tensor], Mapping[str, torch.Tensor]]
SAMPLE = 32
STRIDE = 7919  # a prime: the sample walks through all rows and columns


def calibration(model: Path, text: Path | None, rows: int = 16, length: int = 128) -> torch.Tensor:
    """(rows, length) token ids: of `text`, or random ones from a fixed seed where there is none."""
    if text is None:
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text()[: rows * length * 12], add_special_tokens=False).ids
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def load_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `folder`."""
    return {
        name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()
    }


def write_oracle(folder: Path, values: Mapping[str, torch.Tensor], call: str) -> None:
    """Writes the peer's dequantization of each tensor: all values beside the folder, their digest inside it.

    FOLDER.dequantized.safetensors has every array in fp32. FOLDER/oracle.json has, for each, the shape, the SHA-256
    of the little-endian fp32 bytes in C order, and the values at the flat positions (i * 7919) % size, i < 32.
    """
    arrays = {name: value.detach().to(torch.float32).contiguous() for name, value in values.items()}
    save_file(arrays, f"{folder}.dequantized.safetensors")
    entries = {}
    for name, value in sorted(arrays.items()):
        flat = value.numpy().reshape(-1)
        entries[name] = {
            "shape": list(value.shape),
            "computed_in": str(values[name].dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(flat.astype("<f4").tobytes()).hexdigest(),
            "sample": [float(flat[i * STRIDE % flat.size]) for i in range(SAMPLE)],
        }
    (folder / "oracle.json").write_text(json.dumps({"call": call, "tensors": entries}) + "\n")


def main(peer: str, cases: Mapping[str, Case], call: str) -> None:
    """Runs the chosen cases, each into OUT/PEER-NAME; a failing case is reported and the others still run.

    A case gets (model folder, output folder, calibration ids), writes the checkpoint and returns the peer's own
    dequantization of every quantized weight, by checkpoint module name. `call` says how that is computed.
    """
    parser = argparse.ArgumentParser(description=f"Write checkpoints with {peer}.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="calibration text; without it random token ids")
    parser.add_argument("--only", nargs="*", help="names of cases, with or without the name of the peer")
    options = parser.parse_args()
    wanted = {name.removeprefix(f"{peer}-") for name in options.only or cases}
    ids = calibration(options.model, options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, case in cases.items():
        if name not in wanted:
            continue
        folder = options.out / f"{peer}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        start = time.monotonic()
        try:
            torch.manual_seed(0)
            write_oracle(folder, case(options.model, folder, ids), call)
        except Exception:  # noqa: BLE001  peers raise anything, and the other cases must still run
            failed.append(name)
            shutil.rmtree(folder, ignore_errors=True)
            traceback.print_exc()
        verdict = "FAILED" if name in failed else "ok"
        print(f"== {peer}-{name}: {verdict} ({time.monotonic() - start:.1f} s)", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"failed: {' '.join(failed)}")
