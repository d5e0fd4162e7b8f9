from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest

from server.output.history import (
    CallForm,
    TemplateUse,
    content_text,
    template_input,
    template_supports_tools,
    template_use,
)
from server.output.prompt import generic_tool_prompt

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HERMES = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'tool' %}[{{ m.name }}]{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ ARGUMENTS }}</tool_call>{% endfor %}"
    "{% endfor %}"
)
OBJECT = HERMES.replace("ARGUMENTS", "c.function.arguments | tojson")
ITEMS = HERMES.replace("{{ ARGUMENTS }}", "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}")
STRING = HERMES.replace("{{ ARGUMENTS }}", "{{ '' + c.function.arguments }}")
MISTRAL = STRING.replace(
    "<tool_call>", "{% if c.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}<tool_call>{{ c.id }}"
)
LLAMA = OBJECT.replace(
    "<{{ m.role }}>",
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one!') }}{% endif %}<{{ m.role }}>",
)


class Templated:
    """A tokenizer with this template, and nothing else."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: Any, tools: Any = None, **_: Any) -> str:
        def refuse(text: str) -> None:
            raise jinja2.TemplateError(text)

        environment = jinja2.Environment()
        environment.globals["raise_exception"] = refuse
        return environment.from_string(self.chat_template).render(messages=messages, tools=tools)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call("c1", "w", '{"at": "Bonn"}'), call("c2", "w", "{}")]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    {"role": "tool", "tool_call_id": "c2", "content": "sun"},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHATML, None),
        (OBJECT, CallForm(has_objects=True)),
        (ITEMS, CallForm(has_objects=True)),
        (STRING, CallForm(has_objects=False)),
        (MISTRAL, CallForm(has_objects=False, has_short_ids=True)),
        (LLAMA, CallForm(has_objects=True, has_single_calls=True)),
    ],
)
def test_what_a_template_wants_is_found_by_rendering(template: str, form: CallForm | None) -> None:
    assert template_use(Templated(template)) == TemplateUse(form is not None, form)


def test_a_template_is_asked_only_once() -> None:
    class Counted(Templated):
        num_rendered = 0

        def apply_chat_template(self, messages: Any, tools: Any = None, **_: Any) -> str:
            self.num_rendered += 1
            return super().apply_chat_template(messages, tools)

    tokenizer = Counted(OBJECT)
    assert template_supports_tools(tokenizer)
    num_rendered = tokenizer.num_rendered
    assert template_supports_tools(tokenizer) and tokenizer.num_rendered == num_rendered


@pytest.mark.parametrize("template", [OBJECT, ITEMS, STRING, MISTRAL, LLAMA])
def test_calls_and_results_come_through_every_kind_of_template(template: str) -> None:
    tokenizer = Templated(template)
    prepared = template_input(tokenizer, WEATHER, ["w"])
    text = tokenizer.apply_chat_template(prepared.messages, prepared.tools)
    assert "None" not in text and "{'" not in text
    assert text.index("Bonn") < text.index("[w]rain") < text.index("[w]sun") < text.index("Thanks")


def test_a_template_with_one_call_a_message_gets_each_with_its_result() -> None:
    prepared = template_input(Templated(LLAMA), WEATHER, ["w"])
    assert [m["role"] for m in prepared.messages] == ["user", "assistant", "tool", "assistant", "tool", "user"]


def test_without_tools_in_the_template_calls_and_results_are_text() -> None:
    prepared = template_input(Templated(CHATML), WEATHER, ["w"])
    system, _, assistant, results = prepared.messages
    assert prepared.tools is None and system["content"] == generic_tool_prompt(["w"])
    assert assistant["content"].startswith(
        '<tool_call>\n{"name": "w", "arguments": {"at": "Bonn"}}\n</tool_call>\n<tool_'
    )
    assert results == {
        "role": "user",
        "content": "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>\nThanks",
    }


def test_the_tool_prompt_follows_a_given_system_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prepared = template_input(Templated(CHATML), messages, ["w"])
    assert prepared.messages[0]["content"].startswith("Be brief.\n\n") and len(prepared.messages) == 2


def test_plain_conversations_are_left_as_they_are() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert template_input(Templated(CHATML), messages).messages == messages


def test_legacy_function_calls_become_tool_calls() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": "{}"}},
        {"role": "function", "name": "w", "content": "rain"},
    ]
    assistant, result = template_input(Templated(OBJECT), messages).messages
    assert assistant["tool_calls"][0]["function"] == {"name": "w", "arguments": {}}
    assert (result["role"], result["tool_call_id"]) == ("tool", assistant["tool_calls"][0]["id"])


@pytest.mark.parametrize(("arguments", "meant"), [("", {}), (None, {}), ("[1", {"raw": "[1"}), ({"a": 1}, {"a": 1})])
def test_arguments_that_are_no_text_of_an_object_are_taken(arguments: Any, meant: object) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "w", "arguments": arguments}}]}]
    [assistant] = template_input(Templated(OBJECT), messages).messages
    assert assistant["tool_calls"][0]["function"]["arguments"] == meant


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_is_handed_to_the_template_under_its_name(key: str) -> None:
    message = {"role": "assistant", "content": "4", key: "2 + 2"}
    assert template_input(Templated(CHATML), [message]).messages[0]["reasoning_content"] == "2 + 2"
    assert template_input(Templated(CHATML + "<|channel|>"), [message]).messages[0]["thinking"] == "2 + 2"


def test_kimi_gets_ids_in_its_own_form() -> None:
    tokenizer = Templated(OBJECT + "{# <|tool_calls_section_begin|> #}")
    messages = template_input(tokenizer, WEATHER).messages
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["functions.w:0", "functions.w:1"]
    assert messages[3]["tool_call_id"] == "functions.w:1"


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    assert template_input(Templated(CHATML), [{"role": "developer", "content": "x"}]).messages[0]["role"] == "system"


def test_the_generic_prompt_names_each_tool_with_its_parameters() -> None:
    tool = {"type": "function", "name": "w", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
    line = next(line for line in generic_tool_prompt([tool]).splitlines() if line.startswith('{"name": "w"'))
    assert json.loads(line)["parameters"]["properties"] == {"at": {"type": "string"}}


def test_content_of_parts_is_their_text() -> None:
    assert content_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
