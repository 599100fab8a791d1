"""A decoder as onnxruntime-genai wants it: GroupQueryAttention with the rotation inside, MatMulNBits, SkipSimplifiedLayerNormalization
(docs/ContribOperators.md of onnxruntime), and genai_config.json (onnxruntime-genai, src/config.cpp).

Its attention shares one buffer between past and present, and counts positions by the length of the mask. Traits of Llama's kind only;
a decoder with another one is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import onnx_arrays as arrays
from lconvert.converters import onnx_attention, onnx_decoder, regrid
from lconvert.converters import onnx_weights as weights
from lconvert.converters.onnx_builder import Builder, Shape
from lconvert.converters.onnx_weights import Dialect, Form
from lconvert.errors import UnsupportedError
from lconvert.formats.onnx_graph import Initializer
from lconvert.ir import Decoder, Entry, Layer, Mlp, Model, QTensor, Tensor

CONFIG = "genai_config.json"
_DOMAIN = "com.microsoft"
DIALECT = Dialect(
    {4: "INT4", 8: "INT8"}, {2: "UINT2", 4: "UINT4", 8: "UINT8"}, (), minima=False, branches=False
)
#: Blocks that MatMulNBits takes, the one for matrices with a scale per row first.
_BLOCKS = (128, 64, 32, 16, 256)


def lacking(d: Decoder) -> Iterator[str]:
    """Traits that this graph does not have."""
    wanted = {
        "norm": (d.norm, "rms"), "norm offset": (d.norm_offset, 0), "learned positions": (d.learned_positions, 0),
        "scale of the embedding": (d.embed_scale, 1), "scale of residuals": (d.residual_scale, 1),
    }  # fmt: skip
    yield from (f"{name} {found}" for name, (found, usual) in wanted.items() if found != usual)
    for i, layer in d.each():
        yield from (f"{what} in layer {i}" for what in _of_layer(layer))


def _of_layer(layer: Layer) -> Iterator[str]:
    a = layer.attention
    absent = {
        "sinks": a.sinks, "latent attention": a.mla is not None, "clipped queries": a.clip_qkv is not None,
        f"norms of queries and keys ({a.qk_norm})": a.qk_norm != "none", f"a window of {a.window}": a.window is not None,
        f"a soft cap of {a.softcap}": a.softcap is not None, "no rotary embedding": a.rope is None,
    }  # fmt: skip
    yield from (name for name, there in absent.items() if there)
    if a.rope is not None and a.rope.dim != a.head_dim:
        yield f"{a.rope.dim} turning dimensions of {a.head_dim}"
    if a.rope is not None and a.rope.scaling == "longrope":
        yield "rotary scaling longrope"
    if layer.block != "pre":
        yield f"block layout {layer.block}"
    if not isinstance(layer.mlp, Mlp):
        yield "routed experts"


@dataclass
class Genai(Builder):
    """A graph whose quantized products are MatMulNBits."""

    def _product(self, x: str, entry: Entry, role: str, output: str) -> str:
        g, found = self.graph, weights.held(entry, self.dialect, self.dtype)
        form = None if found.form is None or entry.transform is not None else _blocked(found.form)
        if entry.activation is not None:
            raise UnsupportedError(
                f"{role}: MatMulNBits multiplies floats, and the inputs here are quantized; --dialect ort"
            )
        if form is None:
            verdict = (
                found.verdict
                if found.form is None
                else weights.as_values(self.dtype, "blocks that MatMulNBits lacks")
            )
            held = "plain" if isinstance(entry.data, QTensor) else ""
            w = self._add(arrays.values(role, entry, self.dtype), role, verdict, held)
            return str(g.op("MatMul", x, w, output=output))
        x = self._ordered(x, form, role)
        q, bits = form.codes, form.codes.grid.bits
        (n, k), width = q.shape, q.block[1]
        assert isinstance(q.scale, Tensor)
        inputs = [self._add(_codes(role, q, bits), role, found.verdict, weights.describe(form))]
        inputs.append(
            self._add(_scales(role + ".scale", q.scale, self.dtype), role, found.verdict, side=True)
        )
        if q.zero is not None:
            inputs.append(self._add(_zeros(role + ".zero", q.zero, bits), role, found.verdict, side=True))
        said: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": width, "accuracy_level": 4}
        last = output if form.factor is None else ""
        product = str(g.op("MatMulNBits", x, *inputs, output=last, domain=_DOMAIN, **said))
        return self._times_factor(product, form, output)

    def last(self, x: str) -> str:
        """Of every sequence's own last token: onnxruntime-genai fills the shorter prompts of a batch on the right."""
        g = self.graph
        count = g.op("ReduceSum", "attention_mask", g.constant([1]), keepdims=1)
        past = g.op(
            "Sub",
            g.op("Shape", "attention_mask", start=1, end=2),
            now := g.op("Shape", "input_ids", start=1, end=2),
        )
        row = g.op("Max", g.op("Sub", g.op("Sub", count, g.constant(1)), past), g.constant(0))
        row = g.op("Min", row, g.op("Sub", now, g.constant(1)))
        return str(
            g.op("GatherND", x, g.op("Unsqueeze", row, g.constant([2])), batch_dims=1, name="last.hidden")
        )


def _blocked(form: Form) -> Form | None:
    """The form with blocks that MatMulNBits takes."""
    q = form.codes
    if q.block == (-1, -1):
        return None
    if q.block[1] == -1:
        for size in _BLOCKS:
            if q.shape[1] % size == 0 and (fine := regrid.regrouped(q, size)) is not None:
                return replace(form, codes=fine)
        return None
    return form if q.block[1] in _BLOCKS and q.shape[1] % q.block[1] == 0 else None


def _codes(name: str, q: QTensor, bits: int) -> Initializer:
    """(rows, blocks, bytes of a block), unsigned: signed codes with the middle at 2^(bits - 1)."""
    (n, k), width = q.shape, q.block[1]
    shape = (n, k // width, width * bits // 8)

    def read(start: int, stop: int) -> NDArray[Any]:
        codes = q.codes.read(start, stop).astype(np.int16) + (1 << (bits - 1) if q.grid.signed else 0)
        return arrays.packed(codes.astype(np.uint8), bits).reshape(stop - start, *shape[1:])

    return Initializer(name, "UINT8", shape, n, read)


def _zeros(name: str, zero: Tensor, bits: int) -> Initializer:
    """Zero points packed along the blocks of a row, which is filled to whole bytes."""
    n, blocks = zero.shape
    per = 8 // bits

    def read(start: int, stop: int) -> NDArray[Any]:
        x = zero.read(start, stop).astype(np.uint8)
        return arrays.packed(np.pad(x, ((0, 0), (0, -blocks % per))), bits)

    return Initializer(name, "UINT8", (n, -(-blocks // per)), n, read)


def _scales(name: str, scale: Tensor, dtype: str) -> Initializer:
    """(rows, blocks)."""
    return arrays.as_they_lie(name, scale, arrays.FLOATS[dtype])


# --- the decoder -------------------------------------------------------------------------------------------


def build(model: Model, dtype: str, shape: Shape) -> Genai:
    """The whole graph. Raises UnsupportedError naming a trait that it has not."""
    d = model.decoder
    if found := next(lacking(d), None):
        raise UnsupportedError(
            f"{found}: the genai graph has no such trait yet; --dialect ort has all of them"
        )
    if not shape.cache:
        raise UnsupportedError("onnxruntime-genai keeps keys and values; --prefill-only is for --dialect ort")
    b = Genai(model, DIALECT, dtype, shape)
    g = b.graph
    for name, dim in (("input_ids", "sequence"), ("attention_mask", "total")):
        g.input(name, "INT64", ("batch", dim))
    g.output("logits", b.number_type, ("batch", 1 if shape.last_logit else "sequence", d.vocab))
    x, branch = onnx_decoder.embedded(b), ""
    for i, layer in d.each():
        with g.scope(f"layers.{i}"):
            x, branch = _block(b, x, branch, i, layer)
    onnx_decoder.logits(b, g.op("Add", x, branch, name="out"))
    return b


def _block(b: Genai, x: str, branch: str, i: int, layer: Layer) -> tuple[str, str]:
    """The residual stream before the MLP's output, and that."""
    p = f"layers.{i}."
    with b.graph.scope("attn"):
        y, x = _added(b, x, branch, p + "attn_norm") if branch else (b.norm(x, p + "attn_norm"), x)
        branch = _attention(b, y, i, layer)
    with b.graph.scope("mlp"):
        y, x = _added(b, x, branch, p + "mlp_norm")
        return x, onnx_decoder.feed_forward(b, y, i, layer)


def _added(b: Genai, x: str, branch: str, role: str) -> tuple[str, str]:
    """The normed sum, and the sum."""
    g = b.graph
    said: dict[str, Any] = {"domain": _DOMAIN, "epsilon": b.model.decoder.norm_eps, "outputs": 4}
    out = g.op("SkipSimplifiedLayerNormalization", x, branch, b.vector(role), **said)
    return out[0], out[3]


def _attention(b: Genai, x: str, i: int, layer: Layer) -> str:
    g, a, p = b.graph, layer.attention, f"layers.{i}.attn."
    assert a.rope is not None
    q, k, v = (b.linear(x, p + side) for side in "qkv")
    past, present = [], []
    for side in ("key", "value"):
        past.append(
            g.input(f"past_key_values.{i}.{side}", b.number_type, ("batch", a.kv_heads, "past", a.head_dim))
        )
        present.append(f"present.{i}.{side}")
        g.output(present[-1], b.number_type, ("batch", a.kv_heads, "total", a.head_dim))
    last, total = _lengths(b)
    positions = b.shape.positions or b.model.decoder.context
    cos, sin = (
        b.table(f"rotary.{name}" + onnx_attention.suffix(b, a.rope), table)
        for name, table in zip(("cos", "sin"), onnx_attention.tables(a.rope, positions, False), strict=True)
    )
    said: dict[str, Any] = {
        "num_heads": a.heads, "kv_num_heads": a.kv_heads, "scale": a.scale, "do_rotary": 1,
        "rotary_interleaved": int(a.rope.layout == "interleaved"),
    }  # fmt: skip
    out = g.op(
        "GroupQueryAttention",
        q,
        k,
        v,
        *past,
        last,
        total,
        cos,
        sin,
        domain=_DOMAIN,
        named=("", *present),
        **said,
    )
    return b.linear(out, p + "o")


def _lengths(b: Genai) -> tuple[str, str]:
    """Index of the last token of every sequence, and the length of the mask, as INT32."""
    g = b.graph

    def last() -> str:
        count = g.op("ReduceSum", "attention_mask", g.constant([1]), keepdims=0)
        return str(g.op("Cast", g.op("Sub", count, g.constant(1)), to=6, name="last"))

    def total() -> str:
        width = g.op("Squeeze", g.op("Shape", "attention_mask", start=1, end=2))
        return str(g.op("Cast", width, to=6, name="total"))

    return g.once("last", last), g.once("total", total)


def config(model: Model, positions: int | None) -> str:
    """genai_config.json."""
    d = model.decoder
    a = d.layer(0).attention
    context = min(d.context, positions or d.context)

    def ids(name: str) -> Any:
        own = model.generation.get(f"{name}_token_id", model.config.get(f"{name}_token_id"))
        return (
            own if own is not None else (model.tokenizer.special.get(name, (0,))[0] if model.tokenizer else 0)
        )

    pasts = {f"past_{side}_names": f"past_key_values.%d.{side}" for side in ("key", "value")}
    presents = {f"present_{side}_names": f"present.%d.{side}" for side in ("key", "value")}
    eos = ids("eos")
    pad = model.config.get("pad_token_id")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": a.head_dim,
        "hidden_size": d.hidden,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **pasts},
        "outputs": {"logits": "logits", **presents},
        "num_attention_heads": a.heads,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": a.kv_heads,
    }
    made = {
        "model": {
            "bos_token_id": ids("bos"),
            "context_length": context,
            "decoder": decoder,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else eos[0] if isinstance(eos, list) else eos,
            "type": "llama",
            "vocab_size": d.vocab,
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": True, "top_k": 1},
    }
    return json.dumps(made, indent=1) + "\n"
