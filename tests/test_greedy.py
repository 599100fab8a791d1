"""Greedy agreement: complete for F32 artifacts, and differences are told from ties by the reference's own logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import lconvert
from lconvert.errors import InputError
from lconvert.validators import greedy
from lconvert.validators.runtimes import Generation
from lconvert.validators.runtimes.hf import Transformers, reference_tokenizer
from lconvert.validators.runtimes.llamacpp import LlamaCpp
from tests.conftest import DEMO

needs_runtimes = [
    pytest.importorskip(name, reason=f"{name} is not installed")
    for name in ("torch", "transformers", "llama_cpp")
]
TEXT = DEMO.parent.parent / "validators" / "text" / "excerpt.txt"
N = 32


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = lconvert.read(DEMO).tokenizer
    assert tokenizer is not None
    ids = reference_tokenizer(tokenizer).encode(TEXT.read_text(), add_special_tokens=False).ids
    return [[tokenizer.special["bos"][0], *ids[at : at + 23]] for at in range(0, 8 * 500, 500)]


@pytest.fixture(scope="module")
def reference() -> Transformers:
    return Transformers(DEMO)


def llama_cpp(tmp_path: Path, ftype: str) -> LlamaCpp:
    lconvert.convert(DEMO, tmp_path / f"{ftype}.gguf", ftype=ftype)
    return LlamaCpp(tmp_path / f"{ftype}.gguf", context=64, threads=1)


def test_an_f32_artifact_agrees_completely(
    reference: Transformers, prompts: list[list[int]], tmp_path: Path
) -> None:
    candidate = llama_cpp(tmp_path, "F32")
    seen: list[int] = []
    report = greedy.compare(reference, candidate, prompts, N, progress=lambda: seen.append(1))
    candidate.close()
    assert report.agreement == 1 and report.identical == report.prompts == len(seen) == 8
    assert report.tokens == report.agreed == 8 * N
    assert all(d.tie for d in report.differences)


def test_a_coarse_artifact_differs_by_more_than_ties(
    reference: Transformers, prompts: list[list[int]], tmp_path: Path
) -> None:
    candidate = llama_cpp(tmp_path, "Q2_K")
    report = greedy.compare(reference, candidate, prompts, N)
    whole = [list(candidate.generate(p, N).ids) for p in prompts]
    candidate.close()
    assert report.agreement < 0.5 and report.identical < 4
    for d in report.differences:
        expected = list(reference.generate(prompts[d.prompt], N).ids)
        assert expected[d.at] == d.expected
        logits = reference.logits(prompts[d.prompt] + expected[: d.at])[-1]
        assert logits.argmax() == d.expected
        assert d.margin == pytest.approx(float(logits[d.expected] - logits[d.found]))
        if not report.ties:
            assert whole[d.prompt][: d.at] == expected[: d.at] and whole[d.prompt][d.at] == d.found
    assert max(d.margin for d in report.differences) > 10 * greedy.TIE


class Table:
    """A runtime whose next token depends on the last one alone: rows of logits."""

    def __init__(self, rows: Sequence[Sequence[float]]):
        self.rows = np.array(rows, np.float32)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        return np.asarray(self.rows[ids])

    def generate(self, ids: list[int], n: int) -> Generation:
        made = list(ids)
        for _ in range(n):
            made.append(int(self.rows[made[-1]].argmax()))
        return Generation(tuple(made[len(ids) :]), tuple(0.0 for _ in range(n)))


CYCLE = ([0, 9, 0], [0, 0, 9], [9, 0, 0])  # 0 1 2 0 1 2


def test_a_tie_is_stepped_over_and_the_rest_still_counts() -> None:
    near = ([0, 9, 8.999], [0, 0, 9], [9, 0, 0])
    other = ([0, 8.999, 9], [0, 0, 9], [9, 0, 0])  # after 0 it takes 2 where the reference hardly prefers 1
    report = greedy.compare(Table(near), Table(other), [[0], [1]], 6)
    assert (report.agreed, report.identical, report.ties) == (12, 2, 4)
    first = report.differences[0]
    assert (first.prompt, first.at, first.expected, first.found) == (0, 0, 1, 2)
    assert first.margin == pytest.approx(0.001, rel=1e-3)
    strict = greedy.compare(Table(near), Table(other), [[0], [1]], 6, tie=1e-4)
    assert (strict.agreed, strict.identical, strict.ties) == (0 + 2, 0, 0)


def test_an_error_ends_its_prompt() -> None:
    wrong = ([0, 9, 0], [9, 0, 0], [9, 0, 0])  # after 1 it takes 0
    report = greedy.compare(Table(CYCLE), Table(wrong), [[0], [2]], 4)
    assert [(d.prompt, d.at, d.expected, d.found, d.tie) for d in report.differences] == [
        (0, 1, 2, 0, False),
        (1, 2, 2, 0, False),
    ]
    assert report.agreement == 3 / 8 and report.identical == 0
    data = json.loads(json.dumps(report.to_json()))
    assert data["first_differences"][0] == {
        "prompt": 0, "at": 1, "expected": 2, "found": 0, "margin": 9.0, "tie": False,
    }  # fmt: skip
    assert (data["prompts"], data["tokens"], data["ties"], data["tied"]) == (2, 8, 0, [])


def test_nothing_to_compare_is_an_error() -> None:
    for prompts, n in (([], 4), ([[0]], 0)):
        with pytest.raises(InputError, match="nothing to compare"):
            greedy.compare(Table(CYCLE), Table(CYCLE), prompts, n)
