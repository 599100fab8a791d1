"""GGUF (llama.cpp) as a target: `plan` lowers a Model. The other direction is gguf_source.

Types follow llama-quantize's mixtures exactly (gguf_mixture); bytes of dense weights are those of
ggml's own quantizers; a QTensor whose grid a block type holds is repacked without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lconvert import kernels
from lconvert.archs import find
from lconvert.archs.common import Arch
from lconvert.converters import (
    act_order,
    fold,
    gguf_carry,
    gguf_keys,
    gguf_mixture,
    gguf_names,
    replaced,
    tokenizer_gguf,
)
from lconvert.converters.gguf_mixture import Options as MixtureOptions
from lconvert.converters.gguf_names import GgufTensor
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import gguf
from lconvert.formats.imatrix import Imatrix, quantize_keys
from lconvert.ir import Decoder, Model, QTensor, Tensor, as_f32, concat_rows
from lconvert.kernels.blocks import BLOCKS
from lconvert.plan import MEASURE_EVERY, FilePlan, Item, Plan, Slab, Verdict, known, sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ALIGNMENT = 32


@dataclass(frozen=True)
class Options:
    """How to lower to GGUF. `types` are the rules for tensor types; imatrix holds importances by tensor name."""

    types: MixtureOptions
    imatrix: Imatrix | None = None
    split_max_size: int | None = None
    allow_requantize: bool = False
    allow_loss: tuple[str, ...] = ()
    name: str | None = None

    def summary(self) -> dict[str, Any]:
        """The options as plain data, for the manifest."""
        t = self.types
        out = {k: v for k, v in vars(t).items() if v not in (None, False, ()) and k != "imatrix"}
        if self.imatrix is not None:
            # The content, not only the name: a run must not be resumed with other importances.
            out["imatrix"] = {"tensors": len(self.imatrix), "sha256": self.imatrix.sha256()}
        out |= {"split_max_size": self.split_max_size} if self.split_max_size else {}
        out |= {"allow_requantize": True} if self.allow_requantize else {}
        out |= {"allow_loss": list(self.allow_loss)} if self.allow_loss else {}
        return out


# --- lowering --------------------------------------------------------------------------------------------


def _dense_producer(
    stored: GgufTensor, parts: Sequence[Tensor], type_: str, weights: NDArray[np.float32] | None
) -> Callable[[int, int], Slab]:
    """Rows start..stop of a stored tensor: read, shift or permute, quantize, measure a sample of rows."""
    turned = [gguf_names.interleave(p, stored.head_dim) if stored.head_dim else p for p in parts]
    whole = concat_rows(tuple(turned))
    whole = gguf_names.transposed(whole, stored.turned) if stored.turned else whole
    dtype, cols, vector = whole.dtype, stored.cols, len(whole.shape) == 1
    per_matrix = stored.shape[-2] if len(stored.shape) == 3 else stored.rows

    def produce(start: int, stop: int) -> Slab:
        import numpy as np

        x = (
            whole.load().reshape(-1, cols)[start:stop]
            if vector
            else whole.read(start, stop).reshape(stop - start, cols)
        )
        kind: str = dtype
        if stored.shift:
            x, kind = as_f32(x, dtype) + np.float32(stored.shift), "F32"
        out = np.empty((x.shape[0], BLOCKS[type_].row_bytes(cols)), np.uint8)
        at = 0
        while at < x.shape[0]:  # each expert has its own importance weights
            matrix = (start + at) // per_matrix
            end = min(x.shape[0], (matrix + 1) * per_matrix - start)
            w = None if weights is None else weights[matrix if weights.shape[0] > 1 else 0]
            try:
                kernels.quantize(type_, x[at:end], kind, w, out=out[at:end], finite_scales=True)
            except InputError as e:
                raise InputError(f"{whole.origin}: {e} (rows counted from {start + at})") from None
            at = end
        if type_ in ("F32", kind):
            return Slab(out)
        sample = slice(0, None, MEASURE_EVERY)
        exact = as_f32(x[sample], kind).astype(np.float64)
        error = kernels.dequantize(type_, np.ascontiguousarray(out[sample]), cols) - exact
        # Not np.dot: BLAS would start threads of its own beside the workers.
        return Slab(out, float(np.square(error).sum()), float(np.square(exact).sum()))

    return produce


_WIDER = {("F16", "F32"), ("BF16", "F32")}
_FLOATS = ("F32", "F16", "BF16")


def _verdict(data: Sequence[Tensor | QTensor], target: str, shifted: bool, requantize: bool) -> Verdict:
    """What storing these as `target` does to their values; exact carrying of QTensors is decided before."""
    if any(isinstance(x, QTensor) for x in data):
        if target == "F32":
            return Verdict("widened", "dequantized")
        if target in _FLOATS:
            return Verdict("rounded", f"dequantized, then F32 to {target}")
        if requantize:
            return Verdict("requantized", f"dequantized and rounded again to {target}")
        return Verdict(
            "refused",
            f"is quantized already, and {target} cannot hold its values exactly; --allow-requantize rounds them "
            "again, COPY keeps the source's type",
        )
    dtypes = sorted({x.dtype for x in data if isinstance(x, Tensor)})
    if dtypes == [target] or (shifted and target == "F32"):
        return Verdict("exact")
    if all(d == target or (d, target) in _WIDER for d in dtypes):
        return Verdict("widened")
    if target in _FLOATS:
        return Verdict("rounded", f"{' and '.join(dtypes)} to {target}")
    return Verdict("quantized")


def _item(stored: GgufTensor, model: Model, choice: gguf_mixture.Choice, options: Options) -> list[Item]:
    """The plan item of one stored tensor with its verdict, and its global scale as a tensor where it has one."""
    data = [model.entries[r].data for r in stored.roles]
    type_ = choice.type
    weights = options.imatrix.for_tensor(stored.name, stored.shape) if options.imatrix is not None else None
    item = Item(
        name=stored.name,
        type=type_,
        shape=stored.shape,
        offset=0,
        rows=stored.rows,
        row_bytes=BLOCKS[type_].row_bytes(stored.cols),
        source_row_bytes=stored.cols * 4,
        sources=tuple(model.entries[r].name for r in stored.roles),
        verdict=Verdict("exact"),
        produce=lambda a, b: Slab(b""),
        rule=choice.reason,
    )
    held = gguf_carry.oriented(stored, data)
    carried = gguf_carry.lower(stored, held, type_)
    scaled = find(model.arch.family).gguf.scales
    if carried is not None and (scaled or all(s == 1.0 for s in carried[2])):
        verdict, packed, scales = carried
        out = [replace(item, verdict=verdict, produce=lambda a, b: Slab(packed.read(a, b)))]
        if any(s != 1.0 for s in scales):
            out.append(_scale_item(stored, scales))
        return out
    parts = gguf_carry.dense(data)
    produce = _dense_producer(stored, parts, type_, weights)
    verdict = _verdict(data, type_, bool(stored.shift), options.allow_requantize)
    return [replace(item, verdict=verdict, produce=produce)]


def _scale_item(stored: GgufTensor, scales: tuple[float, ...]) -> Item:
    """NVFP4's per-tensor scale, one per expert (llama.cpp multiplies the product by it)."""
    import numpy as np

    if len(stored.shape) == 2 and len(set(scales)) > 1:
        raise UnsupportedError(f"{stored.name}: its fused parts have different global scales {scales}")
    values = scales if len(stored.shape) == 3 else scales[:1]
    name = stored.name.removesuffix(".weight") + ".scale"
    return known(name, "F32", np.array(values, np.float32), stored.roles)


def _generated(d: Decoder) -> list[Item]:
    """Rope factors: computed from the traits, stored as F32."""
    made = gguf_keys.rope_tensors(d).items()
    return [known(name, "F32", array, ("traits",), "generated") for name, array in made]


def hyper(arch: Arch, model: Model) -> gguf_mixture.Hyper:
    """What llama-quantize's rules look at."""
    d = model.decoder
    a = d.default.attention
    experts = getattr(d.default.mlp, "experts", 0)
    kv_heads = a.kv_heads if a.mla is None else 1  # llama.cpp holds one key for all heads
    return gguf_mixture.Hyper(arch.gguf.arch, d.layers, a.heads, kv_heads, experts)


def _general(arch: Arch, name: str) -> dict[str, gguf.Value]:
    out = {"general.architecture": gguf.string(arch.gguf.arch), "general.type": gguf.string("model")}
    return out | ({"general.name": gguf.string(name)} if name else {})


def _losses(arch: Arch, d: Decoder, allowed: tuple[str, ...]) -> tuple[Verdict, ...]:
    out = []
    for loss in arch.gguf.losses(d):
        reason = f"{loss.name}: {loss.reason}"
        if loss.limit is not None:
            reason += f"; exact up to a context of {loss.limit}"
        elif loss.cost is not None:
            reason += f"; costs a mean KLD of at most {loss.cost:.0e}"
        elif loss.name not in allowed:
            out.append(Verdict("refused", f"{reason}; --allow-trait-loss {loss.name} converts all the same"))
            continue
        out.append(Verdict("rounded", reason))
    return tuple(out)


def chosen(model: Model, options: Options) -> list[tuple[GgufTensor, gguf_mixture.Choice]]:
    """Every stored tensor and its type, for a model `without_extras`."""
    arch = find(model.arch.family)
    stored = {s.name: s for s in gguf_names.layout(arch, model.decoder)}
    listing = [gguf_mixture.TensorInfo(s.name, s.shape, _storage(s, model)) for s in stored.values()]
    listing += [gguf_mixture.TensorInfo(i.name, i.shape, "F32") for i in _generated(model.decoder)]
    choices = gguf_mixture.choose_types(listing, hyper(arch, model), options.types)
    return [(s, choices[name]) for name, s in stored.items()]


def plan(model: Model, out_name: str, options: Options) -> Plan:
    """What the GGUF of this model will be: types, offsets, sizes and verdicts; reads headers only.

    Raises OptionError for rules that cannot be met (an imatrix that a type needs) and UnsupportedError for a
    tokenizer or trait that llama.cpp does not have.
    """
    model, said = without_extras(model)
    d = model.decoder
    arch = find(d.family)
    made = [i for s, choice in chosen(model, options) for i in _item(s, model, choice, options)]
    items = {i.name: i for i in (*made, *_generated(d))}
    ordered = [items[name] for name in gguf_mixture.tensor_order(list(items))]

    name = options.name or model.name
    if model.tokenizer is not None:
        lowered = tokenizer_gguf.lower(model.tokenizer, d.vocab, d.family)
        name, renamed = tokenizer_gguf.general_name(name, lowered.name_rule)
        notes: tuple[str, ...] = (*lowered.notes, *([renamed] if renamed else []))
        tokenizer_keys: dict[str, gguf.Value] = dict(lowered.keys)
    else:
        tokenizer_keys = {"tokenizer.ggml.model": gguf.string("no_vocab")}
        notes = ("the source has no tokenizer: the file holds none, and llama.cpp can only be fed token ids",)
    metadata = _general(arch, name) | gguf_keys.metadata(arch, d) | tokenizer_keys
    metadata["general.quantization_version"] = gguf.u32(2)
    if options.imatrix is not None:
        metadata |= quantize_keys(options.imatrix)
    number = gguf_mixture.FTYPES[options.types.ftype].number
    if number is not None:
        metadata["general.file_type"] = gguf.u32(number)

    files = tuple(_files(out_name, metadata, ordered, options.split_max_size))
    return Plan(
        target="gguf",
        files=files,
        sources=sources(model),
        options=options.summary(),
        losses=_losses(arch, d, options.allow_loss),
        notes=(*model.report, *notes, *said, *_kept_as_floats(model, ordered)),
        values=replaced.values(model),
    )


def _kept_as_floats(model: Model, items: Sequence[Item]) -> list[str]:
    """What a user should know of quantized matrices that no block type holds: they are large."""

    def quantized(item: Item) -> bool:
        return any(r in model.entries and isinstance(model.entries[r].data, QTensor) for r in item.sources)

    kept = [i for i in items if i.type in _FLOATS and quantized(i)]
    if not kept:
        return []
    more = f" and {len(kept) - 1} more" if kept[1:] else ""
    where = f"{kept[0].name}{more}: no block type holds its numbers, so its values are kept in {kept[0].type}"
    return [f"{where}; a type such as --q8_0 with --allow-requantize is smaller"]


def without_extras(model: Model) -> tuple[Model, list[str]]:
    """The same function without what GGUF has no place for: scales of inputs, act-order, quantized activations and caches."""
    folded = fold.transforms(model)
    model, dequantized = fold.materialized(folded.model)
    model, absorbed = act_order.absorb(model)
    said = [*folded.notes, *dequantized, *absorbed]
    if any(e.activation is not None for e in model.entries.values()):
        said.append("how activations were quantized is not part of a GGUF file: llama.cpp has its own way")
    if model.kv is not None:
        said.append(
            "the quantization of the KV cache is not part of a GGUF file; see llama.cpp's --cache-type-k and -v"
        )
    return model, said


def _storage(s: GgufTensor, model: Model) -> str:
    """Type of the tensor in an unquantized GGUF: vectors and what upstream's converter keeps in F32."""
    kept = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")
    if len(s.shape) == 1 or not s.name.endswith(".weight") or s.name.endswith(kept):
        return "F32"
    kinds = set()
    for data in gguf_carry.oriented(s, [model.entries[role].data for role in s.roles]):
        kinds.add(data.dtype if isinstance(data, Tensor) else gguf_carry.exact_type(data) or "F32")
    return kinds.pop() if len(kinds) == 1 else "F32"


def _files(
    out_name: str, metadata: Mapping[str, gguf.Value], items: Sequence[Item], limit: int | None
) -> list[FilePlan]:
    """One file, or shards of at most `limit` bytes of tensor data."""
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        padded = -(-item.nbytes // _ALIGNMENT) * _ALIGNMENT
        if limit is not None and groups[-1] and size + padded > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += padded
    out = []
    for n, group in enumerate(groups):
        name, keys = out_name, dict(metadata)
        if len(groups) > 1:
            name = f"{out_name.removesuffix('.gguf')}-{n + 1:05}-of-{len(groups):05}.gguf"
            split = {
                "split.no": gguf.u16(n),
                "split.count": gguf.u16(len(groups)),
                "split.tensors.count": gguf.i32(len(items)),
            }
            keys = (keys if n == 0 else {}) | split
        head, offsets, total = gguf.header(keys, [(i.name, i.type, i.shape) for i in group], _ALIGNMENT)
        placed = tuple(replace(i, offset=at) for i, at in zip(group, offsets, strict=True))
        out.append(FilePlan(name, head, placed, total))
    return out
