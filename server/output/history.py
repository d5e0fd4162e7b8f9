"""Conversations with tool calls, results and reasoning, as a model's chat template wants them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import jinja2

from server.output.prompt import generic_tool_prompt
from server.output.tools import openai_tool

Message = dict[str, Any]

# Jinja's own errors, and plain ones from templates written in Python.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
_PROBE = "vecinfer_probe"
_LONG_ID = "call_0123456789abcdef01234567"


@dataclass(frozen=True)
class CallForm:
    """How a template takes the calls of an assistant's message.

    Attributes:
        has_objects: arguments as objects; else as JSON text.
        has_short_ids: ids of nine letters and digits (Mistral).
        has_single_calls: one call a message (Llama); several become several messages.
    """

    has_objects: bool
    has_short_ids: bool = False
    has_single_calls: bool = False


@dataclass(frozen=True)
class TemplateUse:
    """What a chat template does with tools.

    Attributes:
        tools: it renders the tools given to it.
        calls: how it takes calls and their results; None: it does not, and they are told in the messages' text.
    """

    tools: bool
    calls: CallForm | None


@dataclass(frozen=True)
class TemplateInput:
    """Arguments of `apply_chat_template`; `tools` is None where there are none or the messages tell them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def template_supports_tools(tokenizer: Any) -> bool:
    """Whether the chat template renders tools (found by rendering one, once for each tokenizer)."""
    return template_use(tokenizer).tools


@lru_cache(maxsize=4)
def template_use(tokenizer: Any) -> TemplateUse:
    """What the tokenizer's template does with tools, found by rendering a few short conversations."""
    tool = openai_tool({"name": _PROBE, "description": "A test.", "parameters": {"type": "object", "properties": {}}})
    tools = [tool]
    rendered = _render(tokenizer, [{"role": "user", "content": "Hi"}], tools)
    if _PROBE not in rendered:
        return TemplateUse(False, None)
    forms = (CallForm(*flags) for flags in product((True, False), (False, True), (False, True)))
    ordered = sorted(forms, key=lambda f: (f.has_single_calls, f.has_short_ids, not f.has_objects))
    return TemplateUse(True, next((form for form in ordered if _takes(tokenizer, form, tools)), None))


def template_input(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Iterable[Any] = ()) -> TemplateInput:
    """Messages in OpenAI's form, with their tools, for the tokenizer's template.

    Args:
        tokenizer: mlx-lm's wrapper.
        messages: roles system, developer, user, assistant, tool, function; content a string, text parts or None;
            `tool_calls` or `function_call`; `reasoning_content` or `reasoning`.
        tools: names or specifications; none are told to the model if empty.
    """
    specs = [openai_tool(tool) for tool in tools]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    plain = _with_results_named([_plain(message, template) for message in messages])
    has_history = any(m["role"] == "tool" or "tool_calls" in m for m in plain)
    if not specs and not has_history:
        return TemplateInput(plain)
    use = template_use(tokenizer)
    if has_history and use.calls is None:
        plain = _told_in_text(plain)
    elif use.calls is not None:
        plain = _formed(plain, use.calls, has_kimi_ids="<|tool_calls_section_begin|>" in template)
    if specs and not use.tools:
        return TemplateInput(_with_system(plain, generic_tool_prompt(specs)))
    return TemplateInput(plain, specs or None)


def content_text(content: Any) -> str:
    """Text of a message: of its text parts, "" for none."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


def _takes(tokenizer: Any, form: CallForm, tools: list[dict[str, Any]]) -> bool:
    """Whether calls in this form come out as JSON or tags, with all arguments and results."""
    functions = [{"name": _PROBE, "arguments": json.dumps({f"{_PROBE}_key{i}": f"{_PROBE}_value{i}"})} for i in (0, 1)]
    calls = [{"id": _LONG_ID[:-1] + str(i), "type": "function", "function": f} for i, f in enumerate(functions)]
    results: list[Message] = [
        {"role": "tool", "tool_call_id": call["id"], "name": _PROBE, "content": f"{_PROBE}_result{i}"}
        for i, call in enumerate(calls)
    ]
    asked: list[Message] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    rendered = _render(tokenizer, _formed([*asked, *results], form), tools)
    wanted = (f"{_PROBE}_{what}{i}" for what in ("key", "value", "result") for i in (0, 1))
    # An object printed by Python, or JSON quoted twice, is not what the model learnt.
    spoilt = (f"{{'{_PROBE}_key", f'\\"{_PROBE}_key')
    return all(text in rendered for text in wanted) and not any(text in rendered for text in spoilt)


def _render(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]]) -> str:
    """The template's text; "" where it refuses."""
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))
    except _TEMPLATE_ERRORS:
        return ""


def _plain(message: Mapping[str, Any], template: str) -> Message:
    """One message with today's fields, content as text, and nothing that says None."""
    role = str(message["role"])
    if role == "developer" and "developer" not in template:
        role = "system"
    out: Message = {"role": "tool" if role == "function" else role, "content": content_text(message.get("content"))}
    out |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    calls = list(message.get("tool_calls") or ())
    if message.get("function_call"):
        calls.append({"id": f"call_{message['function_call']['name']}", "function": message["function_call"]})
    if calls:
        out["tool_calls"] = [
            {"id": call.get("id") or f"call_{i}", "type": "function", "function": dict(call["function"])}
            for i, call in enumerate(calls)
        ]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if role == "assistant" and isinstance(reasoning, str):
        _add_reasoning(out, reasoning, template)
    return out


def _add_reasoning(message: Message, reasoning: str, template: str) -> None:
    """Under the key that the template reads. gpt-oss's takes either thinking or content beside calls."""
    if "<|channel|>" not in template:
        message["reasoning_content"] = reasoning
        return
    if message.get("tool_calls") and message["content"]:
        reasoning = f"{reasoning}\n\n{message['content']}"
        message["content"] = ""
    message["thinking"] = reasoning


def _with_results_named(messages: list[Message]) -> list[Message]:
    """Every result with the id and name of its call; without an id it answers the first open call."""
    names: dict[str, str] = {}
    open_ids: list[str] = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
            open_ids.append(call["id"])
        if message["role"] == "tool":
            call_id = message.get("tool_call_id") or next(iter(open_ids), None)
            if call_id in open_ids:
                open_ids.remove(call_id)
            if call_id is not None:
                message["tool_call_id"] = call_id
                message.setdefault("name", names.get(call_id, call_id))
    return messages


def _formed(messages: Sequence[Message], form: CallForm, *, has_kimi_ids: bool = False) -> list[Message]:
    """Calls and results as the form has them."""
    ids: dict[str, str] = {}
    out: list[Message] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if has_kimi_ids:
                ids[call["id"]] = f"functions.{function['name']}:{len(ids)}"
            elif form.has_short_ids:
                ids[call["id"]] = hashlib.sha256(call["id"].encode()).hexdigest()[:9]
            arguments = _arguments(function.get("arguments"), as_object=form.has_objects)
            calls.append(
                {**call, "id": ids.get(call["id"], call["id"]), "function": {**function, "arguments": arguments}}
            )
        message = {**message, "tool_calls": calls} if calls else dict(message)
        if message.get("tool_call_id") in ids:
            message["tool_call_id"] = ids[message["tool_call_id"]]
        out.append(message)
    return _one_call_each(out) if form.has_single_calls else out


def _one_call_each(messages: list[Message]) -> list[Message]:
    """Each call in a message of its own, its result behind it."""
    results = {m["tool_call_id"]: m for m in messages if m["role"] == "tool" and "tool_call_id" in m}
    out: list[Message] = []
    moved: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            out += [] if message.get("tool_call_id") in moved else [message]
            continue
        for i, call in enumerate(calls):
            out.append({**message, "content": "" if i else message["content"], "tool_calls": [call]})
            if call["id"] in results:
                out.append(results[call["id"]])
                moved.add(call["id"])
    return out


def _arguments(arguments: Any, *, as_object: bool) -> Any:
    """As an object or as text. Text that is no object (a broken call that is sent back) is one's member "raw"."""
    if isinstance(arguments, Mapping):
        return dict(arguments) if as_object else json.dumps(arguments, ensure_ascii=False)
    text = str(arguments or "{}")
    if not as_object:
        return text
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        loaded = None
    return loaded if isinstance(loaded, dict) else {"raw": text}


def _told_in_text(messages: Sequence[Message]) -> list[Message]:
    """Calls as `<tool_call>` text of the assistant, results as `<tool_response>` text of the user."""
    out: list[Message] = []
    after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        text = message["content"]
        if is_result:
            text = f"<tool_response>\n{text}\n</tool_response>"
        for call in message.get("tool_calls", ()):
            arguments = _arguments(call["function"].get("arguments"), as_object=True)
            told = json.dumps({"name": call["function"]["name"], "arguments": arguments}, ensure_ascii=False)
            text += ("\n" if text else "") + f"<tool_call>\n{told}\n</tool_call>"
        role = "user" if is_result else message["role"]
        # Templates that want roles to alternate see one user's message.
        if after_result and role == "user":
            out[-1]["content"] += f"\n{text}"
        else:
            kept = {k: v for k, v in message.items() if k in ("reasoning_content", "thinking")}
            out.append({"role": role, "content": text, **kept})
        after_result = is_result
    return out


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The text behind the system message, or as one."""
    if messages and messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".lstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
