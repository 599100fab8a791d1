"""Factors and rotations multiplied into weights, lazily: new dense F32 tensors, computed in fp64 and rounded once.

`scaled` moves factors through the places of `sites` and leaves the function as it is, up to that rounding. What it is made of serves
rotations too: a `Change` multiplies the columns of a matrix by factors or turns them, and then does so to its rows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.ir import Entry, Model, QTensor, Tensor, as_f32, dense
from lconvert.primitives.sites import Site, cached, sites

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    #: Acts on the last axis of an fp64 array.
    Linear = Callable[[Array], Array]

_STRIP = 1 << 20  # values that rows are changed in at once where all rows are needed
_KEPT = 4  # matrices that are held as wholes


@dataclass(frozen=True)
class Change:
    """columns: what is done, in order, to each row of a matrix (to the last axis of (rows, columns)). factors (rows,): what its rows
    are then multiplied by. rows: what is done last to each column, `run` rows at a time (to the last axis of (.., run))."""

    columns: tuple[Linear, ...] = ()
    factors: Array | None = None
    rows: Linear | None = None
    run: int = 1


def times(factors: Array) -> Linear:
    """Multiplies the last axis by `factors`."""
    return lambda x: x * factors


def changed(t: Tensor, change: Change) -> Tensor:
    """`t` (rows, columns) or (rows,) after a change; its rows are a multiple of the change's run."""
    run = change.run

    def read(start: int, stop: int) -> NDArray[np.float32]:
        first, last = start - start % run, -(-stop // run) * run
        return _slab(t, change, first, last)[start - first : stop - first]

    whole = change.rows is not None and run == t.rows
    return Tensor(t.shape, "F32", _Whole(t, change) if whole else read, t.origin, t.files)


def _slab(t: Tensor, change: Change, start: int, stop: int) -> NDArray[np.float32]:
    import numpy as np

    x = as_f32(t.read(start, stop), t.dtype).astype(np.float64)
    for act in change.columns:
        x = act(x)
    if change.factors is not None:
        x *= change.factors[start:stop].reshape(-1, *(1 for _ in t.shape[1:]))
    if change.rows is not None:
        runs = x.reshape(-1, change.run, *t.shape[1:])
        x = change.rows(runs.swapaxes(1, -1)).swapaxes(1, -1).reshape(x.shape)
    return np.ascontiguousarray(x, np.float32)


class _Whole:
    """Rows of a matrix each of which depends on all rows: computed once, held until as many rows were handed out as there are, or
    until others need the place: who reads a few rows of every matrix holds no more than a few matrices."""

    def __init__(self, t: Tensor, change: Change) -> None:
        self._t, self._change = t, change
        self._lock = threading.Lock()
        self._held: NDArray[np.float32] | None = None
        self._left = 0

    def __call__(self, start: int, stop: int) -> NDArray[np.float32]:
        with self._lock:
            held = self._held
            if held is None:
                held, self._left = self._compute(), self._t.rows
                self._held = held
                _RECENT.append(self)
                if len(_RECENT) > _KEPT:
                    _RECENT.popleft()._held = None
            self._left -= stop - start
            if self._left <= 0:
                self._held = None
            return held[start:stop].copy()

    def _compute(self) -> NDArray[np.float32]:
        import numpy as np

        t, change = self._t, self._change
        if len(t.shape) == 1 or change.columns or change.factors is not None:
            return _slab(t, change, 0, t.rows)
        assert change.rows is not None
        x = as_f32(t.load(), t.dtype)
        out, step = np.empty(t.shape, np.float32), max(1, _STRIP // t.rows)
        for a in range(0, t.shape[1], step):
            strip = np.ascontiguousarray(x[:, a : a + step].T, np.float64)
            out[:, a : a + step] = change.rows(strip).T
        return out


#: Matrices that slabs in flight read from: neighbours in a file.
_RECENT: deque[_Whole] = deque()


# --- entries ---------------------------------------------------------------------------------------------


def plain(model: Model, name: str, what: str) -> Tensor:
    """The dense tensor of an entry; UnsupportedError where it is in codes or its input is rounded with a scale that was measured."""
    entry = model.entries[name]
    if isinstance(entry.data, QTensor):
        raise UnsupportedError(
            f"{name}: is quantized already, and codes cannot be {what}; transform the model before it is quantized"
        )
    if entry.activation is not None and entry.activation.scale is not None:
        raise UnsupportedError(
            f"{name}: its input is rounded with a scale that was measured before it is {what}; set activations after transforms"
        )
    return entry.data


def noted(entry: Entry, data: Tensor, note: str) -> Entry:
    """An entry with new values and a line about what was done."""
    return replace(entry, data=data, provenance=(*entry.provenance, note))


def _multiplied(
    model: Model, rows: Mapping[str, Array], columns: Mapping[str, Array], note: str
) -> dict[str, Entry]:
    """Entries with factors on their rows (and bias) and columns, each in one rounding."""
    new = {}
    for name in dict.fromkeys((*rows, *columns)):
        by = columns.get(name)
        change = Change(() if by is None else (times(by),), rows.get(name))
        data = changed(plain(model, name, "multiplied"), change)
        new[name] = noted(model.entries[name], data, note)
        if name in rows:
            new |= rows_changed(model, name + ".bias", Change(factors=rows[name]), note)
    return new


def rows_changed(model: Model, name: str, change: Change, note: str) -> dict[str, Entry]:
    """An entry with its rows changed, as a dictionary; empty where the model has none of this name (a bias)."""
    entry = model.entries.get(name)
    return {} if entry is None else {name: noted(entry, changed(plain(model, name, "changed"), change), note)}


def _chosen(model: Model, names: Iterable[str]) -> list[Site]:
    found = {site.name: site for site in sites(model.decoder)}
    out = []
    for name in names:
        if name not in found:
            raise OptionError(f"{name}: no factor can move through it in {model.decoder.family}")
        if cached(model, found[name]):
            raise UnsupportedError(
                f"{name}: the cache of values has a scale that was measured on them as they are"
            )
        out.append(found[name])
    return out


def norm_weight(model: Model, name: str) -> Array:
    """What a norm multiplies by, in fp64: the stored weight and the architecture's offset."""
    import numpy as np

    t = plain(model, name, "moved")
    w = as_f32(t.load(), t.dtype).astype(np.float64)
    if not np.isfinite(w).all():
        raise InputError(f"{t.origin}: {name} holds NaN or infinite values; the weights are damaged")
    out: Array = w + model.decoder.norm_offset
    return out


def scaled(model: Model, factors: Mapping[str, NDArray[Any]], note: str = "scaled") -> Model:
    """The same function with the input of every named site divided by its factors and its consumers' columns multiplied by them.

    factors: site name -> (channels,), finite and positive. A norm's stored weight w becomes (w + offset) / s - offset."""
    import numpy as np

    rows: dict[str, Array] = {}
    columns: dict[str, Array] = {}
    new: dict[str, Entry] = {}
    for site in _chosen(model, factors):
        s = np.asarray(factors[site.name], np.float64)
        if s.shape != (site.channels,):
            raise OptionError(f"{site.name}: expected {site.channels} factors, found shape {s.shape}")
        if not (np.isfinite(s) & (s > 0)).all():
            raise OptionError(
                f"{site.name}: expected positive factors, found {s[~(s > 0) | np.isinf(s)][0]:g}"
            )
        for name in site.consumers:
            columns[name] = site.columns(s)
        if site.kind == "rows":
            rows[site.name] = 1 / s
            continue
        offset = model.decoder.norm_offset
        stored = (norm_weight(model, site.name) / s - offset).astype(np.float32)
        home = model.entries[site.name]
        new[home.name] = noted(home, dense(stored, "F32", home.data.origin), note)
        new |= rows_changed(model, site.name + ".bias", Change(factors=1 / s), note)
    return model.with_entries(new | _multiplied(model, rows, columns, note))
