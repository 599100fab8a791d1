"""A tokenizer.json's vocabulary and algorithm -> the one of llama.cpp's algorithms that does the same.

llama.cpp has four that matter here: byte-level BPE and BPE on characters (`gpt2`, by rank of the merge, after a
pre-tokenizer known by name), SentencePiece BPE (`llama`, by score of the joined piece, no pre-tokenizer) and unigram
(`t5`, Viterbi). Which one a tokenizer.json needs follows from its structure alone; nothing is guessed from names.
Where the algorithm is the right one but some texts come out differently, a limit says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lconvert.converters import pretokenizers
from lconvert.converters.pretokenizers import BYTES
from lconvert.converters.tokenizer_algorithm import Algorithm, normalizers
from lconvert.converters.tokenizer_bytes import byte_level
from lconvert.converters.tokenizer_pieces import characters_bpe, unigram


def choose(data: Mapping[str, Any], model_type: str) -> Algorithm:
    """The algorithm for a checked tokenizer.json. UnsupportedError prints the structure that has none."""
    model = data["model"]
    kind = model.get("type", "BPE")
    steps = pretokenizers.steps_of(data.get("pre_tokenizer"))
    normalizer = normalizers(data.get("normalizer"))
    added = [t["content"] for t in data.get("added_tokens") or []]
    key = pretokenizers.describe(
        steps, normalizer, bool(model.get("ignore_merges")), bool(model.get("byte_fallback")), kind
    )
    odd = [f for f in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(f)]
    if odd:
        key += "".join(f"\n  {f}: {model[f]!r}" for f in odd)
    elif kind == "Unigram":
        return unigram(model, steps, normalizer, added, key)
    elif kind == "BPE" and BYTES in steps:
        special = [t["content"] for t in data.get("added_tokens") or [] if t.get("special")]
        return byte_level(model, steps, normalizer, special, model_type, key)
    elif kind == "BPE":
        return characters_bpe(model, steps, normalizer, added, model_type, key)
    raise pretokenizers.unknown(key)
