"""POST /v1/completions: the request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.errors import BadRequestError
from server.http.schemas.base import Neutral, one_of, refused
from server.http.schemas.generation import MAX_LOGPROBS, GenerationBody

MAX_PROMPTS = 64
Prompt = str | tuple[int, ...]


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int for v in value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, strings, token ids, or lists of token ids."""
    items = [value] if isinstance(value, str) or _is_token_list(value) else value
    if not isinstance(items, list):
        raise refused("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not 1 <= len(items) <= MAX_PROMPTS:
        raise refused(f"must hold 1 to {MAX_PROMPTS} prompts, got {len(items)}")
    prompts: list[Prompt] = []
    for i, item in enumerate(items):
        if isinstance(item, str):
            prompts.append(item)
        elif _is_token_list(item):
            prompts.append(tuple(item))
        else:
            raise refused("must be a string or a non-empty list of token ids", f"[{i}]")
    return tuple(prompts)


Prompts = Annotated[
    tuple[Prompt, ...],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionBody(GenerationBody):
    """Prompts to be continued as they are, without a chat template."""

    neutral: ClassVar[dict[str, Neutral]] = {
        **GenerationBody.neutral,
        "echo": one_of(False),
        "suffix": one_of(""),
        "best_of": one_of(1),
    }

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """The field itself."""
        return self.logprobs

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        super().check()
        if len(self.prompt) * self.n > MAX_PROMPTS:
            message = f"{len(self.prompt)} prompts with n={self.n} are more than {MAX_PROMPTS} choices"
            raise BadRequestError(message, param="n")
