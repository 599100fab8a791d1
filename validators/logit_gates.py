"""What a runtime may lose on the artifact's own numbers, by the types that it computes in: the gates that a comparison is held to."""

from __future__ import annotations

from lconvert.ir import Model, QTensor, Tensor
from lconvert.validators import gates as gate_file
from lconvert.validators import stored, tensors
from lconvert.validators.proof import Proof

#: Runtimes whose rounding is known by the dtype that they compute in.
_BY_DTYPE = ("vllm", "transformers", "onnxruntime", "tensorrt")


def typical_bits(proof: Proof) -> float:
    """Bits per weight of the layers; by the file's size, where tensors are not read."""
    if proof.artifact is not None:
        return tensors.typical_bits(proof.artifact)
    weights = sum(e.data.size for e in proof.source.entries.values())
    return 8 * stored.size(proof.files) / max(1, weights)


def floor(proof: Proof, runtime: str) -> float:
    """Mean KLD that the runtime may cost where no weight is rounded."""
    least = gate_file.float_gate(proof.gates, proof.source.decoder.default.mlp.activation, runtime)
    return max([least, *(float(proof.gates["float_halves"][d]) for d in halves(proof, runtime))])


def halves(proof: Proof, runtime: str) -> set[str]:
    """Types of 16 bits among the matrices of a GGUF file: llama.cpp rounds activations to the type of the matrix."""
    if runtime != "llama.cpp" or proof.artifact is None:
        return set()
    matrices = (e.data for e in proof.artifact.entries.values() if len(e.shape) > 1)
    return {d.dtype for d in matrices if isinstance(d, Tensor) and d.dtype in ("F16", "BF16")}


def noise(proof: Proof, runtime: str, dtype: str) -> float:
    """Mean KLD that the runtime's own rounding may cost on the artifact's numbers."""
    if proof.kind in ("hf", "onnx") and runtime in _BY_DTYPE and proof.artifact is not None:
        return gate_file.folder_gate(proof.gates, dtype, _features(proof.artifact), floor(proof, runtime))
    return gate_file.fidelity_gate(proof.gates, runtime, typical_bits(proof))


def _features(artifact: Model) -> set[str]:
    """What a runtime rounds of a quantized folder besides its dtype: names of gates in `fidelity_folder`."""
    out = set()
    for e in artifact.entries.values():
        if isinstance(e.data, QTensor) and e.activation is None and e.data.grid.kind == "int":
            out.add("int_weights")
        if e.activation is not None:
            out.add(f"{'int' if e.activation.grid.kind == 'int' else 'fp'}{e.activation.grid.bits}_inputs")
    return out | ({"fp8_cache"} if artifact.kv is not None else set())
