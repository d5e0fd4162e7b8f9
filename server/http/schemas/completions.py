"""POST /v1/completions: the request."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.http.generation_spec import GenerationSpec
from server.http.schemas.base import refused
from server.http.schemas.described import prompts_schema
from server.http.schemas.generation import MAX_CHOICES, MAX_LOGPROBS, GenerationBody
from server.model.conversation import TextPrompt

MAX_PROMPTS = 64


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int for v in value)


def prompts(value: Any, max_prompts: int = MAX_PROMPTS) -> tuple[TextPrompt, ...]:
    """A string, strings, token ids, or lists of token ids."""
    items = [value] if isinstance(value, str) or _is_token_list(value) else value
    if not isinstance(items, list):
        raise refused("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not 1 <= len(items) <= max_prompts:
        raise refused(f"must hold 1 to {max_prompts} prompts, got {len(items)}")
    found: list[TextPrompt] = []
    for i, item in enumerate(items):
        if isinstance(item, str):
            found.append(item)
        elif _is_token_list(item):
            found.append(tuple(item))
        else:
            raise refused("must be a string or a non-empty list of token ids", f"[{i}]")
    return tuple(found)


Prompts = Annotated[tuple[TextPrompt, ...], BeforeValidator(prompts), WithJsonSchema(prompts_schema(MAX_PROMPTS))]


class CompletionBody(GenerationBody):
    """Prompts to be continued as they are, without a chat template."""

    prompt: Prompts
    suffix: str | None = Field(None, max_length=1_000_000)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """The field itself; choices are compared by their log-probabilities too."""
        return 0 if self.logprobs is None and self.num_choices > self.n else self.logprobs

    @property
    def num_choices(self) -> int:
        """Choices to generate for each prompt."""
        return max(self.n, self.best_of or 1)

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        super().check()
        if len(self.prompt) * self.num_choices > MAX_PROMPTS:
            message = f"{len(self.prompt)} prompts with {self.num_choices} choices each are more than {MAX_PROMPTS}"
            raise BadRequestError(message, param="n")
        if self.best_of is not None and self.best_of < self.n:
            raise BadRequestError(f"best_of ({self.best_of}) must not be less than n ({self.n})", param="best_of")
        if self.stream and self.num_choices > self.n:
            raise BadRequestError("best_of: with 'stream' it cannot be more than n", param="best_of")

    def sampling(self) -> SamplingParams:
        """The engine's form; an echoed prompt is scored when log-probabilities are asked for."""
        return replace(super().sampling(), prompt_logprobs=self.logprobs if self.echo else None)

    def spec(self) -> GenerationSpec:
        """What is asked for, whatever API it came by."""
        return GenerationSpec(
            prompts=self.prompt,
            sampling=self.sampling(),
            model=self.model,
            stream=self.stream,
            max_tokens=self.requested_tokens,
            n=self.num_choices,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            response_format=self.response_format,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )
