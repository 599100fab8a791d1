"""Calibration against cases whose result is known in closed form, and against a plain loop over answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lconvert.errors import InputError
from lconvert.validators.calibration import Reliability, of_choices
from lconvert.validators.tasks import Choice


def by_hand(p: np.ndarray, targets: np.ndarray, bins: int) -> tuple[float, float]:
    """ECE and Brier score, one answer at a time."""
    groups: dict[int, list[tuple[float, float]]] = {}
    brier = 0.0
    for row, target in zip(p.tolist(), targets.tolist(), strict=True):
        best = row.index(max(row))
        number = next(b for b in range(bins) if row[best] <= (b + 1) / bins)
        groups.setdefault(number, []).append((row[best], float(best == target)))
        brier += sum((x - (k == target)) ** 2 for k, x in enumerate(row))
    ece = sum(abs(sum(hit - c for c, hit in group)) for group in groups.values())
    return ece / len(targets), brier / len(targets)


def test_certain_and_right() -> None:
    found = Reliability()
    found.add(np.log(np.array([[1.0, 1e-300], [1e-300, 1.0]])), np.array([0, 1]))
    got = found.result()
    assert (got.ece, got.brier, got.accuracy, got.confidence, got.n) == (0.0, 0.0, 1.0, 1.0, 2)
    assert got.bins[-1].count == 2
    assert [b.count for b in got.bins[:-1]] == [0] * 14
    assert got.bins[0].confidence is None


def test_certain_and_wrong() -> None:
    found = Reliability()
    found.add(np.log(np.array([[1.0, 1e-300]])), np.array([1]))
    got = found.result()
    assert (got.ece, got.brier, got.accuracy, got.brier_stderr) == (1.0, 2.0, 0.0, None)


@pytest.mark.parametrize("classes", [2, 4, 50])
def test_uniform_guessing(classes: int) -> None:
    """Equal probabilities: Brier is 1 - 1/k, and ECE the distance of 1/k from how often class 0 is right."""
    targets = np.arange(classes * 3) % classes
    found = Reliability()
    found.add(np.full((len(targets), classes), -math.log(classes)), targets)
    got = found.result()
    assert got.brier == pytest.approx(1 - 1 / classes)
    assert got.ece == pytest.approx(0, abs=1e-12)


def test_confident_by_a_known_amount() -> None:
    """Ten answers at 0.7, six of them right: ECE 0.1, Brier 0.6 * (0.09 + 0.09) + 0.4 * (0.49 + 0.49)."""
    found = Reliability()
    for n in range(10):  # one at a time: sums do not care
        found.add(np.log(np.array([[0.7, 0.3]])), np.array([0 if n < 6 else 1]))
    got = found.result()
    assert got.ece == pytest.approx(0.1)
    assert got.brier == pytest.approx(0.6 * 0.18 + 0.4 * 0.98)
    (only,) = [b for b in got.bins if b.count]
    assert (only.low, only.high) == (pytest.approx(10 / 15), pytest.approx(11 / 15))
    assert (only.confidence, only.accuracy, only.count) == (pytest.approx(0.7), pytest.approx(0.6), 10)
    values = [0.18] * 6 + [0.98] * 4
    assert got.brier_stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(10))


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("classes", [2, 7, 300])
def test_against_a_plain_loop(bins: int, classes: int) -> None:
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, 0.3), 500)
    targets = np.array([rng.choice(classes, p=row) for row in p])
    found = Reliability(bins)
    for a in range(0, 500, 37):
        found.add(np.log(p[a : a + 37] + 1e-300), targets[a : a + 37])
    got = found.result()
    ece, brier = by_hand(p, targets, bins)
    assert got.ece == pytest.approx(ece, abs=1e-12)
    assert got.brier == pytest.approx(brier, abs=1e-12)
    assert sum(b.count for b in got.bins) == got.n == 500


def test_choices_are_normalised_over_the_choices() -> None:
    """ln p of long continuations: only their differences count."""
    choices = [Choice((-1000.0, -1000.0 - math.log(3)), 0), Choice((-50.0 - math.log(3), -50.0), 0)]
    got = of_choices(choices)
    assert got.confidence == pytest.approx(0.75)
    assert got.accuracy == 0.5
    assert got.ece == pytest.approx(0.25)
    assert got.brier == pytest.approx((2 * 0.25**2 + 2 * 0.75**2) / 2)


def test_choices_of_different_number() -> None:
    got = of_choices([Choice((0.0, 0.0), 1), Choice((0.0, 0.0, 0.0, 0.0), 0)])
    assert got.n == 2
    assert got.brier == pytest.approx((0.5 + 0.75) / 2)


def test_a_calibrated_model_is_found_calibrated() -> None:
    """Targets drawn from the probabilities themselves: ECE falls towards 0; sharpened ones are far from it."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 20000)
    targets = (p.cumsum(axis=1) > rng.random((20000, 1))).argmax(axis=1)
    fair, sharp = Reliability(), Reliability()
    fair.add(np.log(p), targets)
    q = p**3 / (p**3).sum(axis=1, keepdims=True)
    sharp.add(np.log(q), targets)
    assert fair.result().ece < 0.01
    assert sharp.result().ece > 0.1
    assert sharp.result().brier > fair.result().brier
    assert sharp.result().accuracy == fair.result().accuracy


def test_nothing_to_judge() -> None:
    with pytest.raises(InputError, match="no answers with one right choice"):
        Reliability().result()


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"\(3,\) targets do not go with \(2, 5\) log-probabilities"):
        Reliability().add(np.zeros((2, 5)), np.zeros(3, int))
