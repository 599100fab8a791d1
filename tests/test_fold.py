"""A scale of inputs (pre_quant_scale) folded into what makes these inputs: the same logits, and it never vanishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.converters import checkpoint, fold, targets
from lconvert.converters.kinds import matrices, plain, rounded, with_full_scales
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import E4M3, ActSpec, KVSpec, Model, QTensor, Transform, dense
from lconvert.kernels.qtensor import effective, values
from lconvert.passes import rtn
from lconvert.plan import refusals
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.sites import sites
from tests import case_models
from tests.conftest import DEMO

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
#: Matrices that share one input.
_SHARED = (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"))


def _scales(width: int, seed: int) -> np.ndarray:
    """Powers of two with a little noise from 1/8 to 8: leaving them out would ruin the model."""
    rng = np.random.default_rng(seed)
    return (2.0 ** rng.integers(-3, 4, width) * rng.uniform(0.9, 1.1, width)).astype(np.float32)


def scaled(model: Model, *, only: str = "", disagree: bool = False) -> Model:
    """The same function with a scale before matrices of the layers (whose roles end with `only`): the weights are divided
    by it where they are plain, so that logits stay near the model's own."""
    new = {}
    for at, (name, e) in enumerate(model.entries.items()):
        layer, _, role = name.partition(".")[2].partition(".")
        if not name.startswith("layers.") or len(e.shape) != 2 or "norm" in name or "router" in name:
            continue
        if not role.endswith(only):
            continue
        seed = next((i for i, g in enumerate(_SHARED) if role in g), 10) + 100 * int(layer)
        p = _scales(e.shape[1], at if disagree else seed)
        a = model.arch.layer(int(layer)).attention
        if role == "attn.o" and not disagree and a.mla is None:
            p = _scales(a.kv_heads * a.head_dim, seed).reshape(a.kv_heads, 1, a.head_dim)
            p = np.broadcast_to(p, (a.kv_heads, a.heads // a.kv_heads, a.head_dim)).reshape(-1).copy()
        new[name] = replace(e, transform=Transform("scale", "input", dense(p), folded=False))
        if not isinstance(e.data, QTensor):
            new[name] = replace(new[name], data=dense((values(e.data) / p).astype(np.float32)))
    return model.with_entries(new)


def left(model: Model) -> set[str]:
    return {n.split(".", 2)[2] for n, e in model.entries.items() if e.transform is not None}


def agree(a: Model, b: Model, limit: float = 2e-5) -> None:
    x, y = Forward(a).logits(IDS), Forward(b).logits(IDS)
    assert np.abs(x - y).max() <= limit * np.abs(x).max()


@pytest.mark.parametrize(
    ("case", "remaining"),
    [
        ("llama-biases", set()),
        ("llama-head-dim", set()),
        ("gemma2-alternating", set()),  # norms with an offset of 1, four of them
        ("gemma3_text-pattern", set()),
        ("qwen2-gqa", set()),
        ("phi3-plain", set()),
        ("starcoder2-plain", {"mlp.down"}),  # layer norms with biases; GELU between up and down
        ("gpt2-relu", {"mlp.down"}),
        ("cohere-gqa", {"attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"}),  # one norm feeds both branches
        ("olmo2-gqa", {"attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"}),  # no norm before them
    ],
)
def test_the_function_stays_and_what_has_no_place_stays_unfolded(case: str, remaining: set[str]) -> None:
    model = lconvert.read(case_models.folder(case))
    source = scaled(model)
    agree(model, source, 1e-3)  # what the weights were divided by is what their inputs are multiplied by
    folded = fold.transforms(source)
    assert left(folded.model) == remaining
    assert folded.notes
    agree(source, folded.model)


@pytest.mark.parametrize(
    ("case", "remaining"),
    [
        ("deepseek_v2-lite", {"attn.q", "attn.kv_a"}),  # the latent of keys takes another scale than q
        ("deepseek_v2-queries", set()),
        ("mixtral-experts", set()),
    ],
)
def test_latent_attention_and_experts(case: str, remaining: set[str]) -> None:
    """Latents have norms of their own, o reads values of another width; a router shares its norm and has no scale here."""
    source = scaled(lconvert.read(case_models.folder(case)))
    folded = fold.transforms(source)
    agree(source, folded.model)
    found = {role for role in left(folded.model) if not role.endswith((".gate", ".up"))}
    assert found == remaining
    assert {r for r in left(source) if ".moe." in r and r.endswith((".gate", ".up"))} <= left(folded.model)


def test_every_reader_of_a_norm_must_have_its_scale() -> None:
    """Experts, the shared expert and the router, or attention and MLP after one norm."""
    for case in ("mixtral-experts", "deepseek_v2-lite", "cohere-gqa"):
        model = lconvert.read(case_models.folder(case))
        site = next(
            s for s in sites(model.decoder) if s.name.startswith("layers.1.") and len(s.consumers) > 3
        )
        p = _scales(site.channels, 5)
        full = model.with_entries(
            {
                n: replace(
                    e,
                    data=dense((values(e.data) / p).astype(np.float32)),
                    transform=Transform("scale", "input", dense(p), folded=False),
                )
                for n in site.consumers
                for e in (model.entries[n],)
            }
        )
        folded = fold.transforms(full).model
        assert not left(folded)
        agree(full, folded)
        but = site.consumers[-1]
        some = full.with_entries({but: model.entries[but]})
        assert len(left(fold.transforms(some).model)) == len(
            {n.split(".", 2)[2] for n in site.consumers[:-1]}
        )


def test_only_norms_where_the_format_stores_the_others() -> None:
    source = scaled(lconvert.read(case_models.folder("llama-biases")))
    folded = fold.transforms(source, norms_only=True)
    assert left(folded.model) == {"attn.o", "mlp.down"}
    agree(source, folded.model)


def test_parts_of_one_input_must_agree() -> None:
    model = plain()
    different = scaled(model, disagree=True)
    folded = fold.transforms(different)
    assert left(folded.model) == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up"}
    agree(different, folded.model)
    some = scaled(model, only="attn.q")
    assert left(fold.transforms(some).model) == {"attn.q"}, "k and v take their input without it"


def test_a_value_head_whose_queries_disagree_keeps_it() -> None:
    model = scaled(plain(), only="attn.o")
    entry = model.entries["layers.0.attn.o"]
    assert entry.transform is not None and entry.transform.param is not None
    p = entry.transform.param.load().copy()
    p[0] *= 2  # the first query head of the first value head
    model = model.with_entries(
        {entry.name: replace(entry, transform=replace(entry.transform, param=dense(p)))}
    )
    folded = fold.transforms(model)
    assert left(folded.model) == {"attn.o"} and folded.model is not None
    agree(model, folded.model)


@pytest.mark.parametrize("trait", ["clip", "kv"])
def test_values_that_are_clipped_or_cached_with_a_measured_scale_stay(trait: str) -> None:
    model = scaled(plain(), only="attn.o")
    if trait == "clip":
        attention = replace(model.arch.default.attention, clip_qkv=4.0)
        model = replace(
            model, arch=replace(model.arch, default=replace(model.arch.default, attention=attention))
        )
    else:
        side = ActSpec(E4M3, "tensor", False, scale=dense(np.float32([0.01])))
        model = replace(model, kv=KVSpec(side, side))
    assert left(fold.transforms(model).model) == {"attn.o"}


# --- quantized homes -------------------------------------------------------------------------------------


def _quantized(grid: str, group: int | str) -> Model:
    return (
        with_full_scales(rounded(grid, group)) if grid.lstrip("u").startswith("int") else rounded(grid, group)
    )


@pytest.mark.parametrize(
    ("grid", "group", "folds"),
    [("int4", 32, True), ("uint4", 64, True), ("int8", -1, True), ("fp8", "tensor", True), ("fp8", "block", True),
     ("fp4", 16, False), ("Q4_K", 32, False)],
)  # fmt: skip
def test_rows_of_quantized_matrices_take_it_in_their_scales(grid: str, group: int | str, folds: bool) -> None:
    source = scaled(_quantized(grid, group))
    folded = fold.transforms(source)
    assert left(folded.model) == (set() if folds else {"attn.o", "mlp.down"})
    agree(source, folded.model)
    if folds:
        up, before = (m.entries["layers.0.mlp.up"].data for m in (folded.model, source))
        assert isinstance(up, QTensor) and isinstance(before, QTensor)
        assert np.array_equal(up.codes.load(), before.codes.load()), "the codes stay"
        assert set(folded.rounded) <= {"layers.0.mlp.up", "layers.0.attn.v"}


def test_a_product_that_fp32_rounds_is_reported() -> None:
    source = scaled(rounded("int4", 32), only="mlp.down")
    e = source.entries["layers.0.mlp.down"]
    assert e.transform is not None

    def with_param(p: np.ndarray) -> Model:
        t = Transform("scale", "input", dense(p), folded=False)
        return source.with_entries({e.name: replace(e, transform=t)})

    assert fold.transforms(with_param(np.full(512, 2.0, np.float32))).rounded == ()
    third = with_full_scales(with_param(np.full(512, 1 / 3, np.float32)))
    assert fold.transforms(third).rounded == ("layers.0.mlp.up",)


def test_a_divisor_is_no_place_for_a_factor() -> None:
    source = scaled(rounded("fp8", "tensor"), only="mlp.down")
    up = source.entries["layers.0.mlp.up"]
    assert isinstance(up.data, QTensor)
    source = source.with_entries({up.name: replace(up, data=replace(up.data, divisor=True))})
    folded = fold.transforms(source)
    assert left(folded.model) == {"mlp.down"}


# --- every target ----------------------------------------------------------------------------------------

_TARGETS = ("gguf", "vllm", "tensorrt-llm", "compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "modelopt",
            "bitsandbytes", "ir", "dense")  # fmt: skip
_SOURCES: dict[str, Callable[[], Model]] = {
    "int4": lambda: scaled(rounded("int4", 128)),
    "int4, nowhere to go": lambda: scaled(rounded("int4", 128), disagree=True),
    "uint4, nowhere to go": lambda: scaled(rounded("uint4", 128), disagree=True),
    "nvfp4": lambda: scaled(rounded("fp4")),
    "plain, nowhere to go": lambda: scaled(plain(), disagree=True),
}
#: Largest error of logits, relative to the largest: BF16 norms, heads and plain matrices.
_BF16 = 0.03
#: Error of a matrix that is rounded to 4 bits once more, relative: its columns differ by factors of up to 64.
_AGAIN = 0.3


@pytest.mark.parametrize("again", [False, True], ids=["", "allow-requantize"])
@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("source", _SOURCES)
def test_no_target_loses_it(source: str, target: str, again: bool, tmp_path: Path) -> None:
    model = _SOURCES[source]()
    plan = targets.plan(model, target, "m.gguf" if target == "gguf" else "m", allow_requantize=again)
    if found := refusals(plan):
        assert not again, found
        return
    out = tmp_path / ("m.gguf" if target == "gguf" else "m")
    execute(plan, tmp_path if target == "gguf" else out)
    back = lconvert.read(out)
    kinds = {i.verdict.kind for i in plan.items() if i.sources and i.sources[0].startswith("layers.")}
    if "requantized" not in kinds:
        a, b = Forward(model).logits(IDS), Forward(back).logits(IDS)
        assert np.abs(a - b).max() <= _BF16 * np.abs(a).max()
        return
    for name, want in invariants(model).items():
        now = invariants(back)[name]
        assert np.linalg.norm(now - want) <= _AGAIN * np.linalg.norm(want), name


def invariants(model: Model) -> dict[str, np.ndarray]:
    """Products of the first layer that no folding changes: of each matrix with the norm before it, and of those that follow
    one another, with a random diagonal between them."""
    rng, a = np.random.default_rng(0), model.arch.default.attention
    w = {n.removeprefix("layers.0."): effective(e).astype(np.float64) for n, e in matrices(model).items()}
    norms = {
        n: values(model.entries[f"layers.0.{n}"].data).astype(np.float64) for n in ("attn_norm", "mlp_norm")
    }
    value = (rng.standard_normal((w["attn.v"].shape[0], 1)) * w["attn.v"]).reshape(a.kv_heads, a.head_dim, -1)
    value = np.repeat(value, a.heads // a.kv_heads, axis=0).reshape(-1, model.arch.hidden)
    inner = rng.standard_normal((w["mlp.up"].shape[0], 1)) * w["mlp.up"]
    out = {n: w[n] * norms["attn_norm"] for n in ("attn.q", "attn.k")}
    out |= {"mlp.gate": w["mlp.gate"] * norms["mlp_norm"], "values": w["attn.o"] @ value * norms["attn_norm"]}
    return out | {"inner": w["mlp.down"] @ inner * norms["mlp_norm"]}


def test_leaving_it_out_would_be_seen() -> None:
    """The bound of the test above is far below the error of a scale that vanishes."""
    for make in _SOURCES.values():
        model = make()
        bare = model.with_entries({n: replace(e, transform=None) for n, e in model.entries.items()})
        for role in ("attn.o", "mlp.down", "attn.q"):
            name = f"layers.0.{role}"
            one = model.with_entries({name: bare.entries[name]})
            a, b = Forward(model).logits(IDS), Forward(one).logits(IDS)
            assert np.abs(a - b).max() > 1.5 * _BF16 * np.abs(a).max(), name
            product = {"attn.o": "values", "mlp.down": "inner"}.get(role, role)
            w, without = invariants(model)[product], invariants(one)[product]
            assert np.linalg.norm(w - without) > 1.5 * _AGAIN * np.linalg.norm(w), name


def test_refused_says_why_and_what_to_do() -> None:
    model = scaled(rounded("int4", 128), disagree=True)
    plan = targets.plan(model, "vllm-gptq", "m")
    text = " ".join(refusals(plan))
    assert "pre_quant_scale" in text and "--allow-requantize" in text and "--to dense" in text


def test_materialized_values_are_the_product() -> None:
    source = scaled(rounded("int4", 128), disagree=True)
    flat, said = fold.materialized(source)
    assert said and "pre_quant_scale" in said[0] and not left(flat)
    agree(source, flat)
    for name, e in matrices(source).items():
        assert e.transform is not None and e.transform.param is not None
        got = flat.entries[name].data.read(0, 2)  # type: ignore[union-attr]
        assert np.array_equal(got, values(e.data, 0, 2) * e.transform.param.load())
    assert fold.materialized(plain()) == (plain(), [])


def test_the_error_of_a_folded_model_is_measured_against_the_whole_function(tmp_path: Path) -> None:
    """Scales rounded to F16 after the product: the report gives the relative error of the product with them."""
    model = scaled(with_full_scales(rounded("int4", 128)))
    plan = checkpoint.plan(model, checkpoint.Options(format="gptq"))
    kinds = {i.name: i.verdict.kind for i in plan.items()}
    assert kinds["model.layers.0.mlp.up_proj.qweight"] == "rounded"
    assert kinds["model.layers.0.mlp.gate_proj.qweight"] == "exact"
    done = execute(plan, tmp_path / "m").plan
    error = next(i for i in done.items() if i.name == "model.layers.0.mlp.up_proj.qweight").verdict.error
    assert error is not None and 1e-5 < error < 2**-11
    folded = fold.transforms(model).model.entries["layers.0.mlp.up"].data
    back = values(lconvert.read(tmp_path / "m").entries["layers.0.mlp.up"].data)[::16].astype(np.float64)
    exact = values(folded)[::16].astype(np.float64)
    want = np.sqrt(np.square(back - exact).sum() / np.square(exact).sum())
    assert error == pytest.approx(float(want), rel=1e-6)


def test_static_scales_are_measured_behind_the_scale_of_the_input(tmp_path: Path) -> None:
    """The matrix that runs sees x * p: its input's range is that of the product."""
    from lconvert.passes import activations

    model = rtn.run(lconvert.read(DEMO), rtn.Options(grid="int8", group=-1))
    name = "layers.0.mlp.down"
    p = _scales(model.entries[name].shape[1], 1)
    t = Transform("scale", "input", dense(p), folded=False)
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 20)
    job = Job(Calibration(str(text), windows=2, context=32))

    def scales(m: Model) -> dict[str, float]:
        made = activations.run(m, activations.Options(dynamic=False), job).entries
        held = {r: e.activation.scale for r, e in made.items() if e.activation is not None}
        return {r: float(s.load()[0]) for r, s in held.items() if s is not None}

    bare = scales(model)
    with_scale = scales(model.with_entries({name: replace(model.entries[name], transform=t)}))
    assert with_scale["layers.0.attn.q"] == bare["layers.0.attn.q"]
    assert bare[name] < with_scale[name] <= bare[name] * float(p.max()) * 1.01
