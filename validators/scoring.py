"""Log-likelihoods of texts through any runtime: what tasks, calibration by labels and the needle search are made of.

How a text becomes ids, and where a context ends, is what lm-eval's `hf` back end does (lm_eval/models/huggingface.py
HFLM, lm_eval/api/model.py TemplateLM), so that figures compare with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lconvert.converters import read
from lconvert.converters.tokenizer_hf import read_tokenizer
from lconvert.errors import InputError
from lconvert.formats.json_object import read_object
from lconvert.ir import Tokenizer
from lconvert.validators.logits import Logits, log_softmax
from lconvert.validators.runtimes import Runtime
from lconvert.validators.runtimes.hf import reference_tokenizer

_ROWS = 64  # rows of logits at a time: bounds the fp64 copies to rows x vocabulary
_STEP = 8  # tokens of the first request of a generation; doubled until it stops


@dataclass(frozen=True)
class Vocabulary:
    """What an artifact's files say about its texts: the ids that are put around them, and how ids become text.

    prefix, suffix: what its tokenizer puts before and after a text of its own accord (often BOS, rarely EOS).
    start: the id that stands for an empty context, BOS or else EOS. end: ids that end a generation.
    context: the tokens the model was made for. names: the texts of special tokens (bos_token ...), for chat templates.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    start: int
    end: frozenset[int]
    context: int
    start_text: str
    decode: Callable[[Sequence[int]], str]
    names: Mapping[str, str]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, path: str | Path) -> Vocabulary:
        """From a GGUF file, a Hugging Face or .lcir folder, or the folder around an ONNX file."""
        found, context = _read(Path(path))
        if found is None:
            raise InputError(f"{path}: has no tokenizer, so no text can be scored with it")
        backend = reference_tokenizer(found)
        bos, eos = found.special.get("bos", ()), found.special.get("eos", ())
        if not bos and not eos:
            raise InputError(
                f"{path}: names neither a BOS nor an EOS token, so a text has nothing to start from"
            )
        plain = backend.encode("a", add_special_tokens=False).ids
        framed = backend.encode("a", add_special_tokens=True).ids
        before = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)

        def text(ids: Sequence[int]) -> str:
            return str(backend.decode(list(ids), skip_special_tokens=True))

        return cls(
            prefix=tuple(framed[:before]),
            suffix=tuple(framed[before + len(plain) :]),
            start=(bos or eos)[0],
            end=frozenset(eos),
            context=context,
            start_text=str(backend.id_to_token((bos or eos)[0]) or ""),
            decode=text,
            names={f"{k}_token": str(backend.id_to_token(v[0]) or "") for k, v in found.special.items() if v},
            tokenizer=found,
        )


def _read(path: Path) -> tuple[Tokenizer | None, int]:
    """The tokenizer and the context length. Of a folder its own files say both, whatever holds the weights."""
    folder = path.parent if path.suffix == ".onnx" else path
    if (folder / "config.json").is_file():
        config = read_object(folder / "config.json")
        context = config.get("max_position_embeddings", config.get("n_positions"))
        if isinstance(context, int):
            return read_tokenizer(folder), context
    if path.suffix == ".onnx":
        raise InputError(f"{path}: config.json beside it must say how many tokens the model was made for")
    model = read(path)
    return model.tokenizer, model.decoder.context


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`, both as ids; the context is not empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """ln p(continuation | context), and whether greedy decoding would write it."""

    logprob: float
    greedy: bool


class Scorer:
    """A runtime together with its vocabulary. `context`: tokens of one forward pass at most."""

    def __init__(self, runtime: Runtime, vocabulary: Vocabulary, context: int | None = None) -> None:
        self.runtime, self.vocabulary = runtime, vocabulary
        self.context = min(vocabulary.context, context or vocabulary.context)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The runtime's own ids; `special`: framed as the tokenizer frames a text, unless it starts with BOS."""
        ids = list(self.runtime.tokenize(text, special=True))
        v = self.vocabulary
        framed = special and not (v.start_text and text.startswith(v.start_text))
        return [*v.prefix, *ids, *v.suffix] if framed else ids

    def count(self, text: str) -> int:
        """Tokens of a text, framing included."""
        return len(self.encode(text))

    def request(self, context: str, continuation: str) -> Request:
        """The pair as ids. The whole is tokenized once and cut at the length of the context's own ids; spaces at the
        end of the context belong to the continuation, as a tokenizer would have it."""
        if not context:
            start, ids = self.vocabulary.start, self.encode(continuation, special=False)
            if ids[:1] == [start]:
                return Request((start,), tuple(ids[1:]))
            return Request((start,), tuple(ids))
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        whole, head = self.encode(context + continuation), self.encode(context)
        return Request(tuple(head), tuple(whole[len(head) :]))

    def scores(
        self, requests: Sequence[Request], progress: Callable[[int], None] = lambda done: None
    ) -> list[Score]:
        """One score per request. Requests whose ids begin alike share a forward pass: the longer one's logits hold
        the shorter one's. What exceeds the context is cut from the left."""
        return score(self.runtime.logits, requests, self.context, progress)

    def windows(self, text: str) -> list[Request]:
        """The whole text as requests: full windows one after another, the last one filled up from its left, each
        token scored once (lm_eval/utils.py get_rolling_token_windows with one token of context)."""
        ids, size = self.encode(text), self.context
        out = []
        for a in range(0, len(ids), size):
            b = min(a + size, len(ids))
            first = max(b - size, 0) - 1
            head = [self.vocabulary.start] if first < 0 else [ids[first]]
            out.append(Request((*head, *ids[first + 1 : a]), tuple(ids[a:b])))
        return out

    def generate(self, prompt: str, most: int, until: Sequence[str]) -> str:
        """The greedy continuation up to an end token, the first of the texts `until`, or `most` tokens."""
        room = self.context - most
        if room < 1:
            raise InputError(
                f"{most} tokens are to be generated in a context of {self.context}; lower max_gen_toks"
            )
        ids = self.encode(prompt)[-room:] or [self.vocabulary.start]
        out: list[int] = []
        step = _STEP
        while len(out) < most:
            new = self.runtime.generate(ids + out, min(step, most - len(out))).ids
            stop = next((i for i, token in enumerate(new) if token in self.vocabulary.end), None)
            out += new[:stop]
            text = self.vocabulary.decode(out)
            if stop is not None or any(term and term in text for term in until):
                break
            step *= 2
        return cut(self.vocabulary.decode(out), until)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the terms."""
    for term in filter(None, until):
        text = text.split(term)[0]
    return text


def score(
    logits: Logits,
    requests: Sequence[Request],
    context: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """`Scorer.scores` on plain logits: ids (n) -> fp32 (n, vocabulary)."""
    inputs = []
    for r in requests:
        if len(r.continuation) > context:
            raise InputError(
                f"a text to be scored has {len(r.continuation)} tokens, more than the context of {context}"
            )
        inputs.append((r.context + r.continuation)[-(context + 1) :][:-1])
    out: list[Score] = [Score(0.0, True)] * len(requests)
    # In this order an input comes right after those that begin with it, and the first of them is in `head`.
    order = sorted(
        (i for i, r in enumerate(requests) if r.continuation), key=inputs.__getitem__, reverse=True
    )
    head: tuple[int, ...] = ()
    rows = np.empty((0, 0), np.float32)
    for done, i in enumerate(order):
        ids, target = inputs[i], requests[i].continuation
        if not head or head[: len(ids)] != ids:
            head, rows = ids, logits(list(ids))
        out[i] = _score(rows[len(ids) - len(target) : len(ids)], target)
        progress(done + 1)
    return out


def _score(rows: NDArray[np.float32], target: tuple[int, ...]) -> Score:
    total, greedy = 0.0, True
    for a in range(0, len(target), _ROWS):
        part = np.array(target[a : a + _ROWS])
        if part.max() >= rows.shape[1]:
            raise InputError(
                f"token {part.max()} of the text is outside of the runtime's vocabulary of {rows.shape[1]}"
            )
        p = log_softmax(rows[a : a + _ROWS])
        total += float(p[np.arange(len(part)), part].sum())
        greedy = greedy and bool((p.argmax(axis=-1) == part).all())
    return Score(total, greedy)
