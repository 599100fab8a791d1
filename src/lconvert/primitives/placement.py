"""Which weights get which grid: the options that every pass which rounds weights has in common.

A grid is said as NAME or NAME:GROUP, `int4:32`, `uint4:128`, `int8:-1` (a scale per row), `Q4_K`, `NVFP4`, `none` (left as it is).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lconvert.errors import OptionError, meant
from lconvert.ir import Entry, Model, Tensor

#: The matrices of decoder layers.
MATRICES = r".*\.(q|k|v|o|q_a|q_b|kv_a|k_b|v_b|gate|up|down)"
NONE = "none"
#: Tables of vectors: their rows are looked up.
TABLES = ("embed", "pos_embed")
#: A pattern that nothing matches: targets of a placement whose grids say all.
NOTHING = "(?!)"
_PORTABLE = r"u?int[2-8]|fp8|fp4|nf4|nf4dq"
_NAMED = ("int4", "int8", "uint4", "uint8", "fp8", "fp4", "nf4", "nf4dq")


@dataclass(frozen=True)
class Placed:
    """A grid by name and the values that share a scale: a number, -1 for a row, tensor, block."""

    grid: str
    group: int | str

    def __str__(self) -> str:
        return self.grid if own_blocks(self.grid) else f"{self.grid}:{self.group}"


@dataclass(frozen=True)
class Placement:
    """grid: int2..int8 (symmetric), uint2..uint8 (asymmetric), fp8, fp4 (NVFP4), nf4, nf4dq (its scales in 8 bits), or a GGUF block type. group: values per scale along the
    input dimension, -1 for a whole row; fp8 takes -1, tensor or block (128 x 128); block types and fp4 bring their own. targets, ignore:
    regular expressions on canonical names; a weight is rounded if it matches `targets` and not `ignore`. grids: exceptions, a
    regular expression -> NAME or NAME:GROUP or none; the first that matches counts, also for what `targets` leaves out."""

    grid: str = "int4"
    group: int | str = 128
    targets: str = MATRICES
    ignore: str = ""
    grids: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        who = type(self).__module__.rpartition(".")[2]
        check(who, Placed(self.grid, self.group))
        for pattern in (self.targets, self.ignore, *self.grids):
            try:
                re.compile(pattern)
            except re.error as e:
                raise OptionError(f"{who}: {pattern!r} is not a regular expression ({e})") from None
        for spec in self.grids.values():
            if spec != NONE:
                check(who, parse(who, spec, self.group))

    def of(self, role: str) -> Placed | None:
        """The grid of a canonical name; None for what stays as it is."""
        for pattern, spec in self.grids.items():
            if re.fullmatch(pattern, role):
                return None if spec == NONE else parse("grids", spec, self.group)
        if not re.fullmatch(self.targets, role) or (self.ignore and re.fullmatch(self.ignore, role)):
            return None
        return Placed(self.grid, self.group)

    def chosen(self, model: Model) -> Iterator[tuple[Entry, Placed]]:
        """Every dense matrix that gets a grid, in the model's order."""
        for name, entry in model.entries.items():
            if isinstance(entry.data, Tensor) and len(entry.data.shape) in (2, 4):
                placed = self.of(name)
                if placed is not None:
                    yield entry, placed


def with_inputs(who: str, placement: Placement, model: Model) -> dict[str, Placed]:
    """What a method that looks at inputs rounds, by name: OptionError where that is nothing, or something without inputs of its own."""
    wanted = {e.name: placed for e, placed in placement.chosen(model)}
    if not wanted:
        raise nothing(who, placement.targets, model)
    for name in wanted:
        if name in TABLES:
            raise OptionError(
                f"{who}: {name} is a table that is looked up, no input shows what its errors cost; give it to rtn "
                f"(grids: {{{name}: none}} here)"
            )
        transform = model.entries[name].transform
        if transform is not None and not transform.folded:
            raise OptionError(f"{who}: {name}: its input has a scale that is not folded; fold it first")
    return wanted


def nothing(who: str, targets: str, model: Model) -> OptionError:
    """That a placement takes no weight of a model, with names that it could take."""
    matrices = {n: e.data for n, e in model.entries.items() if len(e.shape) in (2, 4) and n not in TABLES}
    dense = [n for n, data in matrices.items() if isinstance(data, Tensor) and not n.endswith(".router")]
    why = (
        f"targets are a regular expression for whole names such as {dense[0]} (lconvert inspect lists them)"
        if dense
        else "all are quantized already, so give the model as it was before"
    )
    return OptionError(f"{who}: no dense matrix matches targets {targets!r}; {why}")


def undivided(what: str, cols: int, size: int, grid: str) -> OptionError:
    """That rows do not divide into the groups, or blocks, of a grid; with what would."""
    if own_blocks(grid):
        return OptionError(
            f"{what}: rows of {cols} values do not divide into {grid}'s blocks of {size}; choose a type with smaller blocks, or "
            "leave it out with ignore or grids"
        )
    fits = max(2**k for k in range(8) if cols % 2**k == 0)
    rows = "" if grid.startswith("nf4") else " or -1 for whole rows"
    return OptionError(
        f"{what}: rows of {cols} values do not divide into groups of {size}; choose a group that divides them, such as {fits}{rows}, or "
        "leave it out with ignore or grids"
    )


def own_blocks(grid: str) -> bool:
    """Whether a grid brings its block sizes along."""
    return not re.fullmatch(r"u?int[2-8]|fp8|nf4|nf4dq", grid)


def parse(who: str, spec: Any, group: int | str) -> Placed:
    """NAME or NAME:GROUP; `group` where none is said."""
    name, colon, size = str(spec).partition(":")
    if not colon:
        return Placed(name, group if not own_blocks(name) else -1)
    try:
        return Placed(name, int(size))
    except ValueError:
        return Placed(name, size)


def check(who: str, placed: Placed) -> None:
    """OptionError for a grid that does not exist, or a group that it cannot have."""
    grid, group = placed.grid, placed.group
    if not re.fullmatch(_PORTABLE, grid):
        from lconvert.formats.gguf_blocks import SCHEMES

        if grid.upper() not in SCHEMES:
            hint = meant(grid, (*_NAMED, *SCHEMES))
            raise OptionError(
                f"{who}: grid {grid!r}; {hint}choose int2..int8, uint2..uint8, fp8, fp4, nf4, nf4dq or {', '.join(SCHEMES)}"
            )
    elif grid == "fp8":
        if group not in (-1, "tensor", "block"):
            raise OptionError(f"{who}: group {group!r}; fp8 takes -1 (a scale per row), tensor or block")
    elif group == "tensor":
        if grid != "int8":
            raise OptionError(f"{who}: group tensor with {grid}; one scale for all is for int8")
    elif isinstance(group, str) or (group != -1 and group < 1):
        raise OptionError(f"{who}: group {group}; expected a positive number, or -1 for a whole row")


def patterns(types: Mapping[str, str], layers: int) -> dict[str, str]:
    """Types by role as the `grids` of a placement: a pattern per kind of matrix and type, for all experts of a layer where they agree.

    layers: how many the model has; a type that a kind has in all of them is said without their numbers."""
    agreed: dict[str, set[str]] = {}
    for role, type_ in types.items():
        agreed.setdefault(_any_expert(role), set()).add(type_)
    numbers: dict[tuple[str, str], set[int]] = {}
    out: dict[str, str] = {}
    for role, type_ in types.items():
        name = _any_expert(role) if len(agreed[_any_expert(role)]) == 1 else re.escape(role)
        if found := re.fullmatch(r"layers\\\.(\d+)\\\.(.*)", name):
            numbers.setdefault((found[2], type_), set()).add(int(found[1]))
        else:
            out[name] = type_
    for (local, type_), found_in in numbers.items():
        listed = "|".join(map(str, sorted(found_in)))
        which = r"\d+" if len(found_in) == layers else f"({listed})" if len(found_in) > 1 else listed
        out[rf"layers\.{which}\.{local}"] = type_
    return out


def _any_expert(role: str) -> str:
    """The pattern of a role in whichever expert of its layer."""
    return re.sub(r"experts\\\.\d+", r"experts\\.\\d+", re.escape(role))
