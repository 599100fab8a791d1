"""Every architecture as an ONNX graph in ONNX Runtime, against transformers with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.converters import onnx, rotary
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import Model
from tests import arch_cases, case_models
from tests.conftest import DEMO

for package in ("onnx", "onnxruntime", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx as onnx_package
import onnxruntime

#: Logits of random models are below 25; the largest difference that one rounding order against another makes of them.
CLOSE = 2e-4


def exported(model: Model, folder: Path, **options: Any) -> Path:
    execute(onnx.plan(model, onnx.Options(**options)), folder)
    return folder / "model.onnx"


class Session:
    """A graph in ONNX Runtime at accuracy level 1, keys and values carried along."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [o.name for o in self.session.get_outputs()]
        self.past = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }

    def run(self, ids: Any, mask: Any, positions: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        out = self.session.run(self.names, {k: np.asarray(v, np.int64) for k, v in feed.items()} | past)
        present = zip(self.names[1:], out[1:], strict=True)
        return out[0], {n.replace("present", "past_key_values"): v for n, v in present}

    def logits(self, ids: list[int], chunks: list[int]) -> Any:
        """Of one sequence, fed in chunks of these lengths and then token by token."""
        at, out, past = 0, [], self.past
        steps = [*chunks, *[1] * (len(ids) - sum(chunks))]
        for n in steps:
            y, past = self.run([ids[at : at + n]], np.ones((1, at + n)), np.arange(at, at + n)[None], past)
            out.append(y[0])
            at += n
        return np.concatenate(out)


def tokens(model: Model, count: int, seed: int = 1) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, model.arch.vocab, count)]


@pytest.mark.parametrize("case", arch_cases.load(), ids=lambda c: c.name)
def test_every_architecture(case: arch_cases.Case, tmp_path: Path) -> None:
    """A prompt at once, and another way of cutting it with single steps at the end, against the whole of it in transformers."""
    model = lconvert.read(case_models.folder(case.name))
    path = exported(model, tmp_path / "m")
    onnx_package.checker.check_model(str(path))
    ids = tokens(model, case.tokens)
    want = Forward(model).logits(ids)
    session = Session(path)
    whole = session.logits(ids, [len(ids)])
    assert np.abs(whole - want).max() < CLOSE
    if all(
        layer.attention.rope is None or layer.attention.rope.scaling != "longrope"
        for _, layer in model.arch.each()
    ):
        # transformers chooses longrope's factors by the tokens of one call
        assert np.abs(session.logits(ids, [len(ids) // 3, len(ids) // 3]) - want).max() < CLOSE


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "gemma2-alternating", "gpt2-tied", "deepseek_v2-lite", "gpt_oss-experts", "mistral-window"],
)
def test_a_batch_with_padding_on_the_left(name: str, tmp_path: Path) -> None:
    """Sequences of different lengths in one batch say what each says alone, in the prompt and in the steps after it; beyond a window,
    and beside a row that is nothing but padding."""
    model = lconvert.read(case_models.folder(name))
    session = Session(exported(model, tmp_path / "m"))
    rows = [tokens(model, n, seed=n) for n in (5, 112, 70)]
    longest, steps = 112, 3
    alone = [session.logits([*r, 1, 2, 3][: len(r) + steps], [len(r)]) for r in rows]
    lanes = [*rows, []]
    ids = np.array([[0] * (longest - len(r)) + r for r in lanes])
    mask = np.array([[0] * (longest - len(r)) + [1] * len(r) for r in lanes])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    past = {k: np.zeros((len(lanes), *v.shape[1:]), np.float32) for k, v in session.past.items()}
    out, past = session.run(ids, mask, positions, past)
    assert np.isfinite(out).all(), "rows of padding"
    for row, one, r in zip(out[:-1], alone, rows, strict=True):
        assert np.abs(row[-len(r) :] - one[: len(r)]).max() < CLOSE
    for step in range(steps):
        mask = np.concatenate([mask, np.ones((len(lanes), 1), int)], 1)
        out, past = session.run([[step + 1]] * len(lanes), mask, mask.sum(1)[:, None] - 1, past)
        for row, one, r in zip(out[:-1], alone, rows, strict=True):
            assert np.abs(row[0] - one[len(r) + step]).max() < CLOSE
    fresh = session.logits(list(range(1, steps + 1)), [1])
    assert np.abs(out[-1][0] - fresh[-1]).max() < CLOSE  # its first tokens came with the steps


def test_a_long_past(tmp_path: Path) -> None:
    """Hundreds of positions before a step, beyond a window."""
    model = lconvert.read(case_models.folder("mistral-window"))
    ids = tokens(model, 400)
    session = Session(exported(model, tmp_path / "m"))
    assert np.abs(session.logits(ids, [390]) - Forward(model).logits(ids)).max() < CLOSE


def test_graphs_without_a_cache_and_with_the_last_logits_alone(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    ids = tokens(model, 20)
    want = Forward(model).logits(ids)
    bare = Session(exported(model, tmp_path / "prefill", prefill_only=True))
    assert bare.past == {} and np.abs(bare.logits(ids, [20]) - want).max() < CLOSE
    last = Session(exported(model, tmp_path / "last", last_logit=True))
    got = last.logits(ids, [20])
    assert got.shape == (1, model.arch.vocab) and np.abs(got[0] - want[-1]).max() < CLOSE


def test_longrope_changes_its_factors_where_transformers_does(tmp_path: Path) -> None:
    model = lconvert.read(case_models.folder("phi3-long"))
    original = next(layer.attention.rope for _, layer in model.arch.each()).original_context  # type: ignore[union-attr]
    session = Session(exported(model, tmp_path / "m"))
    for n in (original - 1, original, original + 1):
        ids = tokens(model, n)
        assert np.abs(session.logits(ids, [n]) - Forward(model).logits(ids)).max() < CLOSE, n


def test_rotary_tables_are_bounded_by_an_option(tmp_path: Path) -> None:
    model = lconvert.read(DEMO)
    wide = onnx.plan(model, onnx.Options(positions=100))
    shapes = {i.name: i.shape for i in wide.items() if i.name.startswith("rotary")}
    rope = model.arch.default.attention.rope
    assert rope is not None and set(shapes.values()) == {(100, rope.dim // 2)}
    cos, sin = rotary.tables(rope, 100)
    assert np.allclose(cos**2 + sin**2, 1, atol=1e-6)


_CACHE = {
    f"past_key_values.{i}.{side}": ("float", ("batch", 4, "past", 32))
    for i in range(3)
    for side in ("key", "value")
}
_IDS, _MASK = (
    {"input_ids": ("int64", ("batch", "sequence"))},
    {"attention_mask": ("int64", ("batch", "total"))},
)
_POSITIONS = {"position_ids": ("int64", ("batch", "sequence"))}


@pytest.mark.parametrize(
    ("chosen", "inputs"),
    [
        ({}, _IDS | _MASK | _POSITIONS | _CACHE),
        ({"last_logit": True}, _IDS | _MASK | _POSITIONS | _CACHE),
        ({"prefill_only": True}, _IDS | _MASK | _POSITIONS),
        ({"dialect": "trt"}, _IDS | _MASK | _POSITIONS | _CACHE),
        ({"dialect": "genai"}, _IDS | _MASK | _CACHE),
        (
            {"static_cache": True},
            _IDS | _MASK | _POSITIONS | {"cache_position": ("int64", ("batch",))} | _CACHE,
        ),
    ],
    ids=lambda x: (
        "-".join(map(str, x.values())) if x and isinstance(next(iter(x.values())), (bool, str)) else ""
    ),
)
def test_inputs_and_outputs(
    chosen: dict[str, Any], inputs: dict[str, tuple[str, tuple[Any, ...]]], tmp_path: Path
) -> None:
    """Names, types, order of outputs and free dimensions as exporters of Hugging Face have them."""
    session = onnxruntime.InferenceSession(exported(lconvert.read(DEMO), tmp_path / "m", **chosen))
    floats = "float16" if chosen.get("dialect") == "trt" else "float"
    names = {"past": "capacity", "total": "capacity"} if "static_cache" in chosen else {}

    def said(ports: Any) -> dict[str, tuple[str, tuple[Any, ...]]]:
        return {p.name: (p.type.removeprefix("tensor(").removesuffix(")"), tuple(p.shape)) for p in ports}

    def named(shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(names.get(d, d) for d in shape)

    wanted = {n: (floats if t == "float" else t, named(shape)) for n, (t, shape) in inputs.items()}
    assert said(session.get_inputs()) == wanted
    rows = 1 if "last_logit" in chosen else "sequence"
    outputs = {"logits": (floats, ("batch", rows, 2048))} | {
        n.replace("past_key_values", "present"): (floats, named(("batch", 4, "total", 32)))
        for n in inputs
        if n.startswith("past")
    }
    found = said(session.get_outputs())
    assert found == outputs and list(found) == list(outputs)


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "mistral-window", "gemma2-alternating", "deepseek_v2-lite", "gpt2-tied", "gpt_oss-experts"],
)
def test_a_cache_of_fixed_length(name: str, tmp_path: Path) -> None:
    """Two sequences of different lengths in one batch, each at its own place in the cache; what is beyond it is never seen."""
    model = lconvert.read(case_models.folder(name))
    session = Session(exported(model, tmp_path / "m", static_cache=True)).session
    capacity, chunks = 128, (100, 1, 7, 1)  # beyond the windows
    ids = [tokens(model, sum(chunks), seed=s) for s in (1, 2)]
    rng = np.random.default_rng(0)
    past = {
        i.name: rng.standard_normal((2, i.shape[1], capacity, i.shape[3])).astype(np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    starts = np.array([0, 0])
    seen: list[list[Any]] = [[], []]
    names = [o.name for o in session.get_outputs()]
    mask = np.ones((2, capacity), np.int64)
    for at, n in zip(np.cumsum((0, *chunks)), chunks, strict=False):
        feed: dict[str, Any] = {
            "input_ids": np.array([row[at : at + n] for row in ids]),
            "position_ids": starts[:, None] + np.arange(n),
            "cache_position": starts,
            "attention_mask": mask,
        }
        out = session.run(names, feed | past)
        past = {k.replace("present", "past_key_values"): v for k, v in zip(names[1:], out[1:], strict=True)}
        starts = starts + n
        for row, logits in zip(seen, out[0], strict=True):
            row.append(logits)
    for row, one in zip(ids, seen, strict=True):
        assert np.abs(np.concatenate(one) - Forward(model).logits(row)).max() < CLOSE


def test_rotary_frequencies_are_those_of_transformers() -> None:
    """The buffers of its own modules hold what the tables are made of, for every kind of scaling; longrope's short factors."""
    seen = set()
    for case in arch_cases.load():
        model = lconvert.read(case_models.folder(case.name))
        ropes = {a.rope for _, layer in model.decoder.each() if (a := layer.attention).rope is not None}
        if not ropes or (key := (case.model_type, frozenset(ropes))) in seen:
            continue
        seen.add(key)
        buffers = [
            b.float().numpy() for n, b in Forward(model).module.named_buffers() if n.endswith("inv_freq")
        ]
        for rope in ropes:
            ours = rotary.frequencies(rope)
            close = [np.allclose(ours, b, rtol=2e-6, atol=0) for b in buffers if b.shape == ours.shape]
            assert any(close), (case.name, rope, buffers, ours)
    scalings = {rope.scaling for _, ropes in seen for rope in ropes}
    assert scalings == {"none", "linear", "yarn", "llama3", "longrope"}
