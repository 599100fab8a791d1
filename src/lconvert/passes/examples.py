"""What a classifier is shown, out of a file: a text, or arrays of NumPy (.npz, .npy).

    text    an encoder's sentences, one per line, as the model's tokenizer frames them
    .npz    arrays by the names of the model's inputs: `images`, or `input_ids` with `attention_mask` and `token_type_ids` where they
            are not what they are without (ones; zeros); `labels`, the true classes, where somebody counts hits
    .npy    one array: images, or input_ids

Images are (count, channels, height, width), ids and what goes with them (count, length).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lconvert.errors import InputError, MissingPackageError, OptionError
from lconvert.ir import Convnet, Encoder, Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lconvert.passes.histograms import Examples

ARRAYS = (".npz", ".npy")
LABELS = "labels"
_LARGEST = 4 << 30  # bytes of arrays
_BATCH = 32


@dataclass(frozen=True)
class Shown:
    """Arrays by input, all of one length, and the true classes where they are known."""

    arrays: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None = None

    @property
    def count(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int = _BATCH) -> Examples:
        return [{k: v[i : i + size] for k, v in self.arrays.items()} for i in range(0, self.count, size)]


def wanted(model: Model) -> str:
    """What to give for this model, for messages."""
    if isinstance(model.arch, Convnet):
        sizes = ", ".join(map(str, model.arch.image))
        return f".npz with an array `images` of shape (count, {sizes}), or these images as .npy"
    return "a text with an example per line, or .npz with input_ids, attention_mask and token_type_ids"


def is_arrays(path: str | Path) -> bool:
    return Path(path).suffix.lower() in ARRAYS


def load(model: Model, path: str | Path, *, count: int, length: int) -> Examples:
    """The first `count` examples of a file, of `length` tokens at most each; InputError for what is no example of this model."""
    if is_arrays(path):
        shown = arrays(model, Path(path))
        part = Shown({k: v[:count] for k, v in shown.arrays.items()})
        return part.batches()
    if isinstance(model.arch, Convnet):
        raise InputError(
            f"{path}: {model.source} is a network of images, which no text shows; give {wanted(model)}"
        )
    return [{"input_ids": [row]} for row in lines(model, Path(path), count, length)]


def lines(model: Model, path: Path, count: int, length: int) -> list[list[int]]:
    """The first lines of a text as tokens, one example each, as the model's tokenizer frames them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    return tokens(
        model, [s for line in text.splitlines() if (s := re.sub(r"\s+", " ", line).strip())][:count], length
    )


def tokens(model: Model, texts: list[str], length: int) -> list[list[int]]:
    """Ids of each text, cut to `length` or the model's context."""
    import json

    if model.tokenizer is None:
        raise InputError(
            f"{model.source}: has no tokenizer, so no text can be used for it; give arrays: .npz with input_ids and attention_mask"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackageError("tokenizers is not installed: pip install 'lconvert[hf]'") from None
    tokenizer = Tokenizer.from_str(json.dumps(model.tokenizer.json))
    tokenizer.no_padding()
    longest = model.arch.context if isinstance(model.arch, Encoder) else model.decoder.context
    ids = [tokenizer.encode(s).ids[: min(length, longest)] for s in texts]
    return [row for row in ids if row]


def arrays(model: Model, path: Path) -> Shown:
    """The whole of an .npz or .npy; InputError says which array the model does not take, and why."""
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path}: {path.stat().st_size / 1e9:.0f} GB; some hundred examples are enough")
        given = _read(path)
    except InputError:
        raise
    except Exception as e:  # noqa: BLE001 - zipfile, zlib and NumPy have many
        raise InputError(
            f"{path}: cannot be read as arrays of NumPy ({' '.join(str(e).split())[:200]})"
        ) from None
    if isinstance(model.arch, Convnet):
        return _images(model, model.arch, path, _named(given, "images"))
    if isinstance(model.arch, Encoder):
        return _ids(model, model.arch, path, _named(given, "input_ids"))
    raise OptionError(f"{path}: {model.source} is a language model, which is shown a text and no arrays")


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays by name; an .npy's has none."""
    import numpy as np

    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return {"": found}
    with found:
        return {k: np.asarray(found[k]) for k in found.files}


def _named(given: dict[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    return {name if k == "" else k: v for k, v in given.items()}


def _known(path: Path, given: Mapping[str, Any], first: str, others: tuple[str, ...], model: Model) -> None:
    if first not in given:
        raise InputError(f"{path}: holds {', '.join(given) or 'nothing'}; expected {wanted(model)}")
    if unknown := sorted(given.keys() - {first, *others, LABELS}):
        raise InputError(f"{path}: {model.source} has no input {unknown[0]!r}; expected {wanted(model)}")
    count = len(given[first]) if given[first].ndim else 0
    if not count:
        raise InputError(f"{path}: {first} is empty")
    for name, x in given.items():
        if x.ndim < 1 or len(x) != count:
            raise InputError(
                f"{path}: {name} has the shape {x.shape}, but there are {count} examples in {first}"
            )
    if LABELS in given and (given[LABELS].ndim != 1 or given[LABELS].dtype.kind not in "iu"):
        raise InputError(f"{path}: labels must be one whole number per example, found {given[LABELS].dtype}")


def _images(model: Model, c: Convnet, path: Path, given: dict[str, NDArray[Any]]) -> Shown:
    import numpy as np

    _known(path, given, "images", (), model)
    x = given["images"]
    if x.shape[1:] != c.image or x.dtype.kind not in "fiu":
        raise InputError(f"{path}: images are {x.dtype} of shape {x.shape}; expected {wanted(model)}")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise InputError(f"{path}: images hold NaN or infinite values")
    return Shown({"images": x}, given.get(LABELS))


def _ids(model: Model, e: Encoder, path: Path, given: dict[str, NDArray[Any]]) -> Shown:
    import numpy as np

    types = ("token_type_ids",) if e.token_types else ()
    _known(path, given, "input_ids", ("attention_mask", *types), model)
    ids = given["input_ids"]
    given.setdefault("attention_mask", np.ones_like(ids))
    for name in types:
        given.setdefault(name, np.zeros_like(ids))
    ends = {"input_ids": e.vocab, "attention_mask": 2, "token_type_ids": e.token_types}
    out = {}
    for name in ("input_ids", "attention_mask", *types):
        x = given[name]
        if x.dtype.kind not in "iub" or x.ndim != 2 or x.shape != ids.shape:
            raise InputError(
                f"{path}: {name} is {x.dtype} of shape {x.shape}; expected whole numbers (count, length)"
            )
        if x.size and (int(x.min()) < 0 or int(x.max()) >= ends[name]):
            raise InputError(
                f"{path}: {name} has values from {x.min()} to {x.max()}; {model.source} takes 0 to {ends[name] - 1}"
            )
        out[name] = x.astype(np.int64)
    if not 1 <= ids.shape[1] <= e.context:
        raise InputError(
            f"{path}: {ids.shape[1]} tokens per example; {model.source} has {e.context} positions"
        )
    if not out["attention_mask"][:, 0].all():
        raise InputError(
            f"{path}: the first token of an example is padding; encoders are padded on the right"
        )
    return Shown(out, given.get(LABELS))
