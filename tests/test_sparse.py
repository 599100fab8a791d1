"""The pruning pass, exact zeros on every grid, and that targets keep them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import recipe
from lconvert.errors import OptionError, UnsupportedError
from lconvert.formats.gguf_blocks import SCHEMES
from lconvert.ir import Entry, Model, QTensor, Tensor, dense
from lconvert.kernels.qtensor import dequantize, values
from lconvert.passes import permute, rotate, rtn, sparse
from lconvert.primitives import zeros
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.text import windows
from lconvert.primitives.zeros import Bits, holds_zero, measured, pruned, zero_code
from tests.conftest import DEMO

WORDS = "The river runs down to the sea, and the sea does not ask the river where it has been. " * 40
PORTABLE = [f"{s}int{b}" for s in ("", "u") for b in range(2, 9)] + ["fp8", "nf4", "fp4"]
#: What the real encoders and decoders say below.
HOLD = {
    *PORTABLE,
    *("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
}
#: Not to be had without an importance matrix; their lattices are those of other IQ types.
WITH_IMPORTANCE = {"IQ1_S", "IQ2_XS", "IQ2_XXS"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(WORDS)
    return Job(Calibration(str(text), 6, 64), threads=1)


@pytest.fixture(scope="module")
def demo_model() -> Model:
    return lconvert.read(DEMO)


def with_zeros(cols: int = 512) -> tuple[Tensor, Any]:
    """A matrix of which half is 0, some groups of it all; and where it is not 0."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, cols)).astype(np.float32) * np.float32(0.05) + np.float32(0.011)
    keep = rng.random(x.shape) < 0.5
    keep[3], keep[4, :256] = False, False
    return dense(np.where(keep, x, np.float32(0))), keep


def on_grid(t: Tensor, grid: str) -> QTensor:
    """Rounded to nearest by the encoder that users get."""
    from lconvert.passes import rtn_float

    own = {"group": {"fp8": -1, "nf4": 64}.get(grid, 32)} if grid in PORTABLE and grid != "fp4" else {}
    peak = rtn_float.Peak((t,)) if grid in ("fp4", "fp8") else None
    return rtn.quantized(t, rtn.Options(grid, **own), peak)


@pytest.mark.parametrize("grid", [*PORTABLE, *sorted(set(SCHEMES) - WITH_IMPORTANCE)])
def test_which_grids_hold_an_exact_zero(grid: str) -> None:
    t, keep = with_zeros()
    q = on_grid(t, grid)
    found = dequantize(q)[~keep]
    assert holds_zero(q) == (grid in HOLD)
    if grid in HOLD:
        assert not found.any()
    else:
        assert found.any()


@pytest.mark.parametrize("grid", sorted(HOLD))
def test_masked_codes_mean_zero_and_the_others_stay(grid: str) -> None:
    rng = np.random.default_rng(4)
    q = on_grid(dense(rng.standard_normal((8, 512)).astype(np.float32) + np.float32(0.3)), grid)
    keep = rng.random((8, 512)) < 0.4
    before, after = dequantize(q), dequantize(pruned(q, Bits.of(keep)))
    assert np.array_equal(after, np.where(keep, before, np.float32(0)))
    assert np.array_equal(dequantize(pruned(q, Bits.of(keep)), 3, 6), after[3:6])


@pytest.mark.parametrize("grid", ["IQ4_NL", "Q4_1", "Q4_K"])
def test_grids_without_zero_are_refused(grid: str) -> None:
    q = on_grid(with_zeros()[0], grid)
    with pytest.raises(
        OptionError, match=r"head: no code of its grid means 0 whatever the scales are.*quantize onto intN"
    ):
        pruned(q, Bits.of(np.ones(q.shape, bool)), "head")


def test_zero_points_that_are_no_codes_hold_no_zero() -> None:
    q = on_grid(with_zeros()[0], "uint4")
    assert isinstance(q.zero, Tensor)
    shape = q.zero.shape
    assert zero_code(replace(q, zero=dense(np.full(shape, 15, np.uint8)))) == 0
    assert zero_code(replace(q, zero=dense(np.full(shape, 16, np.uint8)))) is None
    assert zero_code(replace(q, zero=dense(np.full(shape, 7.5, np.float16)))) is None


def test_zero_points_of_columns_in_another_order() -> None:
    q = on_grid(with_zeros()[0], "uint4")
    order = np.random.default_rng(5).permutation(np.arange(512) // 32).astype(np.int32)
    q = replace(q, g_idx=dense(order))
    keep = np.zeros((8, 512), bool)
    keep[:, ::3] = True
    assert np.array_equal(dequantize(pruned(q, Bits.of(keep))), np.where(keep, dequantize(q), np.float32(0)))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_survivors_keep_their_bits(dtype: Any) -> None:
    raw = np.random.default_rng(6).integers(0, 2**15, (5, 12)).astype(np.uint16)
    array = {"BF16": raw, "F16": raw.view(np.float16), "F32": raw.astype(np.float32)}[dtype]
    keep = np.random.default_rng(7).random((5, 12)) < 0.5
    found = zeros.masked(dense(array, dtype), Bits.of(keep))
    bits = np.dtype(f"u{array.dtype.itemsize}")
    assert np.array_equal(found.load().view(bits), np.where(keep, array.view(bits), 0))
    assert np.array_equal(found.read(2, 4).view(bits), found.load().view(bits)[2:4])


def test_zeros_are_counted_and_patterns_seen() -> None:
    def of(*row: float, first: float = 0) -> zeros.Sparsity:
        x = np.tile(np.array(row, np.float32), (6, 16 // len(row)))
        x[0, 0] = first
        return measured(dense(x))

    assert of(1, 1, first=1) == zeros.Sparsity(0, 96, "")
    assert of(0, 1) == zeros.Sparsity(48, 96, "2:4")
    assert of(0, 0, 0, 0, 1, 1, 1, 1) == zeros.Sparsity(48, 96, "4:8")
    assert of(0, 0, 0, 0, 1, 1, 1, 1, first=2) == zeros.Sparsity(47, 96, "")
    assert of(0, 1).share == 0.5
    assert measured(dense(np.zeros((3, 7), np.float32))) == zeros.Sparsity(21, 21, "")


def matrices(model: Model) -> list[Entry]:
    return [e for n, e in model.entries.items() if n.startswith("layers.") and len(e.shape) == 2]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_exact_patterns_of_a_real_model(demo_model: Model, job: Job, method: Any, pattern: str) -> None:
    found = sparse.run(demo_model, sparse.Options(method, pattern=pattern), job)
    for entry in matrices(found):
        m = measured(entry.data)
        assert m.zeros == m.size // 2 and m.pattern == ("" if pattern == "unstructured" else pattern), (
            entry.name
        )
        note = "50.00% pruned" + (", survivors re-fitted" if method == "sparsegpt" else "")
        assert entry.provenance[-1] == f"sparse: {method}, {pattern}, {note}"
        assert isinstance(entry.data, Tensor)
        assert entry.data.dtype == demo_model.entries[entry.name].data.dtype  # type: ignore[union-attr]
        if method != "sparsegpt":
            before = values(demo_model.entries[entry.name].data)
            assert np.array_equal(values(entry.data), np.where(values(entry.data) != 0, before, 0))
    assert found.report[-1] == f"sparse: {len(matrices(found))} matrices by {method}, {pattern}, 50.0% zeros"
    untouched = set(demo_model.entries) - {e.name for e in matrices(found)}
    assert all(found.entries[n] is demo_model.entries[n] for n in untouched)


def kld(model: Model, other: Model, ids: list[list[int]]) -> float:
    import torch

    from lconvert.forward import Forward

    def logs(m: Model) -> Any:
        forward = Forward(m)
        return torch.cat([torch.log_softmax(torch.from_numpy(forward.logits(w)).double(), -1) for w in ids])

    a, b = logs(model), logs(other)
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_methods_rank_as_their_papers_say(demo_model: Model, tmp_path: Path) -> None:
    """Mean KL divergence on prose that they were not calibrated on."""
    words = (DEMO.parents[1] / "validators" / "text" / "excerpt.txt").read_text()
    text, held = tmp_path / "text.txt", tmp_path / "held.txt"
    text.write_text(words[:40_000])
    held.write_text(words[-8_000:])
    job, ids = (
        Job(Calibration(str(text), 24, 128), threads=1),
        [list(w) for w in windows(demo_model, Calibration(str(held), 12, 192)).ids],
    )
    found = {}
    for method, steps in (("magnitude", 1), ("wanda", 1), ("sparsegpt", 1), ("wanda", 3), ("sparsegpt", 3)):
        options = sparse.Options(method, 0.6, steps=steps)  # type: ignore[arg-type]
        found[method, steps] = kld(demo_model, sparse.run(demo_model, options, job), ids)
    assert found["sparsegpt", 1] < found["wanda", 1] < found["magnitude", 1]
    assert found["wanda", 3] < found["wanda", 1]
    assert found["sparsegpt", 3] < found["sparsegpt", 1]


def test_a_schedule_prunes_as_much_as_one_shot(demo_model: Model, job: Job) -> None:
    found = sparse.run(demo_model, sparse.Options("magnitude", 0.3, steps=3, targets=r".*\.(q|down)"), job)
    done = [e for e in matrices(found) if e.provenance and e.provenance[-1].startswith("sparse")]
    assert {e.name.rpartition(".")[2] for e in done} == {"q", "down"}
    for entry in done:
        assert entry.provenance[-1].endswith("survivors re-fitted")
        assert abs(measured(entry.data).share - 0.3) < 1e-3
    assert found.report[-1].endswith("by magnitude, unstructured, 3 steps, 30.0% zeros")


@pytest.mark.parametrize("grid", ["int4", "uint4", "Q4_0", "Q6_K"])
def test_both_orders_with_quantization(demo_model: Model, job: Job, grid: str) -> None:
    """Zeros survive rounding to nearest, and codes can be pruned; the same mask either way, by magnitude."""
    step = recipe.step(
        "rtn", {"grid": grid, "group": 32} if "int" in grid else {"grid": grid, "targets": r".*\.down"}
    )
    prune = sparse.Options("wanda", pattern="2:4", targets=step.options.targets)
    first = rtn.run(sparse.run(demo_model, prune, job), step.options)
    last = sparse.run(rtn.run(demo_model, step.options), prune, job)
    for model in (first, last):
        done = [e for e in matrices(model) if isinstance(e.data, QTensor)]
        assert done
        assert {measured(e.data).pattern for e in done} == {"2:4"}


def test_what_would_undo_a_mask(demo_model: Model, job: Job) -> None:
    """Also where the mask came with the model: from a folder, or from the sweep of gptq."""
    masked = sparse.run(demo_model, sparse.Options("magnitude", pattern="2:4"), job)
    swept = demo_model.with_entries({}, "sparse: 21 matrices, 2:4, in the sweep of gptq")
    for model in (masked, swept):
        with pytest.raises(
            UnsupportedError, match=r"rotate: leaves nothing of the model's zeros \(sparse: 21 matrices"
        ):
            rotate.run(model, rotate.Options())
        with pytest.raises(
            UnsupportedError, match=r"permute: leaves nothing of the model's pattern \(sparse: 21"
        ):
            permute.run(model, permute.Options(), job)
    for grid, lines in (("Q4_K", 1), ("Q6_K", 0)):
        done = rtn.run(masked, recipe.step("rtn", {"grid": grid, "targets": r".*\.down"}).options)
        assert sum("zeros cannot be kept exactly" in line for line in done.report) == lines


def test_bad_options() -> None:
    for given, words in (
        ({"method": "lottery"}, "method 'lottery': expected one of magnitude, wanda, sparsegpt"),
        ({"sparsity": 1.0}, "sparsity 1.0; expected a share between 0 and 1"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity 0.6 with 2:4, which is 0.5"),
        ({"pattern": "2:4", "per": "row"}, "per row with 2:4"),
        ({"per": "layer"}, "per 'layer': expected one of"),
        ({"steps": 0}, "steps 0; expected a whole number"),
        ({"damping": 0}, "damping 0.0; expected a share above 0"),
        ({"targets": "("}, "not a regular expression"),
        ({"pattern": "4:2"}, "expected unstructured, or N:M"),
    ):
        with pytest.raises(OptionError) as e:
            recipe.step("sparse", given)
        assert words in str(e.value)


def test_what_cannot_be_pruned_is_said(demo_model: Model, job: Job) -> None:
    with pytest.raises(OptionError, match="no matrix matches targets 'nothing'"):
        sparse.run(demo_model, sparse.Options("magnitude", targets="nothing"))
    with pytest.raises(OptionError, match=r"rows of \d+ weights do not divide into groups of 7"):
        sparse.run(demo_model, sparse.Options("magnitude", pattern="3:7"))
    with pytest.raises(OptionError, match="sparse: needs a calibration text"):
        sparse.run(demo_model, sparse.Options("wanda"))
    quantized = rtn.run(demo_model, rtn.Options("int4", 32))
    with pytest.raises(OptionError, match=r"is quantized, and re-fitted weights would leave its grid"):
        sparse.run(quantized, sparse.Options("sparsegpt"), job)
    minima = rtn.run(demo_model, rtn.Options("Q4_1"))
    with pytest.raises(OptionError, match="no code of its grid means 0"):
        sparse.run(minima, sparse.Options("magnitude"), job)
