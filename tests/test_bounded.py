"""Chat templates that would never end, or take all memory, end in a refusal and leave no process behind."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from lconvert.validators import bounded
from lconvert.validators.bounded import Bounded
from lconvert.validators.chat_sides import Rendered, _by_transformers
from lconvert.validators.conversations import Conversation, conversations, user

pytest.importorskip("transformers", reason="transformers is not installed")

TALK = Conversation("one", (user("Hello."),))
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"


def children() -> set[str]:
    found = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(found.read_text().split()) if found.exists() else set()


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10**(10**9) }}"], ids=["loops", "one operation"])
def test_a_template_that_does_not_end_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    before = children()
    with Bounded([_by_transformers], [TALK]) as render:
        start = time.monotonic()
        assert render(0, template, {}, 0) == Rendered(None, "takes longer than 1 s")
        assert time.monotonic() - start < 5
        start = time.monotonic()
        assert render(0, template, {}, 0).text is None
        assert time.monotonic() - start < 0.5, "it is not tried again"
        assert render(0, "{{ messages[0].content }}", {}, 0).text == "Hello.", "other templates go on"
    assert children() == before


def test_a_template_that_makes_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LARGEST", 1000)
    with Bounded([_by_transformers], [TALK]) as render:
        assert render(0, "{{ 'x' * 1001 }}", {}, 0).error == "makes a text of 1001 characters"
        assert render(0, "x" * 1001, {}, 0).error == "a template of 1001 characters"
        assert render(0, "{{ 'x' * 1000 }}", {}, 0).text == "x" * 1000
        if Path("/proc/self/statm").exists():
            assert render(0, "{{ 'x' * (10**11) }}", {}, 0).error == "MemoryError"


def test_a_renderer_that_dies_is_a_refusal() -> None:
    def dies(template: str, tokens: Mapping[str, str], c: Conversation) -> Rendered:
        os._exit(3)

    with Bounded([dies, _by_transformers], [TALK]) as render:
        assert render(0, "a", {}, 0) == Rendered(None, "ends the renderer")
        assert render(1, "a", {}, 0).text == "a"


def test_renderings_are_what_they_are_without_it() -> None:
    template = (
        "{{ bos_token }}{{ tools | tojson }}{% for m in messages %}{{ m.content }}\udc80 \u2028{% endfor %}"
    )
    talks = conversations("<s>")
    with Bounded([_by_transformers], talks) as render:
        for number, talk in enumerate(talks):
            found = render(0, template, {"bos_token": "<s>"}, number)
            assert found == _by_transformers(template, {"bos_token": "<s>"}, talk)
