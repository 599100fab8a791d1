"""Chats: the same text and ids on both sides for good artifacts and real templates; every planted fault is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lconvert
from lconvert.ir import Model
from lconvert.validators import chat
from lconvert.validators.chat_sides import folder_side, gguf_side
from lconvert.validators.conversations import Conversation, conversations
from tests.conftest import DEMO
from tests.upstream import source_folder

gguf = pytest.importorskip("gguf")
needs_runtimes = [
    pytest.importorskip(name, reason=f"{name} is not installed")
    for name in ("torch", "transformers", "llama_cpp", "tokenizers")
]


@pytest.fixture(scope="module")
def source() -> Model:
    return lconvert.read(DEMO)


@pytest.fixture(scope="module")
def good(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "demo.gguf"
    lconvert.convert(source, path, ftype="Q8_0")
    return path


def folder(path: Path, template: str | None, **more: str) -> Path:
    """The demo model with other templates: the default one, and named ones."""
    shutil.copytree(DEMO, path)
    (path / "chat_template.jinja").unlink()
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    for name, text in more.items():
        (path / "additional_chat_templates").mkdir(exist_ok=True)
        (path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return path


def proof(path: Path, out: Path) -> chat.ChatReport:
    """A folder against its own conversion."""
    lconvert.convert(path, out, ftype="Q8_0")
    return chat.compare(lconvert.read(path), lconvert.read(out))


def test_a_good_artifact(source: Model, good: Path) -> None:
    report = chat.compare(source, lconvert.read(good))
    assert report.equal and not report.different and not report.skipped and not report.notes
    names = [c.name for c in conversations()]
    assert len(names) == len(set(names)) >= 20
    assert report.conversations == 2 * len(names) - 1, "two renderers, and one service of transformers alone"
    assert [name for name, _, _ in report.rows()] == [
        "chat template", "bos", "eos", "ends of text", "bos and eos around a text",
    ]  # fmt: skip
    assert all(passed for _, _, passed in report.rows())


def test_the_reference_is_apply_chat_template(source: Model) -> None:
    from transformers import AutoTokenizer

    side = folder_side(source)
    auto = AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": "system", "content": " S "}, {"role": "user", "content": "Größe"}]
    conversation = Conversation("x", tuple(messages))
    rendered = side.renderers["transformers"](side.templates["default"], side.tokens, conversation)
    assert rendered.text == auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    wanted = auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(side.encode(rendered.text)) == wanted


def test_real_templates(tmp_path: Path) -> None:
    """The templates that llama.cpp tests itself with, all of them in one file."""
    found = sorted((source_folder() / "models" / "templates").glob("*.jinja"))
    if not found:
        pytest.skip("llama.cpp's templates not found (set LCONVERT_LLAMACPP_SRC)")
    texts = {f"t{i}": p.read_text(encoding="utf-8") for i, p in enumerate(found)}
    report = proof(
        folder(tmp_path / "m", (DEMO / "chat_template.jinja").read_text(), **texts), tmp_path / "m.gguf"
    )
    assert report.different == 0 and report.equal, report.differences
    assert len(report.templates) == len(found) + 1
    assert report.conversations == len(report.templates) * (2 * len(conversations()) - 1)
    assert 0 < report.refused < report.conversations / 3, "some refuse, for example, an unknown role"


# --- faults ----------------------------------------------------------------------------------------------


def _bytes(old: bytes, new: bytes) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        data = path.read_bytes()
        assert data.count(old) == 1 and len(old) == len(new)
        path.write_bytes(data.replace(old, new))

    return plant


def _key(name: str, value: int) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        reader = gguf.GGUFReader(path, "r+")
        reader.fields[name].parts[-1][:] = value

    return plant


FAULTS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "one space": (_bytes(b"'<|eot_id|>'", b"'<|eot_id|> "[:-2] + b" '"), {"chat template"}),
    "trim lost": (_bytes(b"message['content'] | trim +", b"message['content']        +"), {"chat template"}),
    "syntax": (_bytes(b"{%- endfor %}", b"{%- endfor %%"), {"chat template"}),
    "generation prompt": (
        _bytes(b"if add_generation_prompt", b"if not true             "),
        {"chat template"},
    ),
    "bos": (_key("tokenizer.ggml.bos_token_id", 2041), {"chat template", "bos", "bos and eos around a text"}),
    "eos": (_key("tokenizer.ggml.eos_token_id", 7), {"eos"}),
    "bos not added": (_key("tokenizer.ggml.add_bos_token", 0), {"bos and eos around a text"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(good: Path, source: Model, tmp_path: Path, fault: str) -> None:
    path = Path(shutil.copy(good, tmp_path))
    plant, rows = FAULTS[fault]
    plant(path)
    report = chat.compare(source, lconvert.read(path))
    assert not report.equal
    assert {name for name, _, passed in report.rows() if not passed} == rows
    if "chat template" in rows:
        assert report.different and report.differences[0].expected != report.differences[0].found
    json.dumps(report.to_json())


def test_templates_that_are_missing(source: Model, good: Path, tmp_path: Path) -> None:
    assert source.tokenizer is not None
    named = replace(source, tokenizer=replace(source.tokenizer, extra_templates={"tool_use": "{{ tools }}"}))
    lconvert.convert(named, tmp_path / "more.gguf", ftype="Q8_0")
    report = chat.compare(source, lconvert.read(tmp_path / "more.gguf"))
    [difference] = report.differences
    assert report.different == 1 and vars(difference) == {
        "conversation": "template tool_use",
        "expected": "no template",
        "found": "a template of 11 characters",
    }
    none = replace(source, tokenizer=replace(source.tokenizer, chat_template=None))
    lconvert.convert(none, tmp_path / "none.gguf", ftype="Q8_0")
    report = chat.compare(source, lconvert.read(tmp_path / "none.gguf"))
    assert report.different == report.conversations == 1 and report.differences[0].found == "no template"
    report = chat.compare(lconvert.read(folder(tmp_path / "m", None)), lconvert.read(tmp_path / "none.gguf"))
    assert report.equal and report.conversations == 0
    assert report.notes == ("neither side has a chat template",)
    assert "chat template" not in [name for name, _, _ in report.rows()]


def test_ends_that_only_the_source_knows(tmp_path: Path, good: Path) -> None:
    path = folder(tmp_path / "m", (DEMO / "chat_template.jinja").read_text())
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2043, 100, 101]}))
    report = chat.compare(lconvert.read(path), lconvert.read(good))
    [row] = [s for s in report.stops if not s.equal]
    assert (row.name, row.expected) == ("ends of text", (100, 101, 2043))
    assert ("ends of text", "[2043, 2046] instead of [100, 101, 2043]", False) in report.rows()
    assert "the artifact's runtime also stops at [2046]" in report.notes


# --- renderings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}",
        "{{ tools | tojson(indent=2) }}{{ messages | tojson }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
        "{{ nothing.of.this }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_templates_of_every_kind_survive(template: str, tmp_path: Path) -> None:
    report = proof(folder(tmp_path / "m", template), tmp_path / "m.gguf")
    assert report.equal, report.differences
    if "never" in template:
        assert report.refused == report.conversations
        assert report.notes == ("the template default refuses every conversation",)


def test_a_template_that_raises_on_one_side_only(source: Model, good: Path) -> None:
    a = folder_side(source)
    b = gguf_side(good)
    refusing = replace(b, templates={"default": "{{ raise_exception('no roles here') }}"})
    report = chat.compare_sides(a, refusing)
    b.close()
    assert report.different == report.conversations
    assert report.differences[0].found == "raises: no roles here"
    assert len(report.differences) == 10, "the report shows some of them"


def test_a_template_that_needs_a_token_llama_cpp_does_not_pass(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "{{ pad_token }}{{ messages[0]['content'] }}")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|eot_id|>"}))
    report = proof(path, tmp_path / "m.gguf")
    assert report.different == report.conversations - report.refused
    assert report.differences[0].expected.startswith("<|eot_id|>")


# --- sources and artifacts of other kinds ----------------------------------------------------------------


def test_a_folder_as_artifact_and_a_gguf_as_source(source: Model, good: Path) -> None:
    report = chat.compare(source, source)
    assert report.equal and report.conversations == len(conversations())
    artifact = lconvert.read(good)
    report = chat.compare(artifact, artifact)
    assert report.equal and report.conversations == 2 * len(conversations()) - 1


def test_without_tokenizers_nothing_is_compared(source: Model) -> None:
    bare = replace(source, tokenizer=None)
    assert chat.compare(bare, source).notes == ("the source has no tokenizer",)
    assert not chat.compare(bare, source).rows()
    report = chat.compare(source, bare)
    assert not report.equal and report.differences == (chat.Difference("tokenizer", "a tokenizer", "none"),)


def test_a_folder_whose_tokenizer_transformers_refuses(good: Path, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", (DEMO / "chat_template.jinja").read_text())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": 7}))
    report = chat.compare(lconvert.read(path), lconvert.read(good))
    assert report.equal and report.conversations > 20
    assert report.notes[0].startswith("chat: transformers cannot load the tokenizer (")
