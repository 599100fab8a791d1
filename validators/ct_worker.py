"""compressed-tensors' own classes on a folder, in an interpreter that has them: run as a script, it imports nothing of lconvert.

Standard output gets one line of JSON per module, {"module", "shape"}, followed by its matrix in fp32 as raw bytes; the first
line is {"version", "refused"}: what QuantizationConfig says of the config.
Scales are widened to fp32 first, because `decompress` computes in the dtype of the stored scale.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import IO, Any


def _answers() -> IO[bytes]:
    """Standard output for answers alone: what packages print there goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def _line(out: IO[bytes], data: dict[str, Any]) -> None:
    out.write(json.dumps(data).encode() + b"\n")
    out.flush()


def _values(state: dict[str, Any], scheme: Any, torch: Any) -> Any:
    """The matrix of one module in fp32."""
    half = (torch.bfloat16, torch.float16)
    state = {k: t.float() if t.dtype in half else t for k, t in state.items()}
    packed = state.get("weight_packed")
    if packed is not None and packed.dtype == torch.uint8:
        unpack = _of("compressors.nvfp4.helpers").unpack_fp4_from_uint8
        dequantize = _of("quantization.lifecycle.forward").dequantize
        scale = state["weight_scale"]
        scale = (
            _of("compressors.mx_utils").decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale
        )
        codes = unpack(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
        overall = state.get("weight_global_scale")
        return dequantize(
            codes, scale.float(), args=scheme.weights, global_scale=overall, dtype=torch.float32
        )
    compressor = _of("compressors").BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(state, scheme)["weight"].float()


def _of(name: str) -> Any:
    """A module of the package."""
    return importlib.import_module(f"compressed_tensors.{name}")


def main(folder: Path, out: IO[bytes]) -> None:
    import torch
    from safetensors import safe_open

    version = str(importlib.import_module("compressed_tensors").__version__)
    match = _of("utils.match")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    try:
        parsed = _of("quantization").QuantizationConfig(**config)
    except Exception as e:  # noqa: BLE001 - pydantic's errors are many
        _line(out, {"version": version, "refused": [" ".join(str(e).split())[:300]]})
        return
    _line(out, {"version": version, "refused": []})
    targets = {t: s for s in parsed.config_groups.values() for t in s.targets}
    linear, embedding = torch.nn.Linear(2, 2), torch.nn.Embedding(2, 2)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            modules: dict[str, list[str]] = {}
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                module, _, suffix = name.rpartition(".")
                modules.setdefault(module, []).append(suffix)
            for module, suffixes in modules.items():
                if "weight_scale" not in suffixes:
                    continue
                like = embedding if "embed" in module else linear
                found = match.match_targets(module, like, targets)
                if not found or match.is_match(module, like, parsed.ignore):
                    continue
                scheme = targets[found[0]]
                state = {s: file.get_tensor(f"{module}.{s}") for s in suffixes if s != "bias"}
                width = scheme.weights.num_bits
                words = state["weight_packed"].shape[1] if "weight_packed" in state else 0
                if width in (3, 5, 6, 7) and words:  # releases differ in how they pack these
                    cols = int(state["weight_shape"][1])
                    dense = tuple(int(n) for n in version.split(".")[:2]) >= (0, 19)
                    if words != (-(-cols * width // 32) if dense else -(-cols // (32 // width))):
                        _line(
                            out,
                            {
                                "module": module,
                                "skipped": f"release {version} packs {width} bits otherwise",
                            },
                        )
                        continue
                try:
                    matrix = _values(state, scheme, torch).contiguous()
                except Exception as e:  # noqa: BLE001 - told to the reader, who judges
                    _line(out, {"module": module, "failed": " ".join(str(e).split())[:300]})
                    continue
                _line(out, {"module": module, "shape": list(matrix.shape)})
                out.write(matrix.numpy().tobytes())
    out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), _answers())
