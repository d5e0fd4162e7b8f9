"""What a request of any API comes down to: pure data between the bodies and the engine's requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.engine.request import SamplingParams
from server.model.conversation import Conversation, TextPrompt


@dataclass(frozen=True)
class ResponseFormat:
    """What the answer's content must be.

    Attributes:
        kind: json_object; json_schema; regex; choice; grammar (Lark or GBNF).
        value: the schema, expression or grammar as text; for choice, a JSON list of texts.
        strict: whether properties that the schema does not name are refused.
        param: the field it came from, for errors.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: str = ""
    strict: bool = False
    param: str = "response_format"


@dataclass(frozen=True)
class GenerationSpec:
    """One HTTP request for generated text, whatever API it came by.

    Attributes:
        prompts: a conversation, or texts to continue.
        sampling: token ids in it are not yet checked against the vocabulary.
        max_tokens: None leaves it to the server; 0 only reads the prompt.
        n: choices per prompt.
        cache_salt: only requests with the same one share cached beginnings.
        priority: lower is earlier; below 0 for who administers the server.
    """

    prompts: Conversation | tuple[TextPrompt, ...]
    sampling: SamplingParams
    model: str | None = None
    stream: bool = False
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    stop_in_reasoning: bool = False
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    cache_salt: str | None = None
    priority: int = 0
