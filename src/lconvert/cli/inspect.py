"""`lconvert inspect`: what a model folder or file holds."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from lconvert.cli.common import human, table

if TYPE_CHECKING:
    from lconvert.ir import Model, QTensor, Tensor


@click.command("inspect")
@click.argument("path")
@click.option("--tensors/--no-tensors", default=True, help="List every tensor [default: yes].")
@click.option(
    "--sparsity", is_flag=True, help="Count zeros and look for 2:4 and 4:8, which reads every weight."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def command(path: str, tensors: bool, sparsity: bool, as_json: bool) -> int:
    """Show PATH (a Hugging Face folder, a GGUF file, an .lcir folder): traits, tensors, types, tokenizer, metadata.

    \b
    Examples:
      lconvert inspect ./my-model
      lconvert inspect model-Q4_K_M.gguf --no-tensors
      lconvert inspect pruned.lcir --sparsity
      lconvert inspect model.gguf --json | jq .totals
    """
    import lconvert

    model = lconvert.read(path)
    found = describe(model, path, sparsity=sparsity)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return 0
    click.echo(f"{path}: {model.name}\n")
    table("Architecture", ("trait", "value"), _trait_rows(model))
    if tensors:
        click.echo()
        rows = [
            (
                t["name"],
                "x".join(map(str, t["shape"])),
                t["type"],
                f"{t['bits_per_weight']:.4g}",
                human(t["bytes"]),
                *((f"{t['zeros']:.2%}", t["pattern"]) if sparsity else ()),
            )
            for t in found["tensors"]
        ]
        columns = (
            "role",
            "shape",
            "type",
            "bits/weight",
            "size",
            *(("zeros", "pattern") if sparsity else ()),
        )
        table("Tensors", columns, rows, right=(3, 4, 5))
    click.echo()
    totals = [
        (n, t["tensors"], t["weights"], human(t["bytes"]), *([f"{t['zeros']:.2%}"] if sparsity else []))
        for n, t in found["totals"].items()
    ]
    columns = ("type", "tensors", "weights", "size", *(["zeros"] if sparsity else []))
    table("Totals", columns, totals, right=(1, 2, 3, 4))
    if found["tokenizer"]:
        click.echo()
        table("Tokenizer", ("part", "value"), [(k, str(v)) for k, v in found["tokenizer"].items()])
    if found["metadata"]:
        click.echo()
        table("Metadata", ("key", "value"), list(found["metadata"].items()))
    for line in found["report"]:
        click.echo(f"note: {line}")
    return 0


def _kind(data: Tensor | QTensor) -> str:
    from lconvert.formats.gguf_blocks import native_type
    from lconvert.ir import QTensor

    if not isinstance(data, QTensor):
        return data.dtype
    group = "row" if data.block[-1] == -1 else data.block[-1]
    sign = "" if data.grid.signed or data.grid.kind != "int" else "u"
    return native_type(data) or f"{sign}{data.grid.kind}{data.grid.bits} g{group}"


def _trait_rows(model: Model) -> list[tuple[str, str]]:
    from lconvert.ir import Convnet, Decoder

    d = model.arch
    rows = [
        (f.name, getattr(d, f.name)) for f in dataclasses.fields(d) if f.name not in ("default", "overrides")
    ]
    if isinstance(d, Convnet):
        return [(k, _shown(v)) for k, v in rows if k != "steps"] + [
            (f"steps.{i}", f"{type(s).__name__.lower()} {_shown(s)}") for i, s in enumerate(d.steps)
        ]
    layer = d.default
    rows.append(("block", layer.block))
    for part in (layer.attention, layer.mlp):
        kind = type(part).__name__.lower()
        rows += [(f"{kind}.{f.name}", getattr(part, f.name)) for f in dataclasses.fields(part)]
    shown = [(k, _shown(v)) for k, v in rows]
    if isinstance(d, Decoder) and d.overrides:
        shown.append(("layers that differ", ", ".join(map(str, sorted(d.overrides)))))
    return shown


def _shown(value: Any) -> str:
    """A trait; of a group of traits, those that are not the default."""
    if not dataclasses.is_dataclass(value):
        return "" if value is None else str(value)
    parts = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
    return ", ".join(f"{name}={x}" for name, (x, default) in parts.items() if x != default)


def _tokenizer(model: Model) -> dict[str, Any]:
    t = model.tokenizer
    if t is None:
        return {}
    kind = t.json.get("model", {})
    return {
        "model": kind.get("type", ""),
        "vocabulary": len(kind.get("vocab", ())),
        "merges": len(kind.get("merges", ())),
        "added tokens": len(t.json.get("added_tokens", ())),
        "chat template": bool(t.chat_template),
        **{k: list(v) for k, v in t.special.items()},
    }


def _metadata(path: str) -> dict[str, str]:
    """The keys of a GGUF file; long values are cut."""
    if not path.endswith(".gguf"):
        return {}
    import numpy as np

    from lconvert.formats import gguf

    out = {}
    for key, value in gguf.read(path).metadata.items():
        data: Any = value.data
        if value.kind == "array":
            out[key] = f"[{len(data)} x {value.item}]"
        else:
            text = str(np.float32(data) if value.kind == "f32" else data).replace("\n", "\\n")
            out[key] = text if len(text) <= 80 else text[:77] + "..."
    return out


def describe(model: Model, path: str, *, sparsity: bool = False) -> dict[str, Any]:
    """Everything the command shows, as plain data. sparsity: `zeros`, shares of tensors and of their types, and `pattern`."""
    from lconvert.primitives.zeros import measured
    from lconvert.validators.stored import nbytes

    tensors = []
    totals: dict[str, dict[str, float]] = {}
    for entry in model.entries.values():
        size = nbytes(entry.data)
        kind = _kind(entry.data)
        row = {
            "name": entry.name,
            "shape": list(entry.shape),
            "type": kind,
            "bits_per_weight": 8 * size / max(entry.data.size, 1),
            "bytes": size,
        }
        tensors.append(row)
        total = totals.setdefault(kind, {"tensors": 0, "weights": 0, "bytes": 0})
        if sparsity:
            seen = measured(entry.data)
            row |= {"zeros": seen.share, "pattern": seen.pattern}
            total["zeros"] = total.get("zeros", 0) + seen.zeros
        total["tensors"] += 1
        total["weights"] += entry.data.size
        total["bytes"] += size
    if sparsity:
        for total in totals.values():
            total["zeros"] /= max(total["weights"], 1)
    return {
        "path": path,
        "name": model.name,
        "arch": dataclasses.asdict(model.arch),
        "parameters": sum(e.data.size for e in model.entries.values()),
        "tensors": tensors,
        "totals": totals,
        "tokenizer": _tokenizer(model),
        "metadata": _metadata(path),
        "report": list(model.report),
    }
