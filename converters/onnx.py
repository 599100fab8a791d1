"""ONNX as a target: the Plan of a folder with model.onnx, its weights beside it, tokenizer and configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lconvert import __version__
from lconvert.converters import hf, onnx_genai
from lconvert.converters.onnx_decoder import Shape, Weight, build
from lconvert.converters.onnx_measured import measured
from lconvert.converters.onnx_weights import DIALECTS
from lconvert.errors import OptionError
from lconvert.formats.onnx_graph import Graph
from lconvert.ir import Model
from lconvert.plan import SIDE, FilePlan, Item, Plan, Slab, sources

MODEL, DATA = "model.onnx", "model.onnx.data"


@dataclass(frozen=True)
class Options:
    """dialect: ort, trt or genai. dtype: of the graph, None: F32, F16 for trt. prefill_only: no keys and values in or out.
    last_logit: logits of the last position alone. positions: rows of the rotary tables, None: the model's context."""

    dialect: str = "ort"
    dtype: str | None = None
    prefill_only: bool = False
    last_logit: bool = False
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.dialect not in (*DIALECTS, "genai"):
            raise OptionError(f"dialect {self.dialect!r}; choose {', '.join(DIALECTS)} or genai")
        if self.dtype not in (None, "F32", "F16", "BF16"):
            raise OptionError(f"dtype {self.dtype!r}; choose F32, F16 or BF16")
        if self.dialect == "trt" and self.dtype == "F32":
            raise OptionError("TensorRT's attention runs in F16 and BF16 only; choose --fp16 or --bf16")


def plan(model: Model, options: Options = Options(), original: Model | None = None) -> Plan:
    """The folder of an ONNX decoder. Execute it into the folder.

    original: the model before passes, against which roundings are measured.
    """
    dtype = options.dtype or ("F16" if options.dialect == "trt" else "F32")
    shape = Shape(not options.prefill_only, options.last_logit, options.positions)
    genai = options.dialect == "genai"
    made = (
        onnx_genai.build(model, dtype, shape)
        if genai
        else build(model, DIALECTS[options.dialect], dtype, shape)
    )
    metadata = {
        "lconvert": __version__,
        "dialect": options.dialect,
        "source": model.name or model.source,
        "family": model.arch.family,
        "positions": str(options.positions or model.arch.context),
    }
    graph = FilePlan(MODEL, head := made.graph.model(DATA, metadata), (), len(head))
    files = (
        graph,
        _data(made.graph, made.weights, model, original),
        *hf.text_files(model, hf.config(model, dtype)),
    )
    if genai:
        files = (*files, hf.text_file(onnx_genai.CONFIG, onnx_genai.config(model, options.positions)))
    said = {k: v for k, v in vars(options).items() if v}
    return Plan("onnx", files, sources(model), said, notes=(*model.report, *made.notes))


def _data(graph: Graph, weights: list[Weight], model: Model, original: Model | None) -> FilePlan:
    offsets = graph.layout()
    items = [measured(_item(w, offsets[w.made.name]), model, original) for w in weights]
    return FilePlan(DATA, b"", tuple(items), offsets[""])


def _item(w: Weight, offset: int) -> Item:
    made = w.made

    def produce(start: int, stop: int) -> Slab:
        return Slab(np.ascontiguousarray(made.read(start, stop)))

    return Item(
        made.name,
        made.type,
        made.shape,
        offset,
        made.rows,
        made.row_bytes,
        made.row_bytes,
        w.roles,
        w.verdict,
        produce,
        held=SIDE if w.side else w.held,
    )
