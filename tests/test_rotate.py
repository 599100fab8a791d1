"""Rotations folded into the weights: exact Hadamard matrices, the same logits for every architecture, in every target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.converters import lcir, targets
from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import E4M3, ActSpec, Decoder, KVSpec, Model, Transform, dense
from lconvert.kernels.qtensor import values
from lconvert.passes import rotate, rtn
from lconvert.primitives import hadamard
from lconvert.primitives.job import Calibration, Job
from lconvert.validators.runtimes import open_runtime
from tests import arch_cases, case_models, random_models
from tests.conftest import DEMO
from tests.test_folding import distance

CASES = {case.name: case for case in arch_cases.load()}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]

_MEAN = "'s norms subtract the mean of all channels, which a rotation does not keep"
_POST = "'s norms after attention and MLP weigh single channels of the residual stream, whose channels turn together"
#: model_type -> why its residual stream cannot turn.
FIXED = dict.fromkeys(
    ("cohere", "falcon", "gpt2", "gpt_neox", "stablelm", "starcoder2"), _MEAN
) | dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _POST)


# --- matrices --------------------------------------------------------------------------------------------

#: Hidden and head sizes of released models, and each construction's first orders.
SIZES = (
    1,
    2,
    4,
    8,
    12,
    20,
    24,
    28,
    36,
    44,
    48,
    60,
    64,
    76,
    80,
    84,
    96,
    104,
    124,
    128,
    148,
    180,
    192,
    208,
    576,
    896,
    960,
    1152,
)


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_matrices_are_orthogonal_in_integers(n: int) -> None:
    h = hadamard.hadamard(n)
    assert h is not None and set(np.unique(h)) <= {-1, 1}
    assert np.array_equal(h.astype(np.int64) @ h.T.astype(np.int64), n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize(
    "n", [2048, 2304, 2560, 2880, 3072, 3584, 3840, 4096, 5120, 5376, 7168, 8192, 12288, 16384]
)
def test_hidden_sizes_of_released_models_have_one(n: int) -> None:
    turn = hadamard.rotation(n, "hadamard", 0)
    x = np.random.default_rng(0).normal(size=(2, n))
    assert np.allclose((turn(x) ** 2).sum(-1), (x**2).sum(-1), rtol=1e-12)
    assert abs(float(turn(x)[0] @ turn(x)[1]) - float(x[0] @ x[1])) < 1e-9
    one = turn(np.eye(1, n, 5))
    assert np.allclose(np.abs(one), n**-0.5, rtol=1e-12), "an outlier is spread over all channels alike"


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_a_rotation_is_its_matrix(kind: hadamard.Kind) -> None:
    turn = hadamard.rotation(24, kind, 7, 1)
    r = turn(np.eye(24))
    assert np.allclose(r @ r.T, np.eye(24), atol=1e-14)
    x = np.random.default_rng(1).normal(size=(2, 5, 24))
    assert np.allclose(turn(x), x @ r, atol=1e-14)
    assert np.allclose(turn.runs(np.concatenate([x, 2 * x], -1)), np.concatenate([x @ r, 2 * x @ r], -1))
    if kind == "hadamard":
        h = hadamard.hadamard(24)
        assert h is not None and np.allclose(r, turn.param[:, None] * h / 24**0.5)
    else:
        assert np.array_equal(r, turn.param)
    assert np.array_equal(r, hadamard.rotation(24, kind, 7, 1)(np.eye(24)))
    assert not np.allclose(r, hadamard.rotation(24, kind, 8, 1)(np.eye(24)))


@pytest.mark.parametrize("n", [3, 6, 52, 92, 100])
def test_other_sizes_take_a_random_rotation(n: int) -> None:
    assert hadamard.hadamard(n) is None
    with pytest.raises(OptionError, match=f"of order {n} is constructed here; take random: orthogonal"):
        hadamard.rotation(n, "hadamard", 0)
    r = hadamard.rotation(n, "orthogonal", 0)(np.eye(n))
    assert np.allclose(r @ r.T, np.eye(n), atol=1e-13)


# --- the function stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", arch_cases.some(2))
def test_every_architecture_turns_or_says_why_not(name: str) -> None:
    case = CASES[name]
    model, ids = lconvert.read(case_models.folder(name)), random_models.prompt(case)[:24]
    options, why = rotate.Options(), FIXED.get(case.model_type)
    if why is not None:
        with pytest.raises(UnsupportedError) as e:
            rotate.run(model, options)
        assert str(e.value) == f"rotate: r1: {case.model_type}{why}; r2 alone is possible (r1: false)"
        options = rotate.Options(r1=False)
    turned = rotate.run(model, options)
    want, got = Forward(model).logits(ids), Forward(turned).logits(ids)
    assert float(np.linalg.norm(want - got) / np.linalg.norm(want)) <= 1e-5 and distance(want, got) <= 2e-5
    o = "layers.1.attn.o"
    assert distance(values(model.entries[o].data), values(turned.entries[o].data)) > 0.1
    assert isinstance(turned.arch, Decoder) and turned.arch.tied == (model.decoder.tied and why is not None)
    assert [t.where for t in turned.transforms][: why is None] == ["residual"][: why is None]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("llama-gqa", "embed"),
        ("llama-gqa", "head"),
        ("llama-biases", "layers.0.attn.o.bias"),
        ("llama-biases", "layers.0.attn.v.bias"),
        ("llama-biases", "layers.1.mlp.down.bias"),
        ("mixtral-experts", "layers.1.moe.router"),
        ("mixtral-experts", "layers.0.moe.experts.2.down"),
        ("gpt_oss-experts", "layers.0.moe.experts.1.down.bias"),
        ("deepseek_v2-queries", "layers.0.moe.shared.down"),
        ("deepseek_v2-queries", "layers.1.attn.kv_a"),
        ("deepseek_v2-queries", "layers.1.attn.v_b"),
        ("deepseek_v2-queries", "layers.1.attn_norm"),
    ],
)
def test_a_forgotten_tensor_would_be_seen(name: str, broken: str) -> None:
    model, ids = lconvert.read(case_models.folder(name)), random_models.prompt(CASES[name])[:24]
    turned = rotate.run(model, rotate.Options())
    forgot = turned.with_entries({broken: model.entries[broken]})
    assert distance(Forward(model).logits(ids), Forward(forgot).logits(ids)) > 1e-3


def test_a_random_rotation_does_as_well_and_the_seed_decides() -> None:
    model = lconvert.read(case_models.folder("qwen2-tied-yarn"))
    want = Forward(model).logits(IDS)
    seen = []
    for kind, seed in (("orthogonal", 0), ("orthogonal", 1), ("hadamard", 1), ("hadamard", 1)):
        turned = rotate.run(model, rotate.Options(random=kind), Job(Calibration(seed=seed)))  # type: ignore[arg-type]
        assert distance(want, Forward(turned).logits(IDS)) <= 1e-5
        seen.append(values(turned.entries["embed"].data))
    assert np.array_equal(seen[2], seen[3])
    assert distance(seen[0], seen[1]) > 0.1 and distance(seen[1], seen[2]) > 0.1


def test_latent_norms_keep_their_weights() -> None:
    model = lconvert.read(case_models.folder("deepseek_v2-queries"))
    turned = rotate.run(model, rotate.Options())
    for role in ("attn.q_a_norm", "attn.kv_a_norm"):
        assert turned.entries[f"layers.0.{role}"] == model.entries[f"layers.0.{role}"]
    assert (values(turned.entries["layers.0.attn_norm"].data) == 1).all()
    assert (values(turned.entries["norm"].data) == 1).all()


def test_outliers_are_spread() -> None:
    """Kurtosis of rows: 3 for normal numbers, much more where few channels are large."""
    model = lconvert.read(DEMO)
    name = "layers.0.mlp.up"
    w = values(model.entries[name].data).copy()
    w[:, 5] *= 40
    model = model.with_entries({name: replace(model.entries[name], data=dense(w))})
    after = values(rotate.run(model, rotate.Options()).entries[name].data)

    def kurtosis(x: np.ndarray) -> float:
        return float(((x**4).mean(1) / (x**2).mean(1) ** 2).mean())

    assert kurtosis(w) > 30 and kurtosis(after) < 4


# --- it travels ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turned() -> Model:
    return rotate.run(lconvert.read(DEMO), rotate.Options())


def test_the_ir_keeps_what_was_folded(turned: Model, tmp_path: Path) -> None:
    execute(lcir.plan(turned, {}), tmp_path / "m.lcir")
    again = lconvert.read(tmp_path / "m.lcir")
    assert again.arch == turned.arch and again.report == turned.report
    assert [(t.kind, t.where, t.folded) for t in again.transforms] == [
        ("rotate", "residual", True),
        *(("rotate", f"layers.{i}.attn.v", True) for i in range(turned.decoder.layers)),
    ]
    for a, b in zip(again.transforms, turned.transforms, strict=True):
        assert a.param is not None and b.param is not None
        assert np.array_equal(a.param.load(), b.param.load()) and set(np.unique(a.param.load())) == {-1, 1}
    for name, entry in turned.entries.items():
        assert np.array_equal(values(entry.data), values(again.entries[name].data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(transforms={}), "transforms is {}, expected a list"),
        (lambda m: m["transforms"][0].update(kind="twist"), "Transform.kind"),
        (lambda m: m["transforms"][0].update(folded=False), "never says whether it is folded"),
        (lambda m: m["transforms"].pop(), "no entry uses"),
    ],
)
def test_damaged_transforms_are_refused(turned: Model, tmp_path: Path, change: object, message: str) -> None:
    folder = tmp_path / "m.lcir"
    execute(lcir.plan(turned, {}), folder)
    meta = json.loads((folder / "lcir.json").read_text())
    change(meta)  # type: ignore[operator]
    (folder / "lcir.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=message):
        lconvert.read(folder)


@pytest.mark.parametrize(
    ("target", "file", "runtime"),
    [
        ("gguf", "m.gguf", "llama.cpp"),
        ("dense", ".", "transformers"),
        ("onnx", "model.onnx", "onnxruntime"),
    ],
)
def test_every_target_says_what_the_model_said(
    turned: Model, tmp_path: Path, target: str, file: str, runtime: str
) -> None:
    out = tmp_path / ("m.gguf" if target == "gguf" else target)
    root = tmp_path if target == "gguf" else out
    if target == "gguf":
        lconvert.convert(turned, out, ftype="F32")
    else:
        execute(targets.plan(turned, target, out.name, dtype="F32"), out)
    got = open_runtime(runtime, root / file, context=64).logits(IDS)
    assert distance(Forward(lconvert.read(DEMO)).logits(IDS), got) <= 2e-5


# --- refusals --------------------------------------------------------------------------------------------


def test_what_a_rotation_cannot_reach() -> None:
    model = lconvert.read(DEMO)
    d = model.decoder
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.attn\.q: is quantized already, and codes cannot be turned"
    ):
        rotate.run(rtn.run(model, rtn.Options("int8", -1)), rotate.Options())
    clipped = replace(d, default=replace(d.default, attention=replace(d.default.attention, clip_qkv=8.0)))
    with pytest.raises(
        UnsupportedError, match=r"r2: values are clipped .*; r1 alone is possible \(r2: false\)"
    ):
        rotate.run(replace(model, arch=clipped), rotate.Options())
    side = ActSpec(E4M3, "tensor", False, scale=dense(np.ones(d.layers, np.float32)))
    with pytest.raises(UnsupportedError, match="r2: the cache of values has a scale"):
        rotate.run(replace(model, kv=KVSpec(side, side)), rotate.Options(r1=False))
    up = model.entries["layers.0.mlp.up"]
    p = Transform("scale", "input", dense(np.ones(up.shape[1], np.float32)), folded=False)
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.mlp\.up: its input is scaled .*; fold the scale first"
    ):
        rotate.run(model.with_entries({up.name: replace(up, transform=p)}), rotate.Options())


def test_options() -> None:
    with pytest.raises(OptionError, match="random 'givens'; choose hadamard, orthogonal"):
        rotate.Options(random="givens")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="neither r1 nor r2"):
        rotate.Options(r1=False, r2=False)


# --- in blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_blocks_fold_and_keep_the_logits(block: int) -> None:
    model = lconvert.read(DEMO)
    out = rotate.run(model, rotate.Options(block=block))
    assert distance(Forward(out).logits(IDS), Forward(model).logits(IDS)) < 1e-5
    assert f"hadamard in blocks of {block}" in out.report[-1]


def test_a_block_turns_its_own_channels_alone() -> None:
    """The embedding is turned by R alone: its rows span R's blocks and nothing else, so each block keeps its norm."""
    model = lconvert.read(DEMO)
    before, after = (
        values(m.entries["embed"].data, 0, 2048).astype(np.float64).reshape(2048, -1, 32)
        for m in (model, rotate.run(model, rotate.Options(r2=False, block=32)))
    )
    np.testing.assert_allclose(np.linalg.norm(after, axis=-1), np.linalg.norm(before, axis=-1), rtol=1e-5)
    turned, *_ = np.linalg.lstsq(before[:, 3], after[:, 3], rcond=None)
    np.testing.assert_allclose(np.abs(turned), 32**-0.5, rtol=1e-4)


def test_what_enters_down_is_not_turned() -> None:
    """Its columns would need a turn at run time: rows turn with the stream, and the Gram matrix of columns stays."""
    model = lconvert.read(DEMO)
    out = rotate.run(model, rotate.Options(block=32))
    a, b = (values(m.entries["layers.0.mlp.down"].data, 0, 256).astype(np.float64) for m in (model, out))
    np.testing.assert_allclose(b.T @ b, a.T @ a, atol=1e-4)


@pytest.mark.parametrize("block", [-1, 1, True, 2.5])
def test_blocks_that_are_none(block: object) -> None:
    with pytest.raises(OptionError, match="expected channels that turn together"):
        rotate.Options(block=block)  # type: ignore[arg-type]


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(OptionError, match="residual stream: 256 channels do not divide into blocks of 48"):
        rotate.run(lconvert.read(DEMO), rotate.Options(block=48))
