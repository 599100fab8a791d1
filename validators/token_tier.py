"""The tokens tier: the same ids for the same text, the same special tokens, the same chats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lconvert.errors import InputError
from lconvert.ir import Decoder
from lconvert.validators import chat, logit_tier, structure, tokens
from lconvert.validators.proof import Proof
from lconvert.validators.runtimes.hf import encode, reference_tokenizer


def run(proof: Proof) -> None:
    """All of the tier; what neither side can show is not proven."""
    source, artifact = proof.source, proof.artifact
    if source.tokenizer is None:
        proof.not_proven.append("tokens: the source has no tokenizer")
        return
    if artifact is None:
        proof.not_proven.append("tokens: the ONNX file has no tokenizer beside it that belongs to it")
        return
    proof.progress("tokens")
    found = (
        structure.gguf_vocabulary(source.tokenizer, artifact.tokenizer, source.decoder)
        if proof.kind == "gguf"
        else structure.same_tokenizer(source.tokenizer, artifact.tokenizer)
    )
    if proof.kind in ("hf", "onnx"):
        found["special ids"] += structure.same_ids(source.config, artifact.config)
    for name, wrong in found.items():
        proof.count("tokens", name, wrong, "as in the source")
    reference, corpus = proof.tokenizer, proof.corpus
    if proof.kind == "gguf":
        try:
            runtime = logit_tier.opened(proof, "llama.cpp", proof.path, vocab_only=True)
        except InputError as e:
            proof.add("tokens", "llama.cpp loads the vocabulary", str(e), "loads", False)
            return
        try:
            result = tokens.compare(source.tokenizer, reference, runtime.tokenize, corpus)
        finally:
            runtime.close()
    elif artifact.tokenizer is None:
        return
    else:
        other = reference_tokenizer(artifact.tokenizer)

        def tokenize(text: str, *, special: bool) -> Sequence[int]:
            return encode(other, text, special=special)

        result = tokens.compare(source.tokenizer, reference, tokenize, corpus, limited=False)
    differs = tokens.autotokenizer_differs(Path(source.source), corpus.splitlines()[:200])
    if differs:
        proof.notes.append(differs)
    proof.details["tokens"] = result.to_json()
    for name, count, differences in result.rows():
        value = f"{differences} of {count} texts differ"
        proof.at_most("tokens", name, value, differences, 0, "0")
    proof.notes += result.examples()
    if isinstance(source.arch, Decoder):
        proof.guarded("tokens", "chat templates", lambda: _chat(proof))


def _chat(proof: Proof) -> None:
    """Conversations rendered by the templates of both sides, and the tokens that end an answer."""
    assert proof.artifact is not None
    proof.progress("chat templates")
    found = chat.compare(proof.source, proof.artifact)
    proof.details["chat"] = found.to_json()
    for name, value, passed in found.rows():
        proof.add("tokens", name, value, "0" if "differ" in value else "the source's", passed)
    if found.conversations and found.refused == found.conversations:
        proof.not_proven.append("tokens: the chat template, which refuses every conversation on both sides")
    proof.notes += [f"chat template: {d}" for d in found.differences[:3]]
    proof.notes += [f"chat template: {text}" for text in (*found.notes, *found.skipped)]
