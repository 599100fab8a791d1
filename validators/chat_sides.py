"""How a source or an artifact renders and tokenizes chats: a Hugging Face folder, a GGUF in llama.cpp, or any model read.

Templates are code of strangers; every renderer here runs them in a sandbox, and bounded.py in a process with limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lconvert.formats import gguf
from lconvert.forward import packages
from lconvert.ir import Model
from lconvert.validators.conversations import Conversation
from lconvert.validators.runtimes.hf import encode, reference_tokenizer
from lconvert.validators.runtimes.llamacpp import LlamaCpp

_DEFAULT = "default"


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, or why the template refuses it."""

    text: str | None
    error: str = ""

    def __str__(self) -> str:
        return f"raises: {self.error}" if self.text is None else self.text


#: (template source, variables such as bos_token, conversation) -> text
Render = Callable[[str, Mapping[str, str], Conversation], Rendered]


@dataclass(frozen=True)
class Side:
    """A tokenizer as chats see it.

    templates: Jinja sources by name ("default", "tool_use" ...). tokens: the variables that templates get. encode: ids of
    a text, special tokens parsed. framed: ids of a text as the tokenizer adds bos and eos to it. bos, eos: None for none.
    ends: every id that ends a text. renderers: by name; of a reference only the first counts.
    """

    templates: Mapping[str, str]
    tokens: Mapping[str, str]
    encode: Callable[[str], Sequence[int]]
    framed: Callable[[str], Sequence[int]]
    bos: int | None
    eos: int | None
    ends: frozenset[int]
    renderers: Mapping[str, Render]
    close: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()


# --- renderers -------------------------------------------------------------------------------------------

TRANSFORMERS = "transformers"
LLAMA_CPP_PYTHON = "llama-cpp-python"


def _attempt(work: Callable[[], str]) -> Rendered:
    try:
        return Rendered(work())
    except Exception as e:  # noqa: BLE001 - a template can fail in any way, and both sides must
        return Rendered(None, " ".join(str(e).split()) or type(e).__name__)


def _by_transformers(template: str, tokens: Mapping[str, str], c: Conversation) -> Rendered:
    """transformers' renderer, in a sandbox, on any template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def work() -> str:
        texts, _ = render_jinja_template(
            conversations=[[dict(m) for m in c.messages]],
            tools=None if c.tools is None else [dict(t) for t in c.tools],
            chat_template=template,
            add_generation_prompt=c.generation_prompt,
            continue_final_message=c.continues,
            **tokens,
        )
        return str(texts[0])

    return _attempt(work)


@lru_cache(4)
def _formatter(template: str, eos: str, bos: str) -> Any:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template, eos, bos)


def _by_llama_cpp_python(template: str, tokens: Mapping[str, str], c: Conversation) -> Rendered:
    """The formatter that llama-cpp-python gives a GGUF's template to, a sandbox as well."""

    def work() -> str:
        eos, bos = tokens.get("eos_token", ""), tokens.get("bos_token", "")
        formatter = _formatter(template, eos, bos)
        formatter.add_generation_prompt = c.generation_prompt
        messages: Any = [dict(m) for m in c.messages]
        tools: Any = None if c.tools is None else [dict(t) for t in c.tools]
        return str(formatter(messages=messages, tools=tools).prompt)

    return _attempt(work)


# --- sides -----------------------------------------------------------------------------------------------


def folder_side(model: Model) -> Side:
    """A Hugging Face folder: chats by transformers' tokenizer class, ids by tokenizer.json."""
    _, transformers = packages()
    transformers.utils.logging.set_verbosity_error()
    assert model.tokenizer is not None
    try:
        auto = transformers.AutoTokenizer.from_pretrained(
            model.source, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # noqa: BLE001 - any class of transformers may raise anything
        reason = " ".join(str(e).split())
        note = f"chat: transformers cannot load the tokenizer ({reason}); lconvert's reading of it is used"
        return replace(model_side(model), notes=(note,))

    def render(template: str, tokens: Mapping[str, str], c: Conversation) -> Rendered:
        return _attempt(
            lambda: str(
                auto.apply_chat_template(
                    [dict(m) for m in c.messages],
                    tools=None if c.tools is None else [dict(t) for t in c.tools],
                    chat_template=template,
                    add_generation_prompt=c.generation_prompt,
                    continue_final_message=c.continues,
                    tokenize=False,
                )
            )
        )

    given = auto.chat_template
    templates = given if isinstance(given, dict) else {} if given is None else {_DEFAULT: given}
    stated = _ids(model.generation.get("eos_token_id")) or _ids(model.config.get("eos_token_id"))
    ends = frozenset({*stated, *_ids(auto.eos_token_id)})
    return Side(
        templates={str(k): str(v) for k, v in templates.items()},
        tokens=dict(auto.special_tokens_map),
        bos=auto.bos_token_id,
        eos=auto.eos_token_id,
        ends=ends,
        renderers={TRANSFORMERS: render},
        **_encoders(reference_tokenizer(model.tokenizer)),
    )


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def model_side(model: Model) -> Side:
    """Any model as lconvert read it."""
    packages()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    fast = reference_tokenizer(tokenizer)
    one = {role: ids[0] for role, ids in tokenizer.special.items() if ids}
    templates = dict(tokenizer.extra_templates)
    if tokenizer.chat_template is not None:
        templates[_DEFAULT] = tokenizer.chat_template
    return Side(
        templates=templates,
        tokens={f"{role}_token": str(fast.id_to_token(i)) for role, i in one.items()},
        bos=one.get("bos"),
        eos=one.get("eos"),
        ends=frozenset(tokenizer.special.get("eos", ())),
        renderers={TRANSFORMERS: _by_transformers},
        **_encoders(fast),
    )


def _encoders(fast: Any) -> dict[str, Any]:
    """`encode` and `framed` of a tokenizers.Tokenizer."""
    return {
        name: partial(encode, fast, special=True, framed=name == "framed") for name in ("encode", "framed")
    }


def gguf_side(path: Path) -> Side:
    """A GGUF file as llama.cpp sees it: its vocabulary is loaded, its weights are not."""
    packages()
    vocabulary = Vocabulary(path)
    start = "tokenizer.chat_template."
    named = [k.removeprefix(start) for k in gguf.read(path).metadata if k.startswith(start)]
    found = {_DEFAULT: vocabulary.template(None)} | {n: vocabulary.template(n) for n in named}
    bos, eos = vocabulary.special()
    return Side(
        templates={k: v for k, v in found.items() if v is not None},
        tokens={f"{k}_token": vocabulary.text(i) for k, i in (("bos", bos), ("eos", eos)) if i is not None},
        encode=lambda text: vocabulary.tokenize(text, special=True),
        framed=vocabulary.framed,
        bos=bos,
        eos=eos,
        ends=vocabulary.ends(),
        renderers={TRANSFORMERS: _by_transformers, LLAMA_CPP_PYTHON: _by_llama_cpp_python},
        close=vocabulary.close,
    )


class Vocabulary(LlamaCpp):
    """A GGUF's vocabulary in llama.cpp, with what llama.cpp knows of chats."""

    def __init__(self, path: Path):
        super().__init__(path, vocab_only=True)

    def template(self, name: str | None) -> str | None:
        found = self._c.llama_model_chat_template(self._model, None if name is None else name.encode())
        return None if found is None else bytes(found).decode("utf-8", "replace")

    def special(self) -> tuple[int | None, int | None]:
        """Ids of bos and eos."""
        bos, eos = self._c.llama_vocab_bos(self._vocab), self._c.llama_vocab_eos(self._vocab)
        return (None if bos < 0 else int(bos), None if eos < 0 else int(eos))

    def text(self, token: int) -> str:
        return bytes(self._c.llama_vocab_get_text(self._vocab, token)).decode("utf-8", "replace")

    def ends(self) -> frozenset[int]:
        """Every token at which llama.cpp ends a generation."""
        return frozenset(i for i in range(self.n_vocab) if self._c.llama_vocab_is_eog(self._vocab, i))

    def framed(self, text: str) -> list[int]:
        """Ids of a text with the bos and eos that llama.cpp adds."""
        return self._ids(text, framed=True, special=False)
