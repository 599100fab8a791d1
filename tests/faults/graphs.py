"""Faults of ONNX graphs, planted with onnx and NumPy alone: in the nodes, in the weights beside them, in the files around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

Array = NDArray[Any]


@dataclass
class Opened:
    """A folder with model.onnx: its graph without the weights, the bytes of these, and other JSON files that change."""

    proto: Any
    data: bytearray
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Any:
        return self.proto.graph

    def node(self, name: str) -> Any:
        return next(n for n in self.graph.node if n.name == name)

    def of(self, kind: str, part: str = "") -> Any:
        """The first node of a kind whose name has this part."""
        return next(n for n in self.graph.node if n.op_type == kind and part in n.name)

    def before(self, node: Any, kind: str, inputs: list[str], **attributes: Any) -> str:
        """A new node in front of another; the name of its output."""
        name = f"planted.{len(self.graph.node)}"
        made = helper.make_node(kind, inputs, [name], name=name, **attributes)
        self.graph.node.insert(next(i for i, n in enumerate(self.graph.node) if n.name == node.name), made)
        return name

    def number(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"planted.c{len(self.graph.initializer)}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str) -> Any:
        return next(t for t in self.graph.initializer if t.name == name)

    def change(self, name: str, dtype: Any, change: Callable[[Array], Array]) -> None:
        """The bytes of a weight as an array of `dtype` changed in place."""
        said = {e.key: int(e.value) for e in self.weight(name).external_data if e.key != "location"}
        part = slice(said["offset"], said["offset"] + said["length"])
        old = np.frombuffer(bytes(self.data[part]), dtype).copy()
        self.data[part] = np.ascontiguousarray(change(old)).astype(dtype).tobytes()


Change = Callable[[Opened], None]


@dataclass(frozen=True)
class GraphFault:
    """model, type: of the good artifact. tier: the first that must fail. says: part of a failed check's name or of the message."""

    name: str
    model: str
    type: str
    tier: str
    plant: Change
    says: str = ""

    @property
    def id(self) -> str:
        return f"{self.name} [{self.model} {self.type}]"


def plant(fault: GraphFault, good: Path, bad: Path) -> Path:
    shutil.copytree(good, bad)
    (bad / "model.onnx.manifest.json").unlink(missing_ok=True)
    texts = {n: json.loads((bad / n).read_text(encoding="utf-8")) for n in ("config.json",)}
    opened = Opened(
        onnx.load(bad / "model.onnx", load_external_data=False),
        bytearray((bad / "model.onnx.data").read_bytes()),
        texts,
    )
    fault.plant(opened)
    (bad / "model.onnx").write_bytes(opened.proto.SerializeToString())
    (bad / "model.onnx.data").write_bytes(opened.data)
    for name, content in texts.items():
        (bad / name).write_text(json.dumps(content), encoding="utf-8")
    return bad


# --- masks, positions, caches ------------------------------------------------------------------------------


def sees(shift: int) -> Change:
    """Every token sees as many later ones more (or earlier ones less)."""

    def change(o: Opened) -> None:
        node = o.of("LessOrEqual")
        node.input[1] = o.before(node, "Add", [node.input[1], o.number(shift)])

    return change


def mask_without_padding(o: Opened) -> None:
    both = o.of("And")
    o.of("Or").input[0] = both.input[0]


def swapped_past(side: str) -> Change:
    def change(o: Opened) -> None:
        node = next(n for n in o.graph.node if n.output[0] == f"present.1.{side}")
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return change


def attribute(kind: str, name: str, value: Any, part: str = "") -> Change:
    """Another value of one attribute."""

    def change(o: Opened) -> None:
        node = o.of(kind, part)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def queries_one_later(o: Opened) -> None:
    """Queries turned by the position after their own."""
    node = o.of("RotaryEmbedding", "layers.1.attn.rotaryembedding")
    at = o.before(node, "Add", ["position_ids", o.number(1)])
    for place, table in ((1, "rotary.cos"), (2, "rotary.sin")):
        node.input[place] = o.before(node, "Gather", [table, at])


def positions_from_zero(o: Opened) -> None:
    """Positions counted within the run, as if there were no past."""
    first = next(n for n in o.graph.node if "position_ids" in n.input)
    length = o.before(first, "Shape", ["input_ids"], start=1, end=2)
    count = o.before(first, "Squeeze", [length])
    made = o.before(first, "Range", [o.number(0), count, o.number(1)])
    row = o.before(first, "Unsqueeze", [made, o.number([0])])
    for node in o.graph.node:
        for i, name in enumerate(node.input):
            if name == "position_ids":
                node.input[i] = row


def learned_positions_one_later(o: Opened) -> None:
    node = next(n for n in o.graph.node if n.op_type == "Gather" and n.input[0] == "pos_embed")
    node.input[1] = o.before(node, "Add", ["position_ids", o.number(1)])


def shorter_tables(o: Opened) -> None:
    """Rotary tables of 160 positions."""
    for name in ("rotary.cos", "rotary.sin"):
        t = o.weight(name)
        t.dims[0] = 160
        for e in t.external_data:
            if e.key == "length":
                e.value = str(160 * t.dims[1] * 4)


def other_frequencies(name: str, from_row: int) -> Change:
    """The table of one function slightly stretched from a row on."""

    def change(o: Opened) -> None:
        rows, width = o.weight(name).dims

        def stretched(x: Array) -> Array:
            table = x.reshape(rows, width)
            angles = np.arange(rows)[:, None] * (20000.0 ** (-np.arange(width) / width))
            table[from_row:] = np.cos(angles)[from_row:]
            return table.reshape(-1)

        o.change(name, np.float32, stretched)

    return change


# --- caches of fixed length --------------------------------------------------------------------------------


def written(place: Callable[[Opened, Any], str], part: str = "") -> Change:
    """Keys and values at another place of the cache."""

    def change(o: Opened) -> None:
        for node in [n for n in o.graph.node if n.op_type == "TensorScatter" and part in n.output[0]]:
            node.input[2] = place(o, node)

    return change


def one_later(o: Opened, node: Any) -> str:
    return o.before(node, "Add", ["cache_position", o.number(1)])


def over_the_last(o: Opened, node: Any) -> str:
    """A run after a past begins on the past's last position."""
    return o.before(node, "Max", [o.before(node, "Sub", ["cache_position", o.number(1)]), o.number(0)])


def at_the_beginning(o: Opened, node: Any) -> str:
    return ""


def sees_one_slot_more(o: Opened) -> None:
    """Only tokens after a past do."""
    node = o.of("LessOrEqual")
    more = o.before(node, "Min", ["cache_position", o.number(1)])
    more = o.before(node, "Unsqueeze", [more, o.number([1, 2, 3])])
    node.input[1] = o.before(node, "Add", [node.input[1], more])


def reads_what_was(o: Opened) -> None:
    """Attention takes the cache before it is written: right where both are one block of memory, by the order of nodes."""
    node = o.of("Attention", "layers.1")
    node.input[1] = "past_key_values.1.key"


# --- onnxruntime-genai's operators -------------------------------------------------------------------------


def keys_for_values(o: Opened) -> None:
    """Values of the past where keys belong, in one layer."""
    node = o.of("GroupQueryAttention", "layers.1")
    node.input[3], node.input[4] = node.input[4], node.input[3]


def padding_counted(o: Opened) -> None:
    """The last token of every sequence is taken to be in the last column."""
    node = o.of("GroupQueryAttention")
    last = node.input[5]
    total = o.before(node, "Sub", [node.input[6], o.number(1, np.int32)])
    row = o.before(node, "Expand", [total, o.before(node, "Shape", [last])])
    for other in (n for n in o.graph.node if n.op_type == "GroupQueryAttention"):
        other.input[5] = row


def last_column(o: Opened) -> None:
    """Logits of the last column, where a shorter prompt has padding."""
    node = o.of("GatherND")
    made = o.before(node, "Gather", [node.input[0], o.number([-1])], axis=1)
    user = next(n for n in o.graph.node if node.output[0] in n.input)
    user.input[0] = made


# --- nodes -------------------------------------------------------------------------------------------------


def bypass(kind: str, part: str, place: int = 0) -> Change:
    """Who took a node's output takes its input."""

    def change(o: Opened) -> None:
        node = next(n for n in reversed(o.graph.node) if n.op_type == kind and part in n.name)
        for other in o.graph.node:
            for i, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[i] = node.input[place]
        o.graph.node.remove(node)

    return change


def exchanged(a: str, b: str) -> Change:
    """Two products with each other's weights."""

    def change(o: Opened) -> None:
        first, second = (
            next(n for n in o.graph.node if n.op_type == "MatMul" and n.name.startswith(x)) for x in (a, b)
        )
        first.input[1], second.input[1] = second.input[1], first.input[1]
        made = {n.output[0]: n for n in o.graph.node}
        for node in (first, second):  # what dequantizes must come first
            if (source := made.get(node.input[1])) is not None:
                o.graph.node.remove(source)
                o.graph.node.insert(0, source)

    return change


def kind_of(kind: str, other: str, part: str = "") -> Change:
    def change(o: Opened) -> None:
        o.of(kind, part).op_type = other

    return change


def head_of_embedding(o: Opened) -> None:
    """The head of a model that is not tied multiplies by its embedding."""
    node = next(n for n in o.graph.node if n.op_type == "MatMul" and n.input[1] == "head")
    node.input[1] = o.before(node, "Transpose", ["embed"], perm=[1, 0])


def head_without_norm(o: Opened) -> None:
    """The final norm is computed, and the head multiplies by its input."""
    norm = next(n for n in o.graph.node if "norm" in n.input)
    next(n for n in o.graph.node if n.output[0] == "logits").input[0] = norm.input[0]


def metadata(key: str, value: str) -> Change:
    def change(o: Opened) -> None:
        next(p for p in o.proto.metadata_props if p.key == key).value = value

    return change


# --- weights -----------------------------------------------------------------------------------------------


def halves(x: Array) -> Array:
    return x >> 4 | x << 4


def one_code(x: Array) -> Array:
    x[len(x) // 2] ^= 1
    return x


def doubled(x: Array) -> Array:
    x[3] *= 2
    return x


def moved(x: Array) -> Array:
    return np.roll(x, 1)


def weight(name: str, dtype: Any, change: Callable[[Array], Array]) -> Change:
    return lambda o: o.change(name, dtype, change)


def transposed(x: Array) -> Array:
    side = int(len(x) ** 0.5)
    return x.reshape(side, side).T.reshape(-1)


def other_offset(name: str) -> Change:
    """A weight that begins 64 bytes later in the file."""

    def change(o: Opened) -> None:
        for e in o.weight(name).external_data:
            if e.key == "offset":
                e.value = str(int(e.value) - 64)

    return change


def exchanged_data(a: str, b: str) -> Change:
    """Two weights at each other's place in the file."""

    def change(o: Opened) -> None:
        first, second = o.weight(a), o.weight(b)
        kept = [(e.key, e.value) for e in first.external_data]
        for t, said in ((first, [(e.key, e.value) for e in second.external_data]), (second, kept)):
            del t.external_data[:]
            for key, value in said:
                t.external_data.add(key=key, value=value)

    return change


def config(key: str, value: Any) -> Change:
    def change(o: Opened) -> None:
        o.json["config.json"][key] = value

    return change


U8, F32 = np.uint8, np.float32
GEMMA, GPT, DEMO, NEOX, PLAIN = (
    "gemma2-alternating",
    "gpt2-tied",
    "demo",
    "gpt_neox-sequential",
    "llama-untied",
)

FAULTS = [
    GraphFault("sees the next token", DEMO, "fp32", "logits", sees(1), "cost"),
    GraphFault("does not see the token before", DEMO, "fp32", "logits", sees(-2), "cost"),
    GraphFault("sees the next token", DEMO, "int4", "logits", sees(1), "fidelity"),
    GraphFault("padding is not masked", DEMO, "fp32", "logits", mask_without_padding, "padding"),
    GraphFault("past keys after new ones", DEMO, "fp32", "logits", swapped_past("key"), "step by step"),
    GraphFault("past values after new ones", DEMO, "int4", "logits", swapped_past("value"), "step by step"),
    GraphFault("queries one position later", DEMO, "fp32", "logits", queries_one_later, "cost"),
    GraphFault("positions without the past", DEMO, "fp32", "logits", positions_from_zero, "step by step"),
    GraphFault("positions without the past", DEMO, "int4", "logits", positions_from_zero, "step by step"),
    GraphFault("learned positions one later", GPT, "fp32", "logits", learned_positions_one_later, "cost"),
    GraphFault("rotary tables too short", DEMO, "fp32", "structure", shorter_tables, "rotary"),
    GraphFault("rotary tables of another base", DEMO, "fp32", "structure", other_frequencies("rotary.cos", 0), "rotary"),
    GraphFault("rotary tables wrong at their end", DEMO, "int4", "structure", other_frequencies("rotary.cos", 400), "rotary"),
    GraphFault("halves turned as pairs", DEMO, "fp32", "logits", attribute("RotaryEmbedding", "interleaved", 1), "cost"),
    GraphFault("keys concatenated along heads", DEMO, "fp32", "structure", attribute("Concat", "axis", 1), ""),
    GraphFault("values concatenated along the width", DEMO, "fp32", "structure", attribute("Concat", "axis", 3, "value"), ""),
    GraphFault("no final norm", DEMO, "fp32", "structure", bypass("RMSNormalization", "norm"), "no node takes it"),
    GraphFault("no norm of an MLP", DEMO, "int4", "structure", bypass("RMSNormalization", "layers.1.mlp"), "no node takes it"),
    GraphFault("logits of what was not normed", DEMO, "fp32", "logits", head_without_norm, "cost"),
    GraphFault("another epsilon", DEMO, "fp32", "logits", attribute("RMSNormalization", "epsilon", 1e-4), "cost"),
    GraphFault("another scale of attention", DEMO, "fp32", "logits", attribute("Attention", "scale", 0.18), "cost"),
    GraphFault("no residual", DEMO, "fp32", "logits", bypass("Add", "layers.1.attn.out", 1), "cost"),
    GraphFault("SiLU without its sigmoid", DEMO, "fp32", "logits", bypass("Sigmoid", "layers.1"), "cost"),
    GraphFault("keys and values exchanged", DEMO, "fp32", "logits", exchanged("layers.1.attn.k.", "layers.1.attn.v."), "cost"),
    GraphFault("gate and up exchanged", DEMO, "int4", "logits", exchanged("layers.1.mlp.gate.", "layers.1.mlp.up."), ""),
    GraphFault("queries and keys exchanged", NEOX, "fp32", "logits", exchanged("layers.0.attn.q.", "layers.0.attn.k."), "cost"),
    GraphFault("queries and keys exchanged in the file", NEOX, "fp32", "tensors", exchanged_data("layers.0.attn.q", "layers.0.attn.k"), "equal"),
    GraphFault("the head is the embedding", PLAIN, "fp32", "structure", head_of_embedding, "head"),
    GraphFault("another tied head", DEMO, "int4", "structure", weight("head", U8, one_code), "tied head"),
    GraphFault("no final soft cap", GEMMA, "fp32", "logits", bypass("Tanh", "tanh"), "cost"),
    GraphFault("no soft cap of attention", GEMMA, "fp32", "logits", bypass("Tanh", "layers.1"), "cost"),
    GraphFault("a window one wider", GEMMA, "fp32", "logits", kind_of("Less", "LessOrEqual"), "cost"),
    GraphFault("scales along the other axis", DEMO, "int4", "structure", attribute("DequantizeLinear", "axis", 1, "layers.1.attn.q"), "axis"),
    GraphFault("blocks of 64", DEMO, "int4", "structure", attribute("DequantizeLinear", "block_size", 64, "layers.1.attn.q"), "blocks"),
    GraphFault("nibbles exchanged", DEMO, "int4", "tensors", weight("layers.1.attn.q", U8, halves), ""),
    GraphFault("nibbles exchanged", DEMO, "uint4", "tensors", weight("layers.2.mlp.down", U8, halves), ""),
    GraphFault("nibbles of zero points exchanged", DEMO, "uint4", "tensors", weight("layers.2.mlp.down.zero", U8, halves), ""),
    GraphFault("one code", DEMO, "gptq", "tensors", weight("layers.1.attn.q", U8, one_code), "carried"),
    GraphFault("one scale", DEMO, "gptq", "tensors", weight("layers.1.attn.q.scale", F32, doubled), "carried"),
    GraphFault("scales of the neighbours", DEMO, "int4", "tensors", weight("layers.1.attn.q.scale", F32, moved), ""),
    GraphFault("one scale", DEMO, "int4", "tensors", weight("layers.1.mlp.up.scale", F32, doubled), ""),
    GraphFault("a row of the embedding", DEMO, "fp32", "tensors", weight("embed", F32, doubled), "equal"),
    GraphFault("a matrix the other way", DEMO, "fp32", "tensors", weight("layers.1.attn.q", F32, transposed), "equal"),
    GraphFault("a norm", DEMO, "int4", "tensors", weight("layers.1.attn_norm", F32, doubled), "equal"),
    GraphFault("a weight at another place", DEMO, "fp32", "tensors", other_offset("layers.1.attn.k"), "equal"),
    GraphFault("gate and up exchanged in the file", DEMO, "int4", "tensors", exchanged_data("layers.1.mlp.gate", "layers.1.mlp.up"), ""),
    GraphFault("another epsilon in the configuration", DEMO, "fp32", "structure", config("rms_norm_eps", 1e-6), "traits"),
    GraphFault("another base in the configuration", DEMO, "int4", "structure", config("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}), ""),
    GraphFault("cache written one slot later", DEMO, "fp32 static", "logits", written(one_later), "cost"),
    GraphFault("values of a layer written one slot later", DEMO, "int4 static", "logits", written(one_later, "1.value"), "fidelity"),
    GraphFault("cache written over the last position", DEMO, "fp32 static", "logits", written(over_the_last), "step by step"),
    GraphFault("keys of a layer over the last position", DEMO, "int4 static", "logits", written(over_the_last, "1.key"), "step by step"),
    GraphFault("cache written at its beginning", DEMO, "fp32 static", "logits", written(at_the_beginning), "step by step"),
    GraphFault("sees the next token", DEMO, "fp32 static", "logits", sees(1), "cost"),
    GraphFault("does not see the token before", DEMO, "int4 static", "logits", sees(-2), "fidelity"),
    GraphFault("sees a slot that is not taken", DEMO, "fp32 static", "logits", sees_one_slot_more, "step by step"),
    GraphFault("padding is not masked", DEMO, "fp32 static", "logits", mask_without_padding, "padding"),
    GraphFault("positions without the past", DEMO, "fp32 static", "logits", positions_from_zero, "step by step"),
    GraphFault("a window one wider", GEMMA, "fp32 static", "logits", kind_of("Less", "LessOrEqual"), "cost"),
    GraphFault("a full cache goes on at its beginning", DEMO, "fp32 static", "structure", attribute("TensorScatter", "mode", "circular"), "inputs and outputs"),
    GraphFault("attention reads the cache as it was", DEMO, "fp32 static", "structure", reads_what_was, "inputs and outputs"),
    GraphFault("cache written along heads", DEMO, "fp32 static", "structure", attribute("TensorScatter", "axis", 1), "inputs and outputs"),
    GraphFault("halves turned as pairs", DEMO, "fp32 genai", "logits", attribute("GroupQueryAttention", "rotary_interleaved", 1), "cost"),
    GraphFault("another scale of attention", DEMO, "fp32 genai", "logits", attribute("GroupQueryAttention", "scale", 0.18), "cost"),
    GraphFault("a layer that is not turned", DEMO, "int4 genai", "logits", attribute("GroupQueryAttention", "do_rotary", 0, "layers.1"), "fidelity"),
    GraphFault("past keys and values exchanged", DEMO, "fp32 genai", "logits", keys_for_values, "step by step"),
    GraphFault("past keys and values exchanged", DEMO, "int4 genai", "logits", keys_for_values, "step by step"),
    GraphFault("padding counted as tokens", DEMO, "fp32 genai", "logits", padding_counted, "padding on the right"),
    GraphFault("logits of the last column", DEMO, "fp32 genai last", "logits", last_column, "padding on the right"),
    GraphFault("rotary tables too short", DEMO, "fp32 genai", "structure", shorter_tables, "rotary"),
    GraphFault("another epsilon", DEMO, "fp32 genai", "logits", attribute("SkipSimplifiedLayerNormalization", "epsilon", 1e-4), "cost"),
    GraphFault("one code", DEMO, "int4 genai", "tensors", weight("layers.1.attn.q", U8, one_code), ""),
    GraphFault("scales of the neighbours", DEMO, "int4 genai", "tensors", weight("layers.1.attn.q.scale", F32, moved), ""),
    GraphFault("fewer positions claimed", DEMO, "fp32", "structure", metadata("positions", "100"), "rotary"),
]  # fmt: skip
