"""Fields that chat and text completions share."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from server.engine.request import SamplingParams
from server.errors import BadRequestError
from server.http.generation_spec import ResponseFormat
from server.http.schemas.base import RequestBody, clip, note_ignored, refused, whole_numbers
from server.http.schemas.described import BIASES, FORMAT, stops_schema
from server.http.schemas.structured import other_formats, response_format

MAX_CHOICES = 16
MAX_STOPS = 64
MAX_LOGPROBS = 20
MAX_TOKENS_LIMIT = 2**31 - 1
MAX_TEMPERATURE = 2.0
# BatchGenerator's samplers read top_p 0 as "off"; OpenAI means "the most likely token only".
MIN_TOP_P = 1e-6
# Ollama's names inside `options`.
OPTION_NAMES = {
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    **{
        name: name
        for name in (
            "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty",
        )
    },
}  # fmt: skip


def _stops(value: Any) -> tuple[str, ...]:
    """A string or a list of them; empty ones say nothing."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise refused("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise refused(f"at most {MAX_STOPS} stop strings")
    return tuple(s for s in stops if s)


def _biases(value: Any) -> Any:
    """OpenAI's object, or llama-server's list of pairs."""
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return {str(whole_numbers(token)): -100.0 if bias is False else bias for token, bias in value}
    return value


Stops = Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(stops_schema(MAX_STOPS))]
MAX_PRIORITY = 10
# Turns: each step doubles or halves what a request's tokens count in its caller's share.
Priority = Annotated[int, AfterValidator(lambda n: max(-MAX_PRIORITY, min(n, MAX_PRIORITY)))]
CacheSalt = Annotated[str | None, Field(min_length=1, max_length=256)]
Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases), WithJsonSchema(BIASES)
]
MaxTokens = Annotated[int, Field(ge=-1, le=MAX_TOKENS_LIMIT)]


def _some(number: int) -> int:
    if number == 0:
        raise refused("must be at least 1, or -1 for no limit")
    return number


SomeTokens = Annotated[
    MaxTokens,
    AfterValidator(_some),
    WithJsonSchema({"type": "integer", "minimum": -1, "maximum": MAX_TOKENS_LIMIT, "not": {"const": 0}}),
]
Format = Annotated[ResponseFormat | None, BeforeValidator(response_format), WithJsonSchema(FORMAT)]


class StreamOptions(RequestBody):
    """What a stream carries besides the text."""

    silent: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(RequestBody):
    """How a prompt is continued. Defaults are OpenAI's; the fields that OpenAI does not have are those of vLLM."""

    silent: ClassVar[frozenset[str]] = frozenset(
        {
            "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
            "store", "cache_prompt", "keep_alive", "prediction", "verbosity", "request_id", "id_slot",
            "timings_per_token", "return_progress",
        }
    )  # fmt: skip
    aliases: ClassVar[dict[str, str]] = {
        "repeat_penalty": "repetition_penalty",
        "n_predict": "max_tokens",
        "max_new_tokens": "max_tokens",
    }

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS_LIMIT)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Biases = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stops = ()
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)]] = Field(
        default_factory=list, max_length=MAX_STOPS
    )
    include_stop_str_in_output: bool = False
    max_tokens: MaxTokens | None = None
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS_LIMIT)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    response_format: Format = None
    cache_salt: CacheSalt = None
    priority: Priority = 0

    @model_validator(mode="before")
    @classmethod
    def _other_servers_fields(cls, data: Any) -> Any:
        """Ollama's `options`, and the fields by which other servers hold an answer to a form."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        options = data.pop("options", None)
        if isinstance(options, dict):
            for name, value in options.items():
                if name in OPTION_NAMES:
                    data.setdefault(OPTION_NAMES[name], value)
                else:
                    note_ignored(f"options.{name}")
        made = other_formats(data)
        if made is not None and data.get("response_format") is None:
            data["response_format"] = made
        return data

    @property
    def requested_tokens(self) -> int | None:
        """The caller's limit on generated tokens, None when left to the server."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability; None: none at all."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk says the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """

    def sampling(self) -> SamplingParams:
        """The engine's form; token ids are not checked against the vocabulary.

        Raises:
            BadRequestError: a logit_bias key is no token id.
        """
        return SamplingParams(
            temperature=min(self.temperature, MAX_TEMPERATURE),
            top_p=max(self.top_p, MIN_TOP_P),
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={_token_id(key): bias for key, bias in self.logit_bias.items()},
            # Not negative, and seed + choice index stays within the random key's 64 bits.
            seed=None if self.seed is None else self.seed % 2**63,
            num_logprobs=self.num_logprobs,
            allow_eos=not self.ignore_eos,
            min_tokens=self.min_tokens,
        )


def _token_id(key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", key):
        message = f"logit_bias: '{clip(key)}' is not a token id"
        raise BadRequestError(message, param="logit_bias", code="invalid_value")
    return int(key)
