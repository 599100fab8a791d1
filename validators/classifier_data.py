"""What an encoder or a convolutional network is shown in a proof: a file of the user's, the evaluation text, or noise where there is neither.

Sentences of a text differ in length, one is as long as the context; they are padded on the right with tokens that mean something, because what is
padding must not matter, and their second halves are of the second type, as those of pairs are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lconvert.errors import InputError
from lconvert.ir import Convnet, Encoder
from lconvert.passes import examples
from lconvert.passes.examples import Shown
from lconvert.spec import shapes
from lconvert.validators.proof import Proof

#: Sequences, or images, per window that was asked for.
_SEQUENCES, _IMAGES = 2, 64
_SEED = 7


@dataclass(frozen=True)
class Data:
    """Arrays, and whether they are what the model is for; `what` names them."""

    shown: Shown
    real: bool
    what: str


def context(proof: Proof) -> int:
    """Tokens of the longest sequence, 0 for images."""
    return (
        min(proof.options.context, proof.source.arch.context) if isinstance(proof.source.arch, Encoder) else 0
    )


def data(proof: Proof) -> Data:
    """InputError where the user's file is none of this model's."""
    arch, text = proof.source.arch, proof.options.text
    if text is not None and examples.is_arrays(text):
        given = examples.arrays(proof.source, text)
        limit = _limit(proof)
        cut = Shown(
            {k: v[:limit] for k, v in given.arrays.items()},
            None if given.labels is None else given.labels[:limit],
        )
        _check_labels(proof, cut)
        return Data(cut, True, f"{cut.count} examples of {text.name}")
    rng = np.random.default_rng(_SEED)
    if isinstance(arch, Convnet):
        if text is not None:
            raise InputError(
                f"{text}: {proof.source.source} is a network of images; give {examples.wanted(proof.source)}"
            )
        x = rng.random((_limit(proof), *arch.image), dtype=np.float32)
        return Data(Shown({"images": x}), False, f"{len(x)} images of noise")
    assert isinstance(arch, Encoder)
    longest, count = context(proof), _limit(proof)
    lengths = np.unique(np.geomspace(min(3, longest), longest, max(1, count // 2)).astype(int))[-count:]
    lengths = np.concatenate(
        [lengths, rng.integers(min(3, longest), min(longest, max(3, longest // 4)) + 1, count - len(lengths))]
    )
    if proof.source.tokenizer is None:
        rows = [rng.integers(0, arch.vocab, n).tolist() for n in lengths]
        return Data(_padded(arch, rows), False, f"{count} sequences of random ids")
    words = proof.corpus.split()
    starts = rng.integers(0, len(words), count)
    texts = [" ".join(np.resize(words[s:] + words[:s], n)) for s, n in zip(starts, lengths, strict=True)]
    rows = examples.tokens(proof.source, texts, longest)
    return Data(_padded(arch, rows), True, f"{len(rows)} passages of the text")


def _limit(proof: Proof) -> int:
    most = proof.options.max_windows
    each = _IMAGES if isinstance(proof.source.arch, Convnet) else _SEQUENCES
    if proof.options.text is not None and examples.is_arrays(proof.options.text):
        each = _IMAGES
        return 1 << 40 if most is None else each * most
    return each * (8 if most is None else most)


def _check_labels(proof: Proof, shown: Shown) -> None:
    arch, found = proof.source.arch, shown.labels
    count = (
        arch.labels if isinstance(arch, Encoder) else shapes(arch)[-1][0] if isinstance(arch, Convnet) else 0
    )
    if found is not None and (int(found.min()) < 0 or int(found.max()) >= count):
        raise InputError(
            f"{proof.options.text}: labels are {found.min()} to {found.max()}, the model has {count} classes"
        )


def _padded(e: Encoder, rows: list[list[int]]) -> Shown:
    rng, width = np.random.default_rng(_SEED), max(map(len, rows))
    ids = rng.integers(0, e.vocab, (len(rows), width))
    mask, types = (np.zeros(ids.shape, np.int64) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)], types[i, -(-len(row) // 2) :] = row, 1, 1
    named = {"input_ids": ids, "attention_mask": mask}
    return Shown(named | ({"token_type_ids": np.minimum(types, e.token_types - 1)} if e.token_types else {}))
