"""What each choice in compressing a model costs, one choice at a time: tables and plots.

python examples/ablations.py [MODEL] [--calibrate TEXT] [--text TEXT] [--out DIR] [--only NAME ...] [--quick]

Everything but the choice is held fixed. A row is one compressed model, run in fp32 on the windows of TEXT: mean KL divergence from the source with
its 95% interval, perplexity, bits per weight and share of zeros of the decoder layers' matrices. Each ablation writes NAME.json and NAME.svg to
DIR. Without texts the halves of a bundled one are taken, the first to calibrate, the second to measure; --quick takes few values of every choice.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import lconvert
from lconvert import recipe
from lconvert.ir import Model, dense
from lconvert.kernels.qtensor import effective
from lconvert.passes import allocate
from lconvert.primitives import allocator, importance
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.placement import MATRICES
from lconvert.primitives.probe import Probe
from lconvert.primitives.text import windows
from lconvert.validators import plots, plots_ablations
from lconvert.validators.yardstick import Yardstick, text_windows

HERE = Path(__file__).parent
TEXT = HERE.parent / "validators" / "text" / "excerpt.txt"
INT4 = {"grid": "int4", "group": 128}
Row = dict[str, Any]
Passes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Study:
    """What is the same in all rows. text: the one that is measured on; scratch: a folder for texts that an ablation makes."""

    model: Model
    yardstick: Yardstick
    calibration: Calibration
    text: Path
    scratch: Path
    quick: bool = False

    def few(self, every: tuple[Any, ...], *quick: Any) -> tuple[Any, ...]:
        return quick if self.quick else every

    def job(self, **calibration: Any) -> Job:
        return Job(replace(self.calibration, **calibration))

    def made(self, passes: Passes, **calibration: Any) -> Model:
        """The model after passes with their options, as a recipe has them."""
        steps = tuple(recipe.step(name, options) for name, options in passes.items())
        return recipe.Recipe("ablation", steps).apply(self.model, self.job(**calibration))

    def row(self, series: str, x: str | float | None, made: Model | Passes, **calibration: Any) -> Row:
        """The numbers of a model, or of what passes make of the source. x None: its bits per weight."""
        found = self.yardstick(made if isinstance(made, Model) else self.made(made, **calibration))
        x = found["bits_per_weight"] if x is None else x
        print(f"{series or 'all'}, {x}: {found['kld_mean']:.3g}", file=sys.stderr, flush=True)
        return {"series": series, "x": x, **found}

    def matrices(self) -> list[str]:
        return [r for r in self.model.entries if re.fullmatch(MATRICES, r)]


# --- calibration ----------------------------------------------------------------------------------------------


def calibration_size(s: Study) -> Iterator[Row]:
    yield s.row("RTN, which needs none", "1", {"rtn": INT4})
    there = len(windows(s.model, replace(s.calibration, windows=64)).ids)
    for n in s.few((1, 2, 4, 8, 16, 32, 64), 1, 16):
        if n <= there:
            yield s.row("GPTQ", str(n), {"gptq": INT4}, windows=n)
            yield s.row("GPTAQ", str(n), {"gptq": {**INT4, "asymmetric": True}}, windows=n)


def domain(s: Study) -> Iterator[Row]:
    given = Path(s.calibration.text)
    code, noise = s.scratch / "source-code.txt", s.scratch / "random-tokens.txt"
    sources = sorted(Path(lconvert.__file__).parent.glob("*/*.py"))
    code.write_text("\n".join(p.read_text(encoding="utf-8") for p in sources)[:400_000], encoding="utf-8")
    noise.write_text(_random_text(s.model, 40_000), encoding="utf-8")
    texts = {"the measured text itself": s.text, "text of the same kind": given, "old prose": TEXT}
    if given.parent == s.scratch:  # half of the bundled text, which is the old prose
        del texts["old prose"]
    texts |= {"source code": code, "random tokens": noise}
    texts = {name: texts[name] for name in s.few(tuple(texts), "text of the same kind", "random tokens")}
    weights, zeros, inputs = "int3 weights (GPTQ)", "half zeros (SparseGPT)", "int8 inputs (static)"
    int3, int8 = {"grid": "int3", "group": 128}, {"grid": "int8", "group": -1}
    half = {"sparsity": 0.5}
    for name, path in texts.items():
        yield s.row(weights, name, {"gptq": int3}, text=str(path))
        yield s.row(zeros, name, {"sparse": half}, text=str(path))
        yield s.row(inputs, name, {"rtn": int8, "activations": {"dynamic": False}}, text=str(path))
    none = "none: RTN, magnitude, dynamic"
    yield s.row(weights, none, {"rtn": int3})
    yield s.row(zeros, none, {"sparse": {"method": "magnitude", **half}})
    yield s.row(inputs, none, {"rtn": int8, "activations": {}})


def _random_text(model: Model, tokens: int) -> str:
    """Tokens drawn evenly from those of the vocabulary that are text by themselves."""
    from tokenizers import Tokenizer

    assert model.tokenizer is not None
    tokenizer = Tokenizer.from_str(json.dumps(model.tokenizer.json))
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    kept = [p for p in pieces if p and "\ufffd" not in p]
    return "".join(kept[i] for i in np.random.default_rng(0).integers(0, len(kept), tokens))


# --- grids ----------------------------------------------------------------------------------------------------


def group_size(s: Study) -> Iterator[Row]:
    cols = {s.model.entries[r].shape[1] for r in s.matrices()}
    for group in s.few((16, 32, 64, 128, 256, -1), 32, -1):
        if any(c % group for c in cols):
            continue
        x, grid = "row" if group == -1 else str(group), {"grid": "int4", "group": group}
        yield s.row("RTN", x, {"rtn": grid})
        yield s.row("RTN, scales by least squares", x, {"rtn": {**grid, "search": "mse"}})
        yield s.row("GPTQ", x, {"gptq": grid})


def granularity(s: Study) -> Iterator[Row]:
    """Of weights: int8 has no square blocks here, fp8 no groups. Of inputs: one static scale, or one for every token."""
    tensor, row = "one per tensor", "one per row or token"
    places = {tensor: "tensor", "one per 128 x 128 block": "block", row: -1, "one per 128 of a row": 128}
    for grid, other in (("int8", "block"), ("fp8", 128)):
        for name, group in places.items():
            if group != other:
                yield s.row(name, f"{grid} weights", {"rtn": {"grid": grid, "group": group}})
    for grid, first in (("int8", ""), ("int8", "smooth"), ("fp8", "")):
        for name in (tensor, row):
            passes: dict[str, Mapping[str, Any]] = {"smooth": {"alpha": 0.8}} if first else {}
            passes |= {"rtn": {"grid": grid, "group": -1}}
            passes |= {"activations": {"grid": grid, "dynamic": name == row}}
            yield s.row(name, f"{grid} inputs too{', SmoothQuant' if first else ''}", passes)


# --- exceptions -----------------------------------------------------------------------------------------------


def outlier_channels(s: Study) -> Iterator[Row]:
    """Input channels in the source's precision, the others rounded to int4 without them: what a kernel with two products would compute. Nothing
    that we write holds such a matrix, so the values are put together here."""
    inputs = importance.measure(s.model, s.job()).moments
    random = np.random.default_rng(0)
    scores: Mapping[str, Callable[[str, Any], Any]] = {
        "largest inputs": lambda role, w: inputs[role].squares.numpy(),
        "largest weights": lambda role, w: np.abs(w).max(0),
        "at random": lambda role, w: random.random(w.shape[1]),
    }
    none = s.row("", 0, {"rtn": INT4})
    yield from (none | {"series": series} for series in scores)
    for share in s.few((0.01, 0.02, 0.04, 0.08, 0.16), 0.04):
        for series, score in scores.items():
            found = s.row(series, 100 * share, _exempted(s.model, s.matrices(), share, score))
            yield found | {"bits_per_weight": 16 * share + (1 - share) * none["bits_per_weight"]}


def _exempted(model: Model, roles: list[str], share: float, score: Callable[[str, Any], Any]) -> Model:
    weights = {r: effective(model.entries[r]) for r in roles}
    kept = {r: np.argsort(-score(r, w))[: round(share * w.shape[1])] for r, w in weights.items()}

    def holding(values: Mapping[str, Any]) -> Model:
        return model.with_entries({r: replace(model.entries[r], data=dense(w)) for r, w in values.items()})

    rest = {r: w.copy() for r, w in weights.items()}
    for r, w in rest.items():
        w[:, kept[r]] = 0
    rounded = recipe.Recipe("int4", (recipe.step("rtn", INT4),)).apply(holding(rest))
    values = {r: effective(rounded.entries[r]).copy() for r in roles}
    for r, w in values.items():
        w[:, kept[r]] = weights[r][:, kept[r]]
    return holding(values)


def outlier_matrices(s: Study) -> Iterator[Row]:
    """Whole matrices left alone, by the loss per weight of rounding each of them only, by their largest weight in standard deviations, by chance."""
    roles = s.matrices()
    rounded = s.made({"rtn": INT4})
    seen = windows(s.model, replace(s.calibration, windows=4))
    probe = Probe(s.model, seen.ids)
    loss = {r: probe.kld({r: effective(rounded.entries[r])}) for r in roles}
    size = {r: s.model.entries[r].data.size for r in roles}
    weights = {r: effective(s.model.entries[r]) for r in roles}
    orders = {
        "most loss per weight first": sorted(roles, key=lambda r: -loss[r] / size[r]),
        "largest outlier first": sorted(roles, key=lambda r: -np.abs(weights[r]).max() / weights[r].std()),
        "at random": list(np.random.default_rng(0).permutation(roles)),
    }
    none = s.row("", None, rounded)
    yield from (none | {"series": series, "kept": 0} for series in orders)
    for share in s.few((0.05, 0.1, 0.2, 0.3, 0.5), 0.2):
        for series, order in orders.items():
            exempt = {re.escape(r): "none" for r in order[: round(share * len(roles))]}
            yield s.row(series, None, {"rtn": {**INT4, "grids": exempt}}) | {"kept": len(exempt)}


def allocation(s: Study) -> Iterator[Row]:
    """GGUF's types for the layers' matrices; both series round in the same way, weighted by the mean squares of inputs."""
    types = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
    own = {"types": (*types, "Q8_0"), "only": MATRICES, "context": s.calibration.context}
    options = allocate.Options("gguf", bpw=16, **own)
    search = allocate.Search(s.model, options, s.job())

    def of(types: Mapping[str, str]) -> Model:
        return s.model.with_entries(
            {r: search.rounding.entry(r, types[i.name]) for i in search.items for r in i.members}
        )

    for type_ in s.few(types, "Q3_K", "IQ4_XS"):
        uniform = {i.name: type_ for i in search.items}
        size = sum(o.size for i in search.items for o in i.options if o.name == type_)
        yield s.row("one type for all", None, of(uniform)) | {"type": type_}
        yield s.row("allocated, same bytes", None, of(allocator.within(search.items, size).names()))


# --- zeros ----------------------------------------------------------------------------------------------------

PRUNERS: Mapping[str, Mapping[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude, 8 steps": {"method": "magnitude", "steps": 8},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"method": "sparsegpt"},
}


def sparsity(s: Study) -> Iterator[Row]:
    whole = s.row("", 0, s.model)
    yield from (whole | {"series": series} for series in PRUNERS)
    for share in s.few((0.2, 0.4, 0.5, 0.6, 0.7, 0.8), 0.5):
        for series, options in PRUNERS.items():
            yield s.row(series, 100 * share, {"sparse": {**options, "sparsity": share}})


def patterns(s: Study) -> Iterator[Row]:
    kinds = {"any half": {"sparsity": 0.5}, "4:8": {"pattern": "4:8"}, "2:4": {"pattern": "2:4"}}
    for x in s.few(tuple(kinds), "2:4"):
        for series, pruner in PRUNERS.items():
            yield s.row(series, x, {"sparse": {**pruner, **kinds[x]}})


def places(s: Study) -> Iterator[Row]:
    where = {"attention": r".*\.attn\..*", "MLP": r".*\.mlp\..*", "both": MATRICES}
    for share in s.few((0.3, 0.5, 0.7), 0.5):
        for series, targets in where.items():
            found = s.row(series, None, {"sparse": {"sparsity": share, "targets": targets}})
            yield found | {"x": 100 * found["zeros"]}


def order(s: Study) -> Iterator[Row]:
    """A recipe may prune what is rounded, on its codes; it refuses SparseGPT there, whose re-fitted weights would leave the grid."""
    magnitude, wanda, sparsegpt = ({"method": m} for m in ("magnitude", "wanda", "sparsegpt"))
    orders: Mapping[str, Callable[[Mapping[str, Any]], Passes]] = {
        "SparseGPT, then GPTQ": lambda how: {"sparse": {**sparsegpt, **how}, "gptq": INT4},
        "Wanda, then GPTQ": lambda how: {"sparse": {**wanda, **how}, "gptq": INT4},
        "GPTQ, then Wanda": lambda how: {"gptq": INT4, "sparse": {**wanda, **how}},
        "magnitude, then RTN": lambda how: {"sparse": {**magnitude, **how}, "rtn": INT4},
        "RTN, then magnitude": lambda how: {"rtn": INT4, "sparse": {**magnitude, **how}},
    }
    kinds = {"30 %": {"sparsity": 0.3}, "50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
    for x in s.few(tuple(kinds), "50 %"):
        for series, passes in orders.items():
            yield s.row(series, x, passes(kinds[x]))


# --- all of them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablation:
    """x: what differs along a table and an axis; curves are drawn over it, points beside each other where there is none."""

    about: str
    rows: Callable[[Study], Iterator[Row]]
    x: str = ""


ABLATIONS: Mapping[str, Ablation] = {
    "calibration-size": Ablation("int4 in groups of 128, by windows of text", calibration_size, "calibration windows"),
    "domain": Ablation("what the calibration text is", domain),
    "group-size": Ablation("int4, by weights that share a scale", group_size, "weights per scale"),
    "granularity": Ablation("8 bits, by what shares a scale", granularity),
    "outlier-channels": Ablation("int4 RTN, input channels left alone", outlier_channels, "channels left alone, %"),
    "outlier-matrices": Ablation("int4 RTN, matrices left alone", outlier_matrices, "bits per weight"),
    "allocation": Ablation("a type per matrix against one for all", allocation, "bits per weight"),
    "sparsity": Ablation("pruned weights, by method", sparsity, "zeros, %"),
    "patterns": Ablation("half of the weights pruned, by pattern and method", patterns),
    "places": Ablation("SparseGPT in a part of the layers", places, "zeros among all matrices' weights, %"),
    "order": Ablation("prune and round to int4, in both orders", order),
}  # fmt: skip


def draw(ablation: Ablation, rows: list[Row]) -> Any:
    return plots_ablations.curves(rows, ablation.x) if ablation.x else plots_ablations.points(rows)


def table(ablation: Ablation, rows: list[Row]) -> str:
    """Markdown."""
    head = f"| | {ablation.x or 'choice'} | mean KLD (95% interval) | perplexity | bits per weight | zeros |"
    lines = [head, "|---" * 6 + "|"]
    for r in rows:
        x = r["x"] if isinstance(r["x"], str) else f"{r['x']:.3g}"
        kld = f"{r['kld_mean']:.3g} ({r['kld_ci'][0]:.2g} .. {r['kld_ci'][1]:.2g})"
        name = f"{r['series']}, {r['type']}" if "type" in r else r["series"]
        lines.append(
            f"| {name} | {x} | {kld} | {r['ppl']:.2f} | {r['bits_per_weight']:.2f} | {100 * r['zeros']:.0f}% |"
        )
    return "\n".join(lines)


def run(study: Study, out: Path, only: list[str] | None = None) -> dict[str, list[Row]]:
    """Rows by ablation; files NAME.json and NAME.svg in `out`."""
    found = {}
    for name in only or ABLATIONS:
        ablation, start = ABLATIONS[name], time.perf_counter()
        rows = found[name] = list(ablation.rows(study))
        calibration = asdict(study.calibration) | {"text": Path(study.calibration.text).name}
        about = {"about": ablation.about, "model": Path(study.model.source).name, "text": study.text.name}
        measured = {"windows": len(study.yardstick.texts), "calibration": calibration, "rows": rows}
        (out / f"{name}.json").write_text(json.dumps(about | measured, indent=1) + "\n", encoding="utf-8")
        plots.save(draw(ablation, rows), out / f"{name}.svg")
        print(
            f"\n{name}: {ablation.about} ({time.perf_counter() - start:.0f} s)\n\n{table(ablation, rows)}",
            flush=True,
        )
    return found


def prepare(
    model: Path, out: Path, calibrate: Path | None = None, text: Path | None = None, *, quick: bool = False
) -> Study:
    """What is measured, on which text; halves of the bundled text for those that are not given."""
    out.mkdir(parents=True, exist_ok=True)
    words = TEXT.read_text(encoding="utf-8")
    middle = words.index("\n\n", len(words) // 2)
    if calibrate is None:
        calibrate = out / "first-half.txt"
        calibrate.write_text(words[:middle], encoding="utf-8")
    if text is None:
        text = out / "second-half.txt"
        text.write_text(words[middle:], encoding="utf-8")
    source = lconvert.read(str(model))
    shown = text_windows(source, text, *((4, 128) if quick else (8, 256)))
    calibration = Calibration(str(calibrate), *((8, 128) if quick else (16, 256)))
    return Study(source, Yardstick(source, shown), calibration, text, out, quick)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=HERE / "demo_model")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT")
    parser.add_argument("--text", type=Path, help="what is measured on")
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    study = prepare(options.model, options.out, options.calibrate, options.text, quick=options.quick)
    run(study, options.out, options.only)


if __name__ == "__main__":
    main()
