"""What the graph of an encoder or a convolutional network says of itself: its inputs and outputs, and which products run in integers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lconvert.converters.onnx_source import Found
from lconvert.errors import MissingPackageError
from lconvert.formats import onnx_reader
from lconvert.ir import Convnet, Encoder, QTensor
from lconvert.spec import shapes
from lconvert.validators import onnx_fusion, stored
from lconvert.validators.proof import Proof

#: Operators of ONNX Runtime that multiply 8-bit codes by 8-bit codes.
_INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger", "ConvInteger")
_LIMIT = 8 << 30  # bytes of a graph that is written out once more


def ports(found: Found) -> Iterator[str]:
    """Inputs and outputs that are missing, too many, or of another shape than the traits imply."""
    arch, graph = found.model.arch, found.file.proto.graph
    wanted: dict[str, tuple[Any, ...]] = {}
    if isinstance(arch, Encoder):
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if arch.token_types else [])]
        wanted = {name: ("batch", "sequence") for name in names}
        labels = arch.labels
    else:
        assert isinstance(arch, Convnet)
        wanted, labels = {"images": ("batch", *arch.image)}, shapes(arch)[-1][0]
    inputs, outputs = ({p.name: _shape(p) for p in side} for side in (graph.input, graph.output))
    for name in wanted.keys() | inputs.keys():
        if inputs.get(name) != wanted.get(name):
            yield f"input {name} is {inputs.get(name, 'absent')}, expected {wanted.get(name, 'none of this name')}"
    if outputs != {"logits": ("batch", labels)}:
        yield f"outputs are {outputs}, expected logits of {labels} classes"


def _shape(port: Any) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim)


def products(proof: Proof, found: Found) -> None:
    """How many of the products whose inputs are rounded ONNX Runtime runs in integers; a figure, since floats are as right."""
    entries = found.model.entries.values()
    rounded = [e for e in entries if isinstance(e.data, QTensor) and e.activation is not None]
    if not rounded or stored.size(found.file.files) > _LIMIT:
        return
    with tempfile.TemporaryDirectory(prefix="lconvert-") as name:
        made = Path(name) / "optimized.onnx"
        try:
            failure = onnx_fusion._optimized(found.file.path, made)
        except MissingPackageError as e:
            proof.not_proven.append(f"structure: products in ONNX Runtime: {e}")
            return
        if failure is not None:
            reason = failure.partition(". ")[0]
            proof.not_proven.append(
                f"structure: products in ONNX Runtime, which does not load the graph ({reason})"
            )
            return
        kinds = Counter(n.op_type for n in onnx_reader.read(made).proto.graph.node)
    count = sum(kinds[k] for k in _INTEGER)
    proof.add(
        "structure", "products in integers", f"{count} of {len(rounded)} in ONNX Runtime", measured=count
    )
