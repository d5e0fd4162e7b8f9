"""From conversations or text to token ids, on a thread of its own so that a long prompt holds nobody up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jinja2

from server.errors import BadRequestError, ContextLengthError
from server.model.conversation import Conversation, Json, TextPrompt, Thinking
from server.model.fair_thread import FairThread, Slices
from server.output.history import template_input

T = TypeVar("T")

# Message ends worth a snapshot besides the system message's: the latest ones, which the next turn shares.
NUM_RECENT_BOUNDARIES = 3
# No tokenizer makes tokens longer than this on average; a longer text is refused without being tokenised.
MAX_CHARS_PER_TOKEN = 128
# Longer texts are counted piece by piece until they fit no more, before they are tokenised as a whole.
PIECE_CHARS = 32_768
# A context's worth of text and more has so many characters a token, seldom fewer.
SURE_CHARS_PER_TOKEN = 4
# What templates raise: Jinja's own errors, and plain ones from templates written in Python.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
    RecursionError, MemoryError,
)  # fmt: skip
# Of a conversation that the template refuses, so many beginnings are tried to name the message.
MAX_TRIED_MESSAGES = 64


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids, and the positions where a message ends (ascending, inside the prompt).

    `text` is what was tokenised, empty for prompts that came as token ids.
    """

    ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    text: str = ""


class PromptBuilder:
    """The one user of the tokenizer's encode and chat template (tokenizers are not thread-safe)."""

    def __init__(self, tokenizer: Callable[[], Any]) -> None:
        """`tokenizer` is asked for at each use: the model may still be loading when the server starts."""
        self._tokenizer = tokenizer
        self._thread = FairThread("tokenizer")

    @property
    def num_waiting(self) -> int:
        """Works that have not ended."""
        return self._thread.num_waiting

    async def run(self, work: Callable[[Any], Slices[T]], *, caller: str = "", size: int = 0) -> T:
        """The result of `work(tokenizer)`, in slices on the tokenizer's thread; see `FairThread.run`."""

        def slices() -> Slices[T]:
            return (yield from work(self._tokenizer()))

        return await self._thread.run(slices(), caller=caller, size=size)

    def close(self) -> None:
        """End the thread; what has not ended fails."""
        self._thread.close()


def vocab_size(tokenizer: Any) -> int:
    """Token ids are below this."""
    return len(tokenizer)


def chat_prompt(tokenizer: Any, conversation: Conversation, context_len: int) -> Slices[TokenizedPrompt]:
    """The conversation through the chat template, ready for the assistant's answer.

    Raises:
        BadRequestError: no template, or the template refuses these messages.
        ContextLengthError: more text than the context can hold.
    """
    if conversation.chat_template is None and not tokenizer.has_chat_template:
        raise BadRequestError("this model has no chat template; use /v1/completions", param=conversation.param)
    text = yield from render(tokenizer, conversation)
    ids = yield from encoded(tokenizer, text, context_len, conversation.param, add_special_tokens=False)
    yield
    return TokenizedPrompt(ids, (yield from _boundaries(tokenizer, conversation, text, ids)), text)


def text_prompt(tokenizer: Any, prompt: TextPrompt, context_len: int) -> Slices[TokenizedPrompt]:
    """A text (special tokens added as the model expects them), or token ids checked against the vocabulary.

    Raises:
        BadRequestError: an id outside the vocabulary, or no token at all.
        ContextLengthError: more than the context can hold.
    """
    if isinstance(prompt, str):
        ids = yield from encoded(tokenizer, prompt, context_len, "prompt", add_special_tokens=True)
        text = prompt
    else:
        ids, text = prompt, ""
        check_num_ids(len(ids), context_len)
        wrong = next(
            (i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < vocab_size(tokenizer)), None
        )
        if wrong is not None:
            raise BadRequestError(
                f"prompt: {wrong} is not a token id of this model (0-{vocab_size(tokenizer) - 1})", param="prompt"
            )
    if not ids:
        raise BadRequestError("prompt: it has no tokens", param="prompt")
    return TokenizedPrompt(ids, text=text)


def render(tokenizer: Any, conversation: Conversation) -> Slices[str]:
    """The template's text.

    Raises:
        BadRequestError: the template refuses these messages (roles must alternate, for one); it names the message.
    """
    try:
        return _rendered(tokenizer, conversation)
    except TEMPLATE_ERRORS as error:
        at = yield from _refused_message(tokenizer, conversation)
        place = f" at {conversation.param}[{at}]" if at is not None else ""
        # What a template says is for callers; what Python says of one written in it is not.
        said = f": {error}" if isinstance(error, jinja2.TemplateError) else ""
        message = f"the model's chat template refuses these messages{place}{said}"
        raise BadRequestError(message, param=conversation.param) from error


def _rendered(tokenizer: Any, conversation: Conversation) -> str:
    """As given; where the template refuses that, with messages merged as strict templates want them."""
    try:
        return _applied(tokenizer, conversation)
    except TEMPLATE_ERRORS:
        merged = merged_messages(conversation.messages)
        if merged == conversation.messages:
            raise
        return _applied(tokenizer, replace(conversation, messages=merged))


def _applied(tokenizer: Any, conversation: Conversation) -> str:
    found = template_input(tokenizer, conversation.messages, [t.to_wire() for t in conversation.offered_tools])
    given: Json = {**_thinking_variables(conversation.thinking), **conversation.template_kwargs}
    if conversation.chat_template is not None:
        given["chat_template"] = conversation.chat_template
    if found.tools:
        given["tools"] = found.tools
    if conversation.continue_last:
        given["continue_final_message"] = True
    given |= {"tokenize": False, "add_generation_prompt": conversation.generation_prompt}
    return str(tokenizer.apply_chat_template(found.messages, **given))


def _thinking_variables(thinking: Thinking) -> Json:
    """What templates call it: Qwen and GLM `enable_thinking`, DeepSeek and Granite `thinking`, gpt-oss its effort."""
    variables: Json = {}
    if thinking.enabled is not None:
        variables |= {"enable_thinking": thinking.enabled, "thinking": thinking.enabled}
    if thinking.effort is not None:
        variables["reasoning_effort"] = thinking.effort
    return variables


def merged_messages(messages: tuple[Json, ...]) -> tuple[Json, ...]:
    """One system message, at the start, and no two plain messages of the user one after the other."""
    system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system" and m["content"])
    merged: list[Json] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        if message["role"] == "system":
            continue
        if merged and message["role"] == merged[-1]["role"] == "user":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return tuple(merged)


def _refused_message(tokenizer: Any, conversation: Conversation) -> Slices[int | None]:
    """The last message of the shortest beginning that the template refuses."""
    if len(conversation.messages) > MAX_TRIED_MESSAGES:
        return None
    for end in range(1, len(conversation.messages) + 1):
        yield
        try:
            _rendered(tokenizer, _beginning(conversation, end))
        except TEMPLATE_ERRORS:
            return end - 1
    return None


def encoded(
    tokenizer: Any, text: str, context_len: int, param: str, *, add_special_tokens: bool
) -> Slices[tuple[int, ...]]:
    """The text's token ids.

    Raises:
        ContextLengthError: more text than the context can hold, told after reading a context's worth of it.
    """
    yield from check_fits(tokenizer, text, context_len, param)
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def check_fits(tokenizer: Any, text: str, context_len: int, param: str) -> Slices[None]:
    """Count a long text's tokens piece by piece until they are more than the context holds.

    Raises:
        ContextLengthError: they are.
    """
    check_text_len(len(text), context_len, param)
    if len(text) <= max(PIECE_CHARS, SURE_CHARS_PER_TOKEN * context_len):
        return
    num_tokens = 0
    for start in range(0, len(text), PIECE_CHARS):
        yield
        piece = text[start : start + PIECE_CHARS]
        # A cut makes more tokens of those at its two sides.
        num_tokens += max(0, len(tokenizer.encode(piece, add_special_tokens=False)) - MAX_CHARS_PER_TOKEN)
        if num_tokens > context_len:
            raise ContextLengthError(
                f"this model's context is {context_len} tokens, but the first {start + len(piece)} of the prompt's "
                f"{len(text)} characters have more; shorten the {param}",
                param=param,
            )
    yield


def check_text_len(num_chars: int, context_len: int, param: str) -> int:
    """`num_chars`, when so much text may fit.

    Raises:
        ContextLengthError: it cannot, whatever it says.
    """
    if num_chars > MAX_CHARS_PER_TOKEN * context_len:
        raise ContextLengthError(
            f"a prompt of {num_chars} characters cannot fit this model's context of {context_len} tokens", param=param
        )
    return num_chars


def check_num_ids(num_ids: int, context_len: int) -> None:
    """Refuse more token ids than the context holds, before they are looked at.

    Raises:
        ContextLengthError: they are more.
    """
    if num_ids > context_len:
        raise ContextLengthError(
            f"this model's context is {context_len} tokens, but the prompt has {num_ids}; shorten it", param="prompt"
        )


def _beginning(conversation: Conversation, end: int) -> Conversation:
    """The first `end` messages, without an opened answer."""
    return replace(conversation, messages=conversation.messages[:end], generation_prompt=False, continue_last=False)


def _boundaries(tokenizer: Any, conversation: Conversation, text: str, ids: tuple[int, ...]) -> Slices[tuple[int, ...]]:
    """Positions up to which `ids` says only what some first messages say: other prompts may share them."""
    messages = conversation.messages
    num_system = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    recent = range(max(num_system + 1, len(messages) - NUM_RECENT_BOUNDARIES), len(messages))
    prefixes = [_system_prefix(tokenizer, conversation, num_system, text)] if num_system else []
    prefixes += [_prefix(tokenizer, _beginning(conversation, end), text) for end in recent]
    ends: set[int] = set()
    for prefix in filter(None, prefixes):
        yield
        ends.add(_shared_len(tokenizer, prefix, ids))
    return tuple(sorted(end for end in ends if 0 < end < len(ids)))


def _prefix(tokenizer: Any, beginning: Conversation, text: str) -> str:
    """The first messages' text where the whole text starts with it, else nothing."""
    try:
        prefix = _rendered(tokenizer, beginning)
    except TEMPLATE_ERRORS:
        return ""
    return prefix if text.startswith(prefix) else ""


def _system_prefix(tokenizer: Any, conversation: Conversation, num_system: int, text: str) -> str:
    """What precedes the first user's words, also where a template refuses a lone system message or merges it."""
    messages = conversation.messages
    prefix = _prefix(tokenizer, _beginning(conversation, num_system), text)
    if str(messages[num_system - 1]["content"]).strip() in prefix or num_system == len(messages):
        return prefix
    given = str(messages[num_system]["content"] or "")
    other = {**messages[num_system], "content": "b" if given.startswith("a") else "a"}
    variant = replace(_beginning(conversation, num_system), messages=(*messages[:num_system], other))
    try:
        rendered = _rendered(tokenizer, variant)
    except TEMPLATE_ERRORS:
        return ""
    return text[: _common_len(text, rendered)]


def _shared_len(tokenizer: Any, prefix: str, ids: tuple[int, ...]) -> int:
    """Leading tokens of the whole prompt that the prefix alone also starts with."""
    return _common_len(tokenizer.encode(prefix, add_special_tokens=False), ids)


def _common_len(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
