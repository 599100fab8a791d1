"""The integer program: brute force on small cases, budgets kept to the byte, the front, what cannot be met."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import pytest

from lconvert.errors import OptionError
from lconvert.primitives import allocator
from lconvert.primitives.allocator import Allocation, Item, Option

pytest.importorskip("scipy", reason="scipy solves the integer program")


def _items(seed: int) -> list[Item]:
    """Up to 6 items of up to 4 options: random ones, ones of equal sizes or losses, some of millions of bytes, some losses below zero."""
    r = random.Random(seed)
    scale = r.choice([1, 32, 4096, 1_000_003])
    spread = r.choice([1.0, 1e-6, 1e4])

    def option(n: int) -> Option:
        loss = r.choice([r.uniform(-0.1, 1), r.randrange(4) / 4, 10 ** r.uniform(-5, 0)])
        return Option(f"o{n}", scale * r.randrange(1, 30), spread * loss)

    return [
        Item(f"i{i}", (f"i{i}",), tuple(option(n) for n in range(r.randrange(1, 5))))
        for i in range(r.randrange(1, 7))
    ]


def _all(items: list[Item]) -> list[tuple[int, float]]:
    """(size, loss) of every allocation."""
    return [
        (sum(o.size for o in c), math.fsum(o.loss for o in c))
        for c in itertools.product(*(i.options for i in items))
    ]


@pytest.mark.parametrize("seed", range(200))
def test_within_a_budget_it_equals_brute_force(seed: int) -> None:
    items = _items(seed)
    every = _all(items)
    sizes = sorted(s for s, _ in every)
    for budget in {sizes[0], sizes[len(sizes) // 3], sizes[len(sizes) // 2], sizes[-1] + 5}:
        found = allocator.within(items, budget)
        assert found.size <= budget
        best = min(loss for size, loss in every if size <= budget)
        assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert set(found.chosen) == {i.name for i in items}


@pytest.mark.parametrize("seed", range(200, 300))
def test_below_a_loss_it_equals_brute_force(seed: int) -> None:
    items = _items(seed)
    every = _all(items)
    losses = sorted(loss for _, loss in every)
    for bound in {losses[len(losses) // 3] + 1e-9, losses[-1] + 1}:
        found = allocator.cheapest(items, bound)
        assert found.loss <= bound
        assert found.size == min(size for size, loss in every if loss <= bound)


def _large(count: int) -> list[Item]:
    """As a model has them: losses fall by a factor of four a bit, some items hundreds of times as sensitive."""
    r = random.Random(1)
    out = []
    for i in range(count):
        weight, values = 10 ** r.uniform(-3, 0), r.choice([1 << 20, 4 << 20, 11 << 20])
        options = tuple(
            Option(f"b{b}", values * b // 8, weight * r.uniform(0.8, 1.2) * 4.0**-b) for b in range(2, 9)
        )
        out.append(Item(f"t{i}", (f"t{i}",), options))
    return out


def test_a_budget_that_is_used_up() -> None:
    """Hundreds of items: within the budget, and no single exchange improves the result."""
    items = _large(200)
    budget = sum(i.options[2].size for i in items) + 12345
    found = allocator.within(items, budget)
    assert found.size <= budget
    room = budget - found.size
    for item in items:
        now = found.chosen[item.name]
        assert not [o for o in item.options if o.loss < now.loss and o.size - now.size <= room]


def test_the_front_ascends_in_size_and_descends_in_loss() -> None:
    points = allocator.front(_large(30), 12)
    assert len(points) == 12
    assert all(a.size < b.size and a.loss > b.loss for a, b in itertools.pairwise(points))
    assert {o.name for o in points[0].chosen.values()} == {"b2"}
    assert {o.name for o in points[-1].chosen.values()} == {"b8"}


def test_what_an_optimum_cannot_need_is_left_out() -> None:
    options = (
        Option("a", 4, 1.0),
        Option("b", 4, 0.5),
        Option("c", 6, 0.7),
        Option("d", 8, 0.5),
        Option("e", 9, 0.1),
    )
    assert [o.name for o in allocator.useful(options)] == ["b", "e"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda items: allocator.within(items, 9), r"a budget of 9 bytes is too small: the smallest options take 10; raise it"),
        (lambda items: allocator.cheapest(items, 0.1), r"a loss of 0\.1 is out of reach: the best options lose 0\.3"),
        (lambda items: allocator.within([], 9), r"nothing to allocate"),
        (lambda items: allocator.within([Item("x", ("x",), ())], 9), r"x: none of the allowed types can hold it"),
        (
            lambda items: allocator.within([Item("x", ("x",), (Option("a", 1, math.nan),))], 9),
            r"x: the loss of a is nan, not a number",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_met_says_what_can(call: object, message: str) -> None:
    items = [
        Item("a", ("a",), (Option("s", 4, 1.0), Option("l", 8, 0.1))),
        Item("b", ("b",), (Option("s", 6, 0.2),)),
    ]
    with pytest.raises(OptionError, match=message):
        call(items)  # type: ignore[operator]


def test_an_allocation_adds_up() -> None:
    a = Allocation({"a": Option("Q4_K", 10, 0.25), "b": Option("Q6_K", 20, 0.5)})
    assert (a.size, a.loss, a.names()) == (30, 0.75, {"a": "Q4_K", "b": "Q6_K"})


def test_the_solver_prints_nothing() -> None:
    """A process of its own, whose stdout is read to the end: C buffers are flushed when it goes."""
    program = """
import random
from lconvert.primitives.allocator import Item, Option, front
r = random.Random(0)
bits = (2.6, 3.4, 3.5, 4.25, 4.5, 5.5, 6.5625, 8.5)
items = []
for i in range(58):
    n, h = r.choice([65536, 196608, 1048576]), r.lognormvariate(0, 1.5)
    items.append(Item(str(i), (str(i),), tuple(Option(str(b), int(n * b / 8), h * 4**-b * r.uniform(0.8, 1.2)) for b in bits)))
front(items)
print("done")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "done\n"
