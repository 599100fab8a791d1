"""ONNX as a target: the Plan of a folder with model.onnx, its weights beside it, tokenizer and configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lconvert import __version__
from lconvert.converters import hf, onnx_cnn, onnx_decoder, onnx_encoder, onnx_genai, replaced
from lconvert.converters.onnx_builder import Builder, Shape, Weight
from lconvert.converters.onnx_measured import Errors, measured, watched
from lconvert.converters.onnx_weights import DIALECTS
from lconvert.errors import OptionError
from lconvert.formats.onnx_graph import Graph
from lconvert.ir import Convnet, Decoder, Encoder, Model
from lconvert.plan import SIDE, FilePlan, Item, Plan, Slab, sources

MODEL, DATA = "model.onnx", "model.onnx.data"
#: What the models are for that are no decoders, as the Hugging Face hub calls it.
_TASK = {Encoder: {"task": "text-classification"}, Convnet: {"task": "image-classification"}}
#: What draws the graph of each kind of model.
_BUILD = {Decoder: onnx_decoder.build, Encoder: onnx_encoder.build, Convnet: onnx_cnn.build}


@dataclass(frozen=True)
class Options:
    """dialect: ort, trt or genai. dtype: of the graph, None: F32, F16 for trt. prefill_only: no keys and values in or out. static_cache: they
    lie in a cache of fixed length (onnx_static.py). last_logit: logits of the last position alone. positions: rows of the rotary
    tables, None: the model's context. rounding: inputs and the cache are rounded where the model says so; without it the plan says
    what is left out."""

    dialect: str = "ort"
    dtype: str | None = None
    prefill_only: bool = False
    static_cache: bool = False
    last_logit: bool = False
    positions: int | None = None
    rounding: bool = True

    def __post_init__(self) -> None:
        if self.prefill_only and self.static_cache:
            raise OptionError(
                "a graph without keys and values has no cache: --prefill-only or --static-cache"
            )
        if self.dialect == "genai" and self.static_cache:
            raise OptionError(
                "--static-cache does not go with the genai dialect, whose cache is shared already"
            )
        if self.dialect not in (*DIALECTS, "genai"):
            raise OptionError(f"dialect {self.dialect!r}; choose {', '.join(DIALECTS)} or genai")
        if self.dtype not in (None, "F32", "F16", "BF16"):
            raise OptionError(f"dtype {self.dtype!r}; choose F32, F16 or BF16")
        if self.dialect == "trt" and self.dtype == "F32":
            raise OptionError("TensorRT's attention runs in F16 and BF16 only; choose --fp16 or --bf16")


def plan(model: Model, options: Options = Options(), original: Model | None = None) -> Plan:
    """The folder of an ONNX model. Execute it into the folder.

    original: the model before passes, against which roundings are measured.
    """
    dtype = options.dtype or ("F16" if options.dialect == "trt" else "F32")
    shape = Shape(
        not options.prefill_only,
        options.static_cache,
        options.last_logit,
        options.positions,
        options.rounding,
    )
    if options.prefill_only or options.static_cache or options.last_logit:
        _ = model.decoder  # which refuses a model of another kind
    held = model.arch.context if isinstance(model.arch, Decoder) else None
    if options.positions and held and options.positions > held:
        raise OptionError(f"positions {options.positions}: the model has {held}; choose as many or fewer")
    genai = options.dialect == "genai"
    made_of = replaced.values(model)
    model, errors = watched(model, original)
    made = (
        onnx_genai.build(model, dtype, shape)
        if genai
        else _BUILD[type(model.arch)](model, DIALECTS[options.dialect], dtype, shape)
    )
    metadata = {
        "lconvert": __version__,
        "dialect": options.dialect,
        "source": model.name or model.source,
        "family": model.arch.family,
    }
    if isinstance(model.arch, Decoder):
        metadata["positions"] = str(options.positions or model.arch.context)
    if made.unrounded:
        metadata["unrounded"] = json.dumps(made.unrounded)
    graph = FilePlan(MODEL, head := made.graph.model(DATA, metadata), (), len(head))
    files = (
        graph,
        _data(made.graph, made.weights, errors),
        *hf.text_files(model, hf.config(model, dtype)),
    )
    if genai:
        files = (*files, hf.text_file(onnx_genai.CONFIG, onnx_genai.config(model, options.positions)))
    said = {k: v for k, v in vars(options).items() if v} | _TASK.get(type(model.arch), {})
    notes = (*model.report, *made.notes, *advice(made))
    return Plan("onnx", files, sources(model), said, notes=notes, values=made_of)


def advice(made: Builder) -> list[str]:
    """What to set in ONNX Runtime for this graph (validators/runtimes/onnx_session.py sets it)."""
    types = {w.made.type for w in made.weights if w.held not in ("", "plain")}
    out = []
    if "FLOAT8E4M3FN" in types and made.dialect.dynamic_inputs:
        out.append(
            "FP8 weights: ONNX Runtime unpacks them in every run unless session.disable_quant_qdq is 1, which unpacks them once, at load, "
            "and integer weights of the graph with them"
        )
    if made.graph.has("MatMulInteger") or made.graph.has("QuantizeLinear"):
        out.append("int8 products: on x86 without VNNI set session.x64quantprecision to 1, or sums saturate")
    return out


def _data(graph: Graph, weights: list[Weight], errors: Mapping[str, Errors]) -> FilePlan:
    offsets = graph.layout()
    items = [measured(_item(w, offsets[w.made.name]), errors, w.made.whole) for w in weights]
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
