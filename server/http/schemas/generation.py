"""Fields that chat and text completions share."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.http.schemas.base import Neutral, RequestBody, always, clip, one_of, refused

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_TOKENS_LIMIT = 2**31 - 1
# BatchGenerator's samplers read top_p 0 as "off"; OpenAI means "the most likely token only".
MIN_TOP_P = 1e-6


def _stops(value: Any) -> tuple[str, ...]:
    """A string or a list of them."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise refused("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(stops):
        raise refused(f"at most {MAX_STOPS} stop strings, none of them empty")
    return tuple(stops)


Stops = Annotated[
    tuple[str, ...],
    BeforeValidator(_stops),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS_LIMIT)]


class StreamOptions(RequestBody):
    """What a stream carries besides the text."""

    neutral: ClassVar[dict[str, Neutral]] = {
        "include_obfuscation": always,
        "continuous_usage_stats": one_of(False),
    }
    include_usage: bool = False


class GenerationBody(RequestBody):
    """How a prompt is continued. Defaults are OpenAI's; top_k, min_p, repetition_penalty, ignore_eos are extensions."""

    neutral: ClassVar[dict[str, Neutral]] = {
        "user": always,
        "metadata": always,
        "safety_identifier": always,
        "prompt_cache_key": always,
        "prompt_cache_retention": always,
        "service_tier": one_of("auto", "default"),
        "store": one_of(False),
    }

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS_LIMIT)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stops = ()
    max_tokens: MaxTokens | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False

    @property
    def requested_tokens(self) -> int | None:
        """The caller's limit on generated tokens, None when left to the server."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability; None: none at all."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("'stream_options' is only allowed with 'stream': true", param="stream_options")

    def sampling(self, vocab_size: int) -> SamplingParams:
        """The engine's form; token ids checked against the vocabulary.

        Raises:
            BadRequestError: a logit_bias key is no token id.
        """
        return SamplingParams(
            temperature=self.temperature,
            top_p=max(self.top_p, MIN_TOP_P),
            top_k=self.top_k if 0 < self.top_k < vocab_size else 0,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self._biases(vocab_size),
            # Not negative, and seed + choice index stays within the random key's 64 bits.
            seed=None if self.seed is None else self.seed % 2**63,
            num_logprobs=self.num_logprobs,
            allow_eos=not self.ignore_eos,
        )

    def _biases(self, vocab_size: int) -> dict[int, float]:
        for key in self.logit_bias:
            if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= vocab_size:
                message = f"logit_bias: '{clip(key)}' is not a token id of this model (0-{vocab_size - 1})"
                raise BadRequestError(message, param="logit_bias", code="invalid_value")
        return {int(key): bias for key, bias in self.logit_bias.items()}
