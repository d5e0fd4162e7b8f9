"""Prompts: tokens, and the positions worth a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant_core.slices import run
from server.errors import BadRequestError
from server.model.conversation import Conversation
from server.model.conversation import Json as Message
from server.model.prompts import TokenizedPrompt, merged_messages, render
from server.model.prompts import chat_prompt as conversation_prompt
from tests.helpers.fake_tokenizer import FakeTokenizer
from tests.helpers.tiny_models import tiny_tokenizer

SYSTEM: Message = {"role": "system", "content": "You are terse."}


def chat_prompt(tokenizer: FakeTokenizer, messages: list[Message], context_len: int) -> TokenizedPrompt:
    return run(conversation_prompt(tokenizer, Conversation(tuple(messages)), context_len))


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def rendered(messages: list[Message]) -> list[int]:
    tokenizer = FakeTokenizer()
    return tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))


def test_boundaries_are_prefixes_of_the_conversation() -> None:
    messages = [SYSTEM] + [turn(role, f"{role} {i}") for i in range(4) for role in ("user", "assistant")]
    messages.append(turn("user", "last"))
    prompt = chat_prompt(FakeTokenizer(), messages, 4096)
    prefixes = [messages[:1], messages[:7], messages[:8], messages[:9]]
    assert prompt.boundaries == tuple(len(rendered(p)) for p in prefixes)
    for prefix, end in zip(prefixes, prompt.boundaries, strict=True):
        assert list(prompt.ids[:end]) == rendered(prefix)


def test_conversations_with_one_system_message_share_its_boundary() -> None:
    first, second = (
        chat_prompt(FakeTokenizer(), [SYSTEM, turn("user", text)], 4096) for text in ("\nHi", "something else")
    )
    assert first.boundaries == second.boundaries
    end = first.boundaries[0]
    assert first.ids[:end] == second.ids[:end]


def test_a_lone_user_message_has_no_boundary() -> None:
    assert chat_prompt(FakeTokenizer(), [turn("user", "hi")], 4096).boundaries == ()


class MergingTokenizer(FakeTokenizer):
    """Like Gemma's template: the system text goes into the first user turn."""

    def apply_chat_template(
        self, messages: list[Message], tokenize: bool = True, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        if messages[0]["role"] == "system":
            system, *rest = messages
            if not rest:
                raise ValueError("a user message is needed")
            messages = [{**rest[0], "content": system["content"] + "\n\n" + rest[0]["content"]}, *rest[1:]]
        return super().apply_chat_template(messages, tokenize, add_generation_prompt)


@pytest.mark.parametrize("text", ["apple", "pear"])
def test_a_system_message_merged_into_the_user_turn_is_shared(text: str) -> None:
    prompt = chat_prompt(MergingTokenizer(), [SYSTEM, turn("user", text)], 4096)
    shared = FakeTokenizer().encode("<|im_start|>user\nYou are terse.\n\n")
    assert prompt.boundaries == (len(shared),)
    assert list(prompt.ids[: len(shared)]) == shared


class ForgetfulTokenizer(FakeTokenizer):
    """Like thinking models' templates: only the last message keeps its first word."""

    def apply_chat_template(
        self, messages: list[Message], tokenize: bool = True, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        kept = [*({**m, "content": m["content"].partition(" ")[2]} for m in messages[:-1]), messages[-1]]
        return super().apply_chat_template(kept, tokenize, add_generation_prompt)


def test_a_prefix_that_the_whole_does_not_start_with_is_no_boundary() -> None:
    messages = [turn("user", "a b"), turn("assistant", "c d"), turn("user", "e f")]
    assert chat_prompt(ForgetfulTokenizer(), messages, 4096).boundaries == ()


def test_a_template_that_refuses_is_the_callers_error() -> None:
    messages = [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")]
    with pytest.raises(BadRequestError, match=r"messages\[2\].*alternate"):
        chat_prompt(FakeTokenizer(alternate=True), messages, 4096)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(messages) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 'a' * 10 ** 18 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
    ],
)
def test_a_hostile_template_does_no_more_than_be_refused(tmp_path: Path, template: str) -> None:
    """Jinja's sandbox holds it, whoever sends it."""
    conversation = Conversation((turn("user", "a"),), chat_template=template)
    with pytest.raises(BadRequestError, match="the model's chat template refuses"):
        run(render(tiny_tokenizer(tmp_path), conversation))


def test_what_a_strict_template_refuses_is_merged_for_it() -> None:
    messages = [SYSTEM, turn("user", "a"), turn("system", "now"), turn("user", "b")]
    prompt = chat_prompt(FakeTokenizer(alternate=True), messages[1:2] + messages[3:], 4096)
    assert prompt.text.count("<|im_start|>user") == 1 and "a\n\nb" in prompt.text
    assert merged_messages(tuple(messages)) == (
        {"role": "system", "content": "You are terse.\n\nnow"},
        {"role": "user", "content": "a\n\nb"},
    )
