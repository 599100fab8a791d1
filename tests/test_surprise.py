"""What the model makes of a calibration text: its predictions against transformers' own, the frequencies against a plain count."""

from __future__ import annotations

import math
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import lconvert
from lconvert.forward import Forward
from lconvert.primitives import surprise
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.sequential import walk
from lconvert.primitives.text import Windows, unsaid
from tests import arch_cases, case_models
from tests.conftest import DEMO, ROOT

TEXT = ROOT / "validators" / "text" / "excerpt.txt"
GERMAN = "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat"


def test_the_code_pays_for_new_tokens_and_less_for_known_ones() -> None:
    """a b a a of 10: free choice; escape (1 of 2) and choice; 1 of 2 + 2; 2 of 3 + 2."""
    bits = math.log(10) + math.log(2 * 10) + math.log(4) + math.log(5 / 2)
    assert surprise.by_frequency([[1, 2], [1, 1]], 10) == pytest.approx(bits / 4)


def test_the_code_comes_near_the_entropy_of_what_it_codes() -> None:
    weights = [1 / (i + 1) for i in range(50)]
    ids = Random(1).choices(range(50), weights, k=20000)
    share = np.array(weights) / sum(weights)
    entropy = float(-(share * np.log(share)).sum())
    assert entropy < surprise.by_frequency([ids], 50) < 1.02 * entropy


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_predictions_are_those_of_the_whole_model(family: str) -> None:
    """Tied and untied heads, scales and soft caps of logits, in parts of the vocabulary."""
    model = lconvert.read(case_models.folder(next(n for n in arch_cases.some(1) if n.startswith(family))))
    ids = [Random(w).choices(range(model.decoder.vocab), k=24) for w in range(2)]
    forward = Forward(model)
    normed: list[torch.Tensor] = []
    forward.module.get_output_embeddings().register_forward_pre_hook(lambda m, args: normed.append(args[0]))
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(forward.logits(w))[:-1], torch.tensor(w[1:]))
        for w in ids
    ]
    surprise_of = surprise.by_model(model, torch.cat(normed), ids)
    assert surprise_of == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


def test_parts_of_the_vocabulary_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lconvert.read(DEMO)
    normed = torch.randn(2, 9, model.decoder.hidden, generator=torch.Generator().manual_seed(0))
    ids = [Random(w).choices(range(model.decoder.vocab), k=9) for w in range(2)]
    whole = surprise.by_model(model, normed, ids)
    monkeypatch.setattr(surprise, "_ROWS", 300)
    assert surprise.by_model(model, normed, ids) == pytest.approx(whole, rel=1e-6)


def test_few_tokens_are_not_judged() -> None:
    assert surprise.asked(Windows(((1,) * 64,) * 4)) == 0
    assert surprise.asked(Windows(((1,) * 512,) * 128)) == 2
    assert surprise.asked(Windows(((1,) * 128,) * 128)) == 8
    assert surprise.asked(Windows(((1,) * 2048,) * 128)) == 1


def lines(text: Path, windows: int = 16) -> list[str]:
    model = lconvert.read(DEMO)
    job = Job(Calibration(str(text), windows, 256))
    return [
        line
        for line in walk(model, job, lambda block: {}, what="test", key="0").report
        if line.startswith("calibration: the model")
    ]


def test_a_text_that_the_model_does_not_know_is_reported(tmp_path: Path) -> None:
    """German words: the tokenizer has pieces for them, so nobody but the model can tell."""
    words = re.findall(r"\w+", GERMAN)
    (tmp_path / "de.txt").write_text(" ".join(Random(0).choices(words, k=6000)), encoding="utf-8")
    (said,) = lines(tmp_path / "de.txt")
    assert "predicts de.txt worse than the frequencies of its tokens alone do (perplexity " in said
    assert lines(TEXT) == []


def test_what_was_said_is_not_said_again() -> None:
    model = lconvert.read(DEMO)
    (line,) = unsaid(["calibration: x"], model)
    assert unsaid([line], model.with_entries({}, line)) == ()
