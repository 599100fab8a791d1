"""A quantized checkpoint to GGUF: its integers carried exactly, or dequantized to BF16 and rounded again by llama.cpp.

    python -P benchmarks/carry.py --models ORIGINAL CHECKPOINT... [--models ORIGINAL CHECKPOINT...]
        [--text FILE] [--windows 64] [--plot docs/img/carry.png] [--json FILE] [--vllm PYTHON] [--upstream]

CHECKPOINT is what another tool (GPTQModel, llm-compressor, AutoRound ...) made of the dense model ORIGINAL. Every file runs
in llama.cpp on the same windows of one text and is compared with ORIGINAL in transformers in fp32:

* carried: lconvert's GGUF file; its matrices' values are asserted to be the checkpoint's, bit for bit.
* via BF16: the checkpoint dequantized to BF16 (--dtype); "via BF16 -> TYPE": that file through llama.cpp's quantizer. With
  --upstream, llama.cpp's own converter runs on the checkpoint and its tensors must be the same bits.
* original -> TYPE: ORIGINAL through the same quantizer; the checkpoint is not used.
* fp32: the checkpoint's own numbers in transformers in fp32: what its integers cost with no runtime's rounding.
* vLLM: the checkpoint carried to compressed-tensors, in vLLM (with --vllm).

Embeddings and head are BF16 in all quantized files, so that only the layers differ. Intervals are block bootstraps; "against
carried" is the paired difference of the mean KLD with twice its standard error, positive where carrying is better. Kept are
integers (code minus zero point) that the file still has, where its blocks are as wide, and values (integer times scale).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for tests.upstream; appended, so that no folder here hides a package

import lconvert
from lconvert.converters import targets
from lconvert.converters.gguf_mixture_rules import FTYPES
from lconvert.executor import execute
from lconvert.formats import gguf
from lconvert.ir import Model, QTensor, Tensor, as_f32, dense
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.plan import refusals
from lconvert.validators import machine, plots, stored
from lconvert.validators.logits import LogitStats, compare, paired, windows
from lconvert.validators.proof import builtin_text
from lconvert.validators.runtimes import Runtime, llamacpp, open_runtime
from lconvert.validators.runtimes.hf import reference_tokenizer

STOCK = ("Q4_0", "Q5_0", "Q4_K_M", "Q8_0")
_BF16 = 30  # GGML_TYPE_BF16
_ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Way:
    """One way to an artifact, and what runs it. `kept`: whether what it keeps of the checkpoint is counted."""

    name: str
    runtime: str
    path: Path
    kept: bool = True


# --- files -----------------------------------------------------------------------------------------------


def write(model: Model, target: str, out: Path, **options: Any) -> Path:
    plan = targets.plan(model, target, out.name, **options)
    if refused := refusals(plan):
        raise SystemExit(f"{model.source} to {target}: {refused[0]}")
    execute(plan, out.parent if target == "gguf" else out, force=True)
    return out


def carried(model: Model, out: Path) -> Path:
    """The checkpoint as GGUF; SystemExit unless every quantized matrix is held exactly in blocks."""
    plan = targets.plan(model, "gguf", out.name)
    lost = [i.name for i in plan.items() if i.verdict.kind not in ("exact", "widened")]
    blocks = [i for i in plan.items() if i.name.startswith("blk.") and len(i.shape) > 1]
    wide = [i.name for i in blocks if i.type == "F32"]
    if lost or wide:
        raise SystemExit(f"{model.source}: GGUF does not hold {(lost + wide)[0]} exactly in blocks")
    execute(plan, out.parent, force=True)
    back = lconvert.read(out)
    for name in quantized(model):
        if not np.array_equal(effective(model.entries[name]), effective(back.entries[name])):
            raise SystemExit(f"{model.source}: {name} in {out.name} is not the checkpoint's")
    return out


def stock(floats: Path, type_: str, out: Path) -> Path:
    """A BF16 GGUF through llama.cpp's quantizer, embeddings and head left in BF16."""
    llama_cpp = llamacpp.package()
    llamacpp.capture_log(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[type_].number
    params.nthread = 1
    params.token_embedding_type = params.output_tensor_type = _BF16
    if llama_cpp.llama_model_quantize(os.fsencode(floats), os.fsencode(out), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp's quantizer refused {type_}: {' | '.join(llamacpp.LOG[-3:])}")
    return out


def check_upstream(checkpoint: Path, floats: Path, dtype: str, work: Path) -> str:
    """What llama.cpp's converter makes of the checkpoint; SystemExit where its tensors differ from those of `floats`."""
    from tests import upstream

    try:
        theirs = upstream.convert(checkpoint, work / "upstream.gguf", dtype.lower())
    except upstream.UpstreamError as e:
        return f"refused: {str(e).strip().splitlines()[-1]}"
    a, b = gguf.read(theirs), gguf.read(floats)
    for name in {*a.tensors, *b.tensors}:
        if not np.array_equal(gguf.raw(a, name).load(), gguf.raw(b, name).load()):
            raise SystemExit(f"{checkpoint}: {name} is not what llama.cpp's converter makes of it")
    return f"{len(a.tensors)} tensors, all equal"


def sizes(path: Path) -> dict[str, Any]:
    """Bytes of the file and of the decoder's matrices, bits per weight of these, how many there are of each type.

    SystemExit where embeddings and head of a quantized file are not BF16: the comparison would not be fair.
    """
    file = gguf.read(path)
    matrices = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
    ends = {t.name: t.type for t in file.tensors.values() if t.name in _ENDS}
    types = [t.type for t in matrices]
    if set(ends.values()) != {"BF16"} and not set(types) <= {"F32", "F16"}:
        raise SystemExit(f"{path.name}: embeddings and head are {ends}, not BF16 as elsewhere")
    return {
        "bytes": file.size,
        "layer_bytes": sum(t.nbytes for t in matrices),
        "layer_bits": stored.bits_per_weight((t.nbytes, t.shape) for t in matrices),
        "types": {t: types.count(t) for t in sorted(set(types))},
    }


# --- what survives of the integers -----------------------------------------------------------------------


def quantized(model: Model) -> list[str]:
    return [n for n, e in model.entries.items() if isinstance(e.data, QTensor)]


def integers(q: QTensor) -> NDArray[np.float32]:
    """Codes minus zero points, with the sign of a plain scale: llama.cpp's scales may be negative."""
    assert isinstance(q.scale, Tensor)
    sign = dense(np.sign(as_f32(q.scale.load(), q.scale.dtype)))
    return dequantize(replace(q, scale=sign, offset=None))


def survival(source: Model, path: Path) -> dict[str, float]:
    """What `path` still has of the checkpoint's quantized weights: the share of equal integers (where all its blocks hold
    plain integers of as many bits) and of equal values, both with the zeros, and the relative RMS error of the values."""
    other = lconvert.read(path)
    weights = equal = same = 0
    plain = True
    error = norm = 0.0
    for name in quantized(source):
        ours, theirs = source.entries[name].data, other.entries[name].data
        a, b = effective(source.entries[name]), effective(other.entries[name])
        weights += a.size
        same += int((a == b).sum())
        error += float(np.square(a - b, dtype=np.float64).sum())
        norm += float(np.square(a, dtype=np.float64).sum())
        if isinstance(ours, QTensor) and isinstance(theirs, QTensor) and alike(ours, theirs):
            equal += int((integers(ours) == integers(theirs)).sum())
        else:
            plain = False
    found = {"values_equal": same / weights, "relative_rms_error": (error / norm) ** 0.5}
    return found | ({"integers_equal": equal / weights} if plain else {})


def alike(a: QTensor, b: QTensor) -> bool:
    """Whether both are integers of as many bits with a plain scale, so that their integers can be compared."""

    def plain(q: QTensor) -> bool:
        return q.grid.kind == "int" and q.offset is None and isinstance(q.scale, Tensor)

    return plain(a) and plain(b) and a.grid.bits == b.grid.bits


# --- measuring -------------------------------------------------------------------------------------------


def ways(original: Model, source: Model, options: argparse.Namespace, work: Path) -> list[Way]:
    """Every artifact of one checkpoint, written to `work`."""
    via = f"via {options.dtype}"
    folder = write(source, "dense", work / "dense", dtype=options.dtype)
    floats = write(lconvert.read(folder), "gguf", work / "floats.gguf")
    if options.upstream:
        said = check_upstream(Path(source.source), floats, options.dtype, work)
        print(f"{Path(source.source).name}, llama.cpp's converter: {said}", file=sys.stderr)
    first = write(original, "gguf", work / "original.gguf")
    found = [Way("carried", "llama.cpp", carried(source, work / "carried.gguf"))]
    for t in options.types:
        found.append(Way(f"{via} -> {t}", "llama.cpp", stock(floats, t, work / f"{t}.gguf")))
    for t in options.types:
        out = stock(first, t, work / f"original-{t}.gguf")
        found.append(Way(f"original -> {t}", "llama.cpp", out, kept=False))
    found.append(Way(via, "llama.cpp", floats))
    found.append(Way("fp32", "dequantized", Path(source.source), kept=False))
    if options.vllm:
        packed = write(source, "compressed-tensors", work / "compressed-tensors")
        found.append(Way("vLLM", "vllm", packed, kept=False))
    return found


def measure(
    original: Path, checkpoint: Path, texts: Sequence[list[int]], options: argparse.Namespace, work: Path
) -> list[dict[str, Any]]:
    source = lconvert.read(checkpoint)
    made = ways(lconvert.read(original), source, options, work)
    with ExitStack() as stack:

        def opened(runtime: str, path: Path) -> Runtime:
            python = options.vllm if runtime == "vllm" else None
            found = open_runtime(runtime, path, context=len(texts[0]), threads=options.threads, python=python)
            return stack.enter_context(closing(found))

        runtimes = {w.name: opened(w.runtime, w.path) for w in made}
        runtimes["original"] = opened("transformers", original)
        pairs = [(reference, w.name) for reference in ("original", "fp32") for w in made]
        stats = compare({name: r.logits for name, r in runtimes.items()}, pairs, texts)
        settings = {name: r.info() for name, r in runtimes.items()}
    ours = stats["original", "carried"]
    return [
        row(original.name, checkpoint.name, describe(source), w, stats["original", w.name], ours)
        | {"kld_to_checkpoint": stats["fp32", w.name].kld_mean, "settings": settings[w.name]}
        | (survival(source, w.path) if w.kept else {})
        for w in made
    ]


def describe(model: Model) -> str:
    found = [line for line in model.report if line.startswith("quantized: ")]
    return found[0].removeprefix("quantized: ") if found else ""


def row(
    model: str, checkpoint: str, about: str, way: Way, stats: LogitStats, ours: LogitStats
) -> dict[str, Any]:
    delta, error = paired(stats, ours)
    data = stats.data
    return {
        "model": model,
        "checkpoint": checkpoint,
        "quantized": about,
        "path": way.name,
        "runtime": way.runtime,
        **(sizes(way.path) if way.runtime == "llama.cpp" else {}),
        "tokens": stats.tokens,
        "kld_mean": stats.kld_mean,
        "kld_ci": data["kld"]["mean_ci"],
        "kld_p99": data["kld"]["p99"],
        "same_top1": stats.same_top1,
        "same_top1_ci": data["same_top1_ci"],
        "ppl_ratio": data["ppl"]["ratio"],
        "ppl_log_ratio_se": data["ppl"]["log_ratio_se"],
        "against_carried": delta,
        "against_carried_se": error,
    }


# --- output ----------------------------------------------------------------------------------------------

HEAD = (
    "checkpoint", "path", "layers: bits (bytes)", "file, bytes", "mean KLD (95% CI)", "same top-1", "perplexity",
    "KLD against carried", "KLD to the checkpoint", "integers, values kept",
)  # fmt: skip


def cells(r: dict[str, Any]) -> list[str]:
    low, high = r["kld_ci"]
    size = [f"{r['layer_bits']:.2f} ({r['layer_bytes']})", str(r["bytes"])] if "bytes" in r else [""] * 2
    difference = f"{r['against_carried']:+.1e} ± {2 * r['against_carried_se']:.1e}"
    return [
        r["checkpoint"], f"vLLM, {r['settings']['dtype']}" if r["path"] == "vLLM" else r["path"], *size,
        f"{r['kld_mean']:.2e} ({low:.2e} .. {high:.2e})", f"{100 * r['same_top1']:.2f}%", f"x{r['ppl_ratio']:.4f}",
        "" if r["path"] == "carried" else difference, f"{r['kld_to_checkpoint']:.1e}" if r["path"] != "fp32" else "",
        ", ".join(f"{100 * r[k]:.1f}%" if k in r else "-" for k in ("integers_equal", "values_equal"))
        if "values_equal" in r else "",
    ]  # fmt: skip


#: marker, colour of plots.COLOURS, whether it is filled
LOOKS = (("*", "s1", True), ("s", "s2", True), ("^", "s3", True), ("s", "s2", False), ("^", "s3", False))


def plot(rows: Sequence[dict[str, Any]], via: str, path: Path) -> None:
    """Mean KLD of every path, one line per checkpoint: filled markers come from the checkpoint, hollow ones from the original."""
    checkpoints = list(dict.fromkeys((r["model"], r["checkpoint"]) for r in rows))
    by = {(r["model"], r["checkpoint"], r["path"]): r for r in rows}
    names = ["carried", *(f"{a} -> {t}" for a in (f"via {via}", "original") for t in ("Q4_0", "Q4_K_M"))]
    with plots._drawing(1.9 + 0.5 * len(checkpoints)) as (figure, axes):
        figure.set_size_inches(8.2, figure.get_size_inches()[1])
        for n, (name, (marker, colour, filled)) in enumerate(zip(names, LOOKS, strict=True)):
            at = [i for i, c in enumerate(checkpoints) if (*c, name) in by]
            found = [by[*checkpoints[i], name] for i in at]
            spread = np.array([[abs(e - r["kld_mean"]) for e in r["kld_ci"]] for r in found]).reshape(-1, 2).T
            axes.errorbar(
                [r["kld_mean"] for r in found], [i + 0.12 * (n - 2) for i in at], xerr=spread, linestyle="",
                marker=marker, markersize=12 if marker == "*" else 6.5, color=plots.COLOURS[colour], elinewidth=1,
                markerfacecolor=plots.COLOURS[colour if filled else "paper"], label=legend(name, rows),
            )  # fmt: skip
        for i, c in enumerate(checkpoints):
            floor = by[*c, "fp32"]["kld_mean"]
            axes.plot(
                [floor] * 2, [i - 0.38, i + 0.38], color=plots.COLOURS["ink"], linewidth=1.2, zorder=1,
                label=None if i else "the checkpoint itself, in fp32",
            )  # fmt: skip
        labels = [f"{c}\n{m}, {by[m, c, 'carried']['layer_bits']:.1f} bits" for m, c in checkpoints]
        axes.set_yticks(range(len(checkpoints)), labels)
        axes.set_ylim(len(checkpoints) - 0.45, -0.55)
        axes.grid(False, axis="y")
        axes.set_xscale("log")
        plots._ticks(axes.xaxis)
        axes.set_xlabel("mean KL divergence to the original model, nats (log scale)")
        figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.2, columnspacing=1.4)
        plots.save(figure, path)


def legend(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """A path's name with the bits per weight of its layers."""
    bits = sorted({f"{r['layer_bits']:.1f}" for r in rows if r["path"] == name})
    where = "carried exactly" if name == "carried" else name.replace("->", "→")
    return f"{where} ({'–'.join(dict.fromkeys((bits[0], bits[-1])))} bits)"


def save(rows: Sequence[dict[str, Any]], corpus: str, options: argparse.Namespace, seconds: float) -> None:
    """The JSON file and the plot of what is measured so far."""
    if options.json:
        document = {
            "machine": machine.describe(),
            "seconds": seconds,
            "text_sha256": hashlib.sha256(corpus.encode()).hexdigest(),
            "windows": options.windows,
            "length": options.length,
            "dequantized_to": options.dtype,
            "embeddings_and_head": "BF16",
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        plot(rows, options.dtype, options.plot)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--models", action="append", nargs="+", type=Path, required=True, metavar="FOLDER",
        help="the original, then checkpoints made of it; may be given again for another original",
    )  # fmt: skip
    arguments.add_argument("--text", type=Path)
    arguments.add_argument("--windows", type=int, default=64)
    arguments.add_argument("--length", type=int, default=128, help="tokens of a window, BOS included")
    arguments.add_argument("--types", nargs="+", default=STOCK, choices=FTYPES, metavar="TYPE")
    arguments.add_argument(
        "--dtype", default="BF16", choices=("BF16", "F16", "F32"), help="what is dequantized to"
    )
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--vllm", type=Path, help="an interpreter that has vLLM")
    arguments.add_argument(
        "--upstream", action="store_true", help="compare with llama.cpp's converter (LCONVERT_LLAMACPP_SRC)"
    )
    arguments.add_argument("--plot", type=Path)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    start = time.perf_counter()
    corpus = options.text.read_text(encoding="utf-8") if options.text else builtin_text()
    rows: list[dict[str, Any]] = []
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for original, *checkpoints in options.models:
        model = lconvert.read(original)
        assert model.tokenizer is not None
        ids = list(reference_tokenizer(model.tokenizer).encode(corpus, add_special_tokens=False).ids)
        bos = model.tokenizer.special.get("bos", (None,))[0]
        texts = windows(ids, options.length, bos, options.windows)
        for checkpoint in checkpoints:
            with tempfile.TemporaryDirectory() as work:
                found = measure(original, checkpoint, texts, options, Path(work))
            rows += found
            print("\n".join(f"| {' | '.join(cells(r))} |" for r in found), flush=True)
            save(rows, corpus, options, time.perf_counter() - start)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
