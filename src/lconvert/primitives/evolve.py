"""Improving an allocation on what it really costs: losses of single items do not add up exactly, and only a measurement knows.

EvoPress (arXiv 2410.14649, 3): (1 + lambda) selection on the measured KLD. A mutation gives one item its next larger type and takes bytes back from
others, one type each, until the budget holds (level switch); the parent stays unless a child is better. The driver "optuna" hands the same
question to Optuna's TPE sampler (arXiv 2304.11127), from the same start.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lconvert.errors import MissingPackageError, OptionError
from lconvert.primitives.allocator import Allocation, Item, Option
from lconvert.primitives.job import Progress

DRIVERS = ("evolve", "optuna")
_TRIES = 100  # of a mutation that fits


@dataclass(frozen=True)
class Refined:
    """The best allocation, what it measured, and what the start measured."""

    allocation: Allocation
    measured: float
    before: float


def refine(
    items: Sequence[Item],
    start: Allocation,
    budget: int,
    measure: Callable[[Allocation], float],
    *,
    generations: int,
    offspring: int = 4,
    seed: int = 0,
    driver: str = "evolve",
    tell: Progress | None = None,
) -> Refined:
    """At most `generations` x `offspring` measurements; never worse than `start`, never above `budget` bytes."""
    if driver not in DRIVERS:
        raise OptionError(f"driver {driver!r}; choose {', '.join(DRIVERS)}")
    before = measure(start)
    if driver == "optuna":
        return _optuna(items, start, budget, measure, before, generations * offspring, seed)
    options = {item.name: sorted(item.options, key=lambda o: (o.size, o.loss)) for item in items}
    chance = random.Random(seed)
    best, value = start, before
    seen = {tuple(start.names().items())}
    for generation in range(generations):
        parent = best
        for _ in range(offspring):
            child = _mutated(parent, options, budget, chance, seen)
            if child is None:
                continue
            found = measure(child)
            if found < value:
                best, value = child, found
        if tell is not None:
            tell("measured refinement", generation + 1, generations)
    return Refined(best, value, before)


def _mutated(
    parent: Allocation,
    options: Mapping[str, Sequence[Option]],
    budget: int,
    chance: random.Random,
    seen: set[tuple[tuple[str, str], ...]],
) -> Allocation | None:
    """A neighbour within the budget that was not measured before; None where chance finds none."""
    names = [n for n, o in options.items() if len(o) > 1]
    for _ in range(_TRIES):
        chosen = dict(parent.chosen)
        for _ in range(chance.choice((1, 1, 2))):
            _step(chosen, options, chance.choice(names), 1, chance)
        for _ in range(4 * len(names)):
            if sum(o.size for o in chosen.values()) <= budget:
                break
            _step(chosen, options, chance.choice(names), -1, chance)
        child = Allocation(chosen)
        key = tuple(child.names().items())
        if names and child.size <= budget and key not in seen:
            seen.add(key)
            return child
    return None


def _step(
    chosen: dict[str, Option],
    options: Mapping[str, Sequence[Option]],
    name: str,
    way: int,
    chance: random.Random,
) -> None:
    """The next option of an item in size, up or down, if there is one; types of equal size are taken by chance."""
    size = chosen[name].size
    others = [o for o in options[name] if (o.size - size) * way > 0]
    if others:
        near = min(abs(o.size - size) for o in others)
        chosen[name] = chance.choice([o for o in others if abs(o.size - size) == near])


def _optuna(
    items: Sequence[Item],
    start: Allocation,
    budget: int,
    measure: Callable[[Allocation], float],
    before: float,
    trials: int,
    seed: int,
) -> Refined:
    try:
        import optuna
    except ImportError:
        raise MissingPackageError(
            "optuna is not installed: pip install 'lconvert[optuna]', or choose the driver evolve"
        ) from None
    best, value = start, before
    by_name = {item.name: {o.name: o for o in item.options} for item in items}

    def objective(trial: optuna.Trial) -> float:
        nonlocal best, value
        chosen = {n: o[trial.suggest_categorical(n, list(o))] for n, o in by_name.items()}
        child = Allocation(chosen)
        if child.size > budget:  # worse than anything measured, the more the larger
            return 1e3 * child.size / budget
        found = before if child.names() == start.names() else measure(child)
        if found < value:
            best, value = child, found
        return found

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(start.names())
    study.optimize(objective, n_trials=trials)
    return Refined(best, value, before)
