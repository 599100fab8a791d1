"""A Hugging Face folder's tokenizer -> ir.Tokenizer: the files as data, checked, nothing interpreted.

tokenizer.json is the truth. A folder that has only a tokenizer.model gets the tokenizer.json that says the same
(sentencepiece_model). The ids of bos, eos and the others come from, in this order: tokenizer_config.json,
special_tokens_map.json, config.json; generation_config.json adds the other ids that end a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lconvert.converters import sentencepiece_model
from lconvert.errors import InputError, UnsupportedError
from lconvert.formats.files import show
from lconvert.formats.json_object import read_object
from lconvert.ir import Tokenizer

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LIMIT = 512 << 20  # bytes of a JSON file; the largest published tokenizer.json takes 35 MB
_MAX_ID = 1 << 31

#: What else a folder may hold instead of a tokenizer.json, and what to do about it.
_FOREIGN: Mapping[str, str] = {
    "tekken.json": "Mistral's tekken format",
    "vocab.json": "a slow GPT-2 style tokenizer (vocab.json and merges.txt)",
    "vocab.txt": "a BERT vocabulary",
    "qwen.tiktoken": "a tiktoken file",
    "tiktoken.model": "a tiktoken file",
    "tokenizer.tiktoken": "a tiktoken file",
    "spiece.model": "a SentencePiece model under an old name: rename it to tokenizer.model",
}


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, _LIMIT) if path.exists() else {}


# --- checking tokenizer.json -----------------------------------------------------------------------------


def check_json(data: Mapping[str, Any], origin: str) -> None:
    """InputError unless vocabulary, merges and added tokens are whole and agree with each other."""

    def wrong(what: str) -> InputError:
        return InputError(f"{origin}: {what}")

    model = data.get("model")
    if not isinstance(model, Mapping):
        raise wrong("there is no `model`; this is no tokenizer.json, or a damaged one")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if data.get(name) is not None:
            _check_part(data[name], name, wrong)
    vocab = _vocab(model, wrong)
    _check_model(model, vocab, wrong)
    _check_ids(vocab, "the vocabulary", wrong)
    if model.get("type", "BPE") == "BPE":
        _check_merges(model, vocab, wrong)
    added = data.get("added_tokens") or []
    if not isinstance(added, list):
        raise wrong("`added_tokens` is not a list")
    listed: dict[str, Any] = {}
    for token in added:
        if (
            not isinstance(token, Mapping)
            or not isinstance(token.get("content"), str)
            or not token["content"]
        ):
            raise wrong(f"an added token without content: {show(token)}")
        text = token["content"]
        if text in listed:
            raise wrong(f"the added token {show(text)} is there twice")
        listed[text] = token.get("id")
        if text in vocab and vocab[text] != token.get("id"):
            raise wrong(
                f"{show(text)} has id {vocab[text]} in the vocabulary and {show(token.get('id'))} as added token"
            )
    _check_ids({**vocab, **listed}, "the added tokens", wrong)


def _check_part(part: Any, where: str, wrong: Any) -> None:
    """A component is an object with a type; a Sequence holds a list of components; a template a list of marks."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise wrong(f"`{where}` is {show(part)}, not an object with a type")
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        inner = part.get(name, [])
        if not isinstance(inner, list):
            raise wrong(f"`{where}.{name}` is {show(inner)}, not a list")
        for i, child in enumerate(inner):
            _check_part(child, f"{where}.{name}[{i}]", wrong)
    for name in ("single", "pair"):
        marks = part.get(name) or []
        if not isinstance(marks, list) or not all(map(_is_mark, marks)):
            raise wrong(f"`{where}.{name}` is {show(marks)}, not a list of special tokens and sequences")
    for name in ("cls", "sep"):
        if name in part and not (
            isinstance(part[name], list) and part[name] and isinstance(part[name][0], str)
        ):
            raise wrong(f"`{where}.{name}` is {show(part[name])}, not a token and its id")
    table = part.get("special_tokens", {})
    if not isinstance(table, Mapping) or not all(_is_expansion(e) for e in table.values()):
        raise wrong(f"`{where}.special_tokens` is {show(table)}, not a table of tokens")


def _is_mark(mark: Any) -> bool:
    inner = list(mark.values()) if isinstance(mark, Mapping) else []
    return len(inner) == 1 and isinstance(inner[0], Mapping) and isinstance(inner[0].get("id"), str)


def _is_expansion(entry: Any) -> bool:
    tokens = entry.get("tokens") if isinstance(entry, Mapping) else None
    return isinstance(tokens, list) and all(isinstance(t, str) for t in tokens)


def _check_model(model: Mapping[str, Any], vocab: Mapping[str, Any], wrong: Any) -> None:
    if not isinstance(model.get("type", "BPE"), str):
        raise wrong(f"`model.type` is {show(model['type'])}")
    unk, unk_id = model.get("unk_token"), model.get("unk_id")
    if unk is not None and not isinstance(unk, str):
        raise wrong(f"`model.unk_token` is {show(unk)}, not a token")
    if unk_id is not None and (not isinstance(unk_id, int) or not 0 <= unk_id < len(vocab)):
        raise wrong(f"`model.unk_id` is {show(unk_id)}, the vocabulary has {len(vocab)} pieces")


def _vocab(model: Mapping[str, Any], wrong: Any) -> dict[str, Any]:
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        return vocab
    if not isinstance(vocab, list):
        raise wrong("`model.vocab` is missing")
    out: dict[str, Any] = {}
    for i, entry in enumerate(vocab):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise wrong(f"item {i} of `model.vocab` is {show(entry)}, not a piece and its score")
        if not isinstance(entry[1], int | float) or isinstance(entry[1], bool) or entry[1] != entry[1]:
            raise wrong(f"piece {i}, {show(entry[0])}, has the score {show(entry[1])}")
        if entry[0] in out:
            raise wrong(f"the piece {show(entry[0])} is there twice")
        out[entry[0]] = i
    return out


def _check_ids(vocab: Mapping[str, Any], what: str, wrong: Any) -> None:
    seen: dict[int, str] = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < _MAX_ID:
            raise wrong(f"in {what}, {show(text)} has the id {show(i)}")
        if i in seen:
            raise wrong(f"in {what}, {show(seen[i])} and {show(text)} both have the id {i}")
        seen[i] = text
        try:
            text.encode()
        except UnicodeEncodeError:
            raise wrong(f"in {what}, token {i} is not Unicode text: {show(text)}") from None


def merge_pairs(model: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The merges of a BPE model in either spelling, ["a", "b"] or "a b". ValueError names one that is neither."""
    for i, merge in enumerate(model.get("merges") or []):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        left, right = parts if isinstance(parts, list) and len(parts) == 2 else ("", "")
        if not (left and right and isinstance(left, str) and isinstance(right, str)):
            raise ValueError(f"merge {i} is {show(merge)}, not a pair")
        yield left, right


def _check_merges(model: Mapping[str, Any], vocab: Mapping[str, Any], wrong: Any) -> None:
    if not isinstance(model.get("merges"), list):
        raise wrong("`model.merges` is missing")
    try:
        for left, right in merge_pairs(model):
            if left + right not in vocab or left not in vocab or right not in vocab:
                text = next(t for t in (left, right, left + right) if t not in vocab)
                raise ValueError(f"the merge of {show(left)} and {show(right)} needs {show(text)}")
    except ValueError as e:
        raise wrong(f"{e}, which is not in the vocabulary" if "needs" in str(e) else str(e)) from None


# --- the other files -------------------------------------------------------------------------------------


def _content(entry: Any) -> str | None:
    """A token named by its text or by an added-token object."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None


def _as_ids(value: Any) -> tuple[int, ...]:
    """The ids of a config entry: one, several or none."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def special_ids(
    data: Mapping[str, Any], named: Iterable[Mapping[str, Any]], configs: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[int, ...]]:
    """Ids by role. `named` gives texts (bos_token ...), the first wins; `configs` gives ids (bos_token_id ...)."""
    model = data["model"]
    by_text = dict(_vocab(model, ValueError))
    by_text |= {t["content"]: t["id"] for t in data.get("added_tokens") or []}
    tables, numbered = list(named), list(configs)
    out: dict[str, tuple[int, ...]] = {}
    for role in ROLES:
        texts = [t for table in tables if (t := _content(table.get(f"{role}_token"))) is not None]
        ids = [by_text[t] for t in texts[:1] if t in by_text]
        for config in numbered:
            found = _as_ids(config.get(f"{role}_token_id"))
            if role == "eos":
                ids += [i for i in found if i not in ids]
            elif not ids:
                ids += found[:1]
        if ids:
            out[role] = tuple(ids)
    return out


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The chat template and the named ones: tokenizer_config.json first, then the files beside it."""
    value: Any = config.get("chat_template")
    if value is None:
        value = _template_files(folder)
    if isinstance(value, str):
        return value, {}
    if value is None:
        return None, {}
    if not isinstance(value, list):
        raise InputError(
            f"{folder}: `chat_template` is {show(value)}, neither a text nor a list of templates"
        )
    named: dict[str, str] = {}
    for entry in value:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        text = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise InputError(f"{folder}: `chat_template` holds {show(entry)}, not a name and a template")
        if name in named:
            raise InputError(f"{folder}: the chat template {show(name)} is there twice")
        named[name] = text
    return named.pop("default", None), named


def _template_files(folder: Path) -> Any:
    jinja = folder / "chat_template.jinja"
    if not jinja.exists():
        return _optional(folder / "chat_template.json").get("chat_template")
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    texts = [{"name": "default", "template": _text(jinja)}]
    return texts + [{"name": p.stem, "template": _text(p)} for p in more]


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LIMIT:
            raise InputError(f"{path}: {path.stat().st_size} bytes are too many for a template")
        return path.read_bytes().decode()
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e})") from None


def _from_pieces(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    pieces = sentencepiece_model.read(path)
    add_bos = config.get("add_bos_token", True) is True
    add_eos = config.get("add_eos_token", False) is True
    data = sentencepiece_model.tokenizer_json(pieces, add_bos, add_eos)
    roles = {"bos": pieces.bos, "eos": pieces.eos, "unk": pieces.unk, "pad": pieces.pad}
    extra = config.get("added_tokens_decoder")
    if isinstance(extra, Mapping):
        _add_tokens(data, extra, path)
    return data, {f"{role}_token_id": i for role, i in roles.items() if i >= 0}


def _add_tokens(data: dict[str, Any], extra: Mapping[str, Any], path: Path) -> None:
    """tokenizer_config.json's added tokens into a tokenizer.json that was built from the pieces alone."""
    added = {t["id"]: t for t in data["added_tokens"]}
    vocab = data["model"]["vocab"]
    for key, token in extra.items():
        text = _content(token)
        if not key.isdecimal() or not text:
            raise InputError(
                f"{path.parent / 'tokenizer_config.json'}: added token {show(key)} is {show(token)}"
            )
        flags = {f: bool(token.get(f)) for f in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added[int(key)] = {"id": int(key), "content": text, **flags}
        if isinstance(vocab, dict):
            vocab.setdefault(text, int(key))
    data["added_tokens"] = [added[i] for i in sorted(added)]


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, None if it has none.

    InputError: a file is damaged or contradicts itself. UnsupportedError: a tokenizer in a format that is not read.
    """
    folder = Path(folder)
    config = _optional(folder / "tokenizer_config.json")
    hf_config = _optional(folder / "config.json")
    own: dict[str, int] = {}
    if (path := folder / "tokenizer.json").exists():
        data = read_object(path, _LIMIT)
    elif (path := folder / "tokenizer.model").exists():
        data, own = _from_pieces(path, config)
    else:
        for name, what in _FOREIGN.items():
            if (folder / name).exists():
                raise UnsupportedError(
                    f"{folder}: {name} is {what}, and there is no tokenizer.json; load the folder with transformers' "
                    "AutoTokenizer and save_pretrained it, which writes one"
                )
        return None
    check_json(data, str(path))
    named = (config, _optional(folder / "special_tokens_map.json"))
    nested = hf_config.get("text_config")
    configs = (
        hf_config,
        nested if isinstance(nested, Mapping) else {},
        own,
        _optional(folder / "generation_config.json"),
    )
    template, extra = _templates(folder, config)
    return Tokenizer(
        json=data,
        config=config,
        chat_template=template,
        extra_templates=extra,
        special=special_ids(data, named, configs),
    )
