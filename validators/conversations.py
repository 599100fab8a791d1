"""Conversations that chat templates are compared on: every shape of message that templates treat in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What `apply_chat_template` gets. continues: the last message is left open for the model to go on with."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    generation_prompt: bool = True
    continues: bool = False


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def _function(name: str, what: str, **properties: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": dict(properties), "required": sorted(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


#: Two tools: scalar, enumerated, nested and list arguments, and text that HTML escaping would change.
TOOLS = (
    _function(
        "get_weather",
        'Weather at a place, in <units> & "words".',
        city={"type": "string", "description": "The city's name, e.g. Zürich"},
        unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
    ),
    _function(
        "sum_up",
        "Adds numbers.",
        numbers={"type": "array", "items": {"type": "number"}},
        options={"type": "object", "properties": {"round": {"type": "boolean"}}},
    ),
)


def _call(number: int, name: str, **arguments: Any) -> Mapping[str, Any]:
    return {
        "id": f"call{number:05d}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _result(number: int, name: str, content: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": name, "content": content}


_CALLED = (
    user("What is the weather in Zürich?"),
    assistant("", tool_calls=[_call(1, "get_weather", city="Zürich", unit="celsius")]),
    _result(1, "get_weather", '{"temperature": 7.5, "sky": "rain & <fog>"}'),
)
#: Under both names and in the order in which transformers puts them when one is given.
_REASONED = {
    "thinking": "2 + 2 = 4.",
    "role": "assistant",
    "content": "4",
    "reasoning_content": "2 + 2 = 4.",
}
_TURNS = (user("Hello."), assistant("Hello! How can I help?"), user("Name three colours."))


def conversations(special: str = "") -> tuple[Conversation, ...]:
    """All of them; `special` is text of the tokenizer's own special tokens, to appear inside a message."""
    answer = assistant("Red, green and")
    return (
        Conversation("user", (user("Why is the sky blue?"),)),
        Conversation("user, no generation prompt", (user("Why is the sky blue?"),), generation_prompt=False),
        Conversation("system and user", (system("Be brief."), user("Why is the sky blue?"))),
        Conversation("several turns", _TURNS),
        Conversation("system and several turns", (system("You are a painter."), *_TURNS)),
        Conversation("ends with assistant", (*_TURNS, answer), generation_prompt=False),
        Conversation("assistant goes on", (*_TURNS, answer), generation_prompt=False, continues=True),
        Conversation("tools", (user("What is the weather in Zürich?"),), TOOLS),
        Conversation("system and tools", (system("Use tools."), user("Add 1 and 2.")), TOOLS),
        Conversation("tool call", _CALLED[:2], TOOLS, generation_prompt=False),
        Conversation("tool result", _CALLED, TOOLS),
        Conversation("after tools", (*_CALLED, assistant("7.5 °C, rain."), user("Thanks!")), TOOLS),
        Conversation(
            "two tool calls",
            (
                user("Both, please."),
                assistant(
                    "At once.",
                    tool_calls=[
                        _call(1, "get_weather", city="Oslo"),
                        _call(2, "sum_up", numbers=[1, 2.5, -3]),
                    ],
                ),
                _result(1, "get_weather", "snow"),
                _result(2, "sum_up", "0.5"),
            ),
            TOOLS,
        ),
        Conversation("empty contents", (system(""), user(""), assistant(""), user("?"))),
        Conversation("unicode", (user("Größe 石头记 مرحبا \u200d👩\u200d👩\u200d👧 e\u0301 \U0001f600"),)),
        Conversation(
            "whitespace", (system("\n s \n"), user("  two  \n\n\tlines \n"), assistant("\n a"), user(" "))
        ),
        Conversation("special tokens as content", (user(f"a {special}</s><|im_end|><|eot_id|>[INST] b"),)),
        Conversation(
            "markup and Jinja as content", (user("{{ 7 * 7 }} {% if x %} <b>&amp;</b> \\n \"q\" 'q'"),)
        ),
        Conversation("parts", (user([{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]),)),
        Conversation("two users in a row", (user("One."), user("Two."))),
        Conversation("assistant first", (assistant("Welcome."), user("Hello."))),
        Conversation("unknown role", ({"role": "narrator", "content": "Night fell."}, user("Go on."))),
        Conversation("reasoning", (user("2 + 2?"), _REASONED, user("3 + 3?"))),
        Conversation(
            "reasoning in the text",
            (user("2 + 2?"), assistant("<think>\nIt is 4.\n</think>\n\n4"), user("?")),
        ),
    )
