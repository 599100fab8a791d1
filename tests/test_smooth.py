"""SmoothQuant: its formula on activations that transformers itself shows, the function kept, and outliers that no longer hurt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.forward import Forward
from lconvert.ir import Model, dense
from lconvert.kernels.qtensor import values
from lconvert.passes import activations, rtn, smooth
from lconvert.primitives import text
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.sites import sites
from lconvert.primitives.text import Windows, windows
from lconvert.validators.rounded_forward import RoundedForward
from tests import case_models, random_models
from tests.built_models import kld
from tests.conftest import DEMO
from tests.test_folding import distance

TEXT = Path(__file__).parent.parent / "README.md"
JOB = Job(Calibration(str(TEXT), windows=2, context=48))
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def model() -> Model:
    return lconvert.read(DEMO)


def _factors(before: Model, after: Model, norm: str) -> np.ndarray:
    return values(before.entries[norm].data).astype(np.float64) / values(after.entries[norm].data)


def test_factors_are_the_papers(model: Model) -> None:
    """From inputs as transformers' own model, loaded by transformers, hands them to the matrices."""
    seen: dict[str, np.ndarray] = {}
    hf = random_models.reference(DEMO)
    own = hf.model.layers[1]
    for name, module in (("attn_norm", own.self_attn.k_proj), ("mlp_norm", own.mlp.up_proj)):

        def hook(m: object, args: tuple[object, ...], name: str = name) -> None:
            top = np.abs(args[0].numpy()).reshape(-1, args[0].shape[-1]).max(0)  # type: ignore[attr-defined]
            seen[name] = np.maximum(seen.get(name, top), top)

        module.register_forward_pre_hook(hook)
    for ids in windows(model, Calibration(str(TEXT), 2, 48)).ids:
        random_models.logits(hf, ids)
    readers = {"attn_norm": ("attn.q", "attn.k", "attn.v"), "mlp_norm": ("mlp.gate", "mlp.up")}
    out = smooth.run(model, smooth.Options(alpha=0.7), JOB)
    for norm, roles in readers.items():
        w = np.max([np.abs(values(model.entries[f"layers.1.{r}"].data)).max(0) for r in roles], axis=0)
        want = seen[norm].astype(np.float64) ** 0.7 / w.astype(np.float64) ** 0.3
        assert np.allclose(_factors(model, out, f"layers.1.{norm}"), want, rtol=1e-4)
        for role in roles:
            grown = values(out.entries[f"layers.1.{role}"].data)
            assert np.allclose(grown, values(model.entries[f"layers.1.{role}"].data) * want, rtol=1e-4)
    assert distance(Forward(model).logits(IDS), Forward(out).logits(IDS)) <= 1e-5
    assert out.report[-1] == f"smooth: {2 * model.decoder.layers} activations, alpha 0.7"
    assert out.entries["layers.0.attn.q"].provenance[-1] == "smooth alpha 0.7"
    assert out.entries["layers.0.attn.o"] == model.entries["layers.0.attn.o"], (
        "norms only, if nothing else is asked for"
    )


def test_values_and_up_where_asked_for(model: Model) -> None:
    out = smooth.run(model, smooth.Options(sites=r".*\.(attn\.v|mlp\.up)"), JOB)
    changed = {n.split(".", 2)[2] for n, e in out.entries.items() if e != model.entries[n]}
    assert changed == {"attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert distance(Forward(model).logits(IDS), Forward(out).logits(IDS)) <= 1e-5


def test_dead_channels_keep_the_factor_one() -> None:
    x, w = np.array([0.0, 4.0, 4.0, 1e-9]), np.array([1.0, 0.0, 1.0, 1.0])
    s, dead = smooth.smoothing(x, w, smooth.Options())
    assert s.tolist() == [1, 1, 2, pytest.approx(10**-4.5)] and dead == 2
    assert smooth.smoothing(x, w, smooth.Options(least=0.5))[0].tolist() == [1, 1, 2, 0.5]
    assert smooth.smoothing(x, w, smooth.Options(alpha=1.0))[0][2] == 4
    assert smooth.smoothing(x, w, smooth.Options(alpha=0.0))[0][2] == 1


def test_a_dead_channel_is_reported(model: Model) -> None:
    name = "layers.0.attn_norm"
    w = values(model.entries[name].data).copy()
    w[[3, 8]] = 0
    one = model.with_entries({name: replace(model.entries[name], data=dense(w))})
    out = smooth.run(one, smooth.Options(), JOB)
    said = f"smooth: channels without activations or weights keep the factor 1: 2 of {len(w)} at {name}"
    assert out.report[-1] == said
    assert (values(out.entries[name].data)[[3, 8]] == 0).all()


def test_the_heaviest_reader_counts_and_query_heads_share_a_value_head() -> None:
    mixture = lconvert.read(case_models.folder("mixtral-experts"))
    site = next(s for s in sites(mixture.decoder) if s.name == "layers.0.mlp_norm")
    router = values(mixture.entries["layers.0.moe.router"].data).copy()
    router[2, 7] = -99
    entry = mixture.entries["layers.0.moe.router"]
    loud = mixture.with_entries({entry.name: replace(entry, data=dense(router))})
    assert smooth.heaviest(loud, site)[7] == 99
    v = next(s for s in sites(mixture.decoder) if s.name == "layers.0.attn.v")
    o = np.abs(values(mixture.entries["layers.0.attn.o"].data)).max(0)
    assert v.repeats == 2
    assert np.array_equal(smooth.heaviest(mixture, v)[: v.run], np.maximum(o[: v.run], o[v.run : 2 * v.run]))


@pytest.mark.parametrize("name", ["deepseek_v2-queries", "mixtral-experts"])
def test_activations_inside_experts_are_seen_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every expert that a token chose: what its up makes is what its down takes."""
    model = lconvert.read(case_models.folder(name))
    shown = Windows((tuple(i % model.decoder.vocab for i in range(7, 199)),))
    monkeypatch.setattr(text, "windows", lambda model, calibration: shown)
    inner = [s for s in sites(model.decoder) if ".experts." in s.name]
    found, _ = smooth.peaks(model, inner, JOB)
    assert inner and set(found) <= {s.name for s in inner} and len(found) > len(inner) / 2
    assert all(
        x.shape == (s.channels,) and x.max() > 0 for s in inner if (x := found.get(s.name)) is not None
    )


# --- what it is for --------------------------------------------------------------------------------------


def w8a8(model: Model) -> Model:
    return activations.run(rtn.run(model, rtn.Options("int8", -1)), activations.Options("int8"))


def test_outliers_no_longer_hurt_w8a8(shared: Path) -> None:
    """O1: weights per row, activations per token, on a trained model whose activations have outliers."""
    model = lconvert.read(shared / "models" / "wiki-llama-12m-outlier")
    job = Job(Calibration(str(shared / "text" / "calib.txt"), windows=2, context=128))
    (ids,) = windows(model, Calibration(str(shared / "text" / "wikitext-2-test.txt"), 1, 128)).ids
    want = Forward(model).logits(ids)
    plain = kld(want, RoundedForward(w8a8(model)).logits(ids)).mean()
    smoothed = smooth.run(model, smooth.Options(alpha=0.8), job)
    better = kld(want, RoundedForward(w8a8(smoothed)).logits(ids)).mean()
    assert better < 0.5 * plain


# --- refusals --------------------------------------------------------------------------------------------


def test_what_it_refuses(model: Model) -> None:
    run, some = smooth.run, smooth.Options()
    with pytest.raises(OptionError, match=r"smooth: needs a calibration text; name one \(--calibrate TEXT\)"):
        run(model, some)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.attn\.q: is quantized already"):
        run(rtn.run(model, rtn.Options("int8", -1)), some, JOB)
    olmo = lconvert.read(case_models.folder("olmo2-gqa"))
    with pytest.raises(OptionError, match="smooth: nothing in olmo2 that factors can move through matches"):
        run(olmo, some, JOB)
    with pytest.raises(OptionError, match=r"matches sites 'head'"):
        run(model, smooth.Options(sites="head"), JOB)
    norm = model.entries["layers.1.mlp_norm"]
    bad = values(norm.data).copy()
    bad[4] = np.inf
    with pytest.raises(
        InputError,
        match=r"layers\.1\.mlp_norm holds NaN or infinite values, first in row 4",
    ):
        run(model.with_entries({norm.name: replace(norm, data=dense(bad))}), some, JOB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "smooth: alpha 1.5; expected a number from 0 to 1"),
        ({"alpha": True}, "smooth: alpha True"),
        ({"alpha": float("nan")}, "smooth: alpha nan"),
        ({"least": 0}, "smooth: least 0; expected a number from 1e-12 to 1"),
        ({"sites": "("}, r"smooth: '\(' is not a regular expression"),
    ],
)
def test_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        smooth.Options(**options)  # type: ignore[arg-type]
