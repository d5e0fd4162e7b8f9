"""What the callers of a soak ask: every generation API, with and without streams, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal

from server.measure.load.workload import TextSource

Api = Literal["chat", "completions", "responses", "messages"]
# What becomes of a request if the server does its part: an answer, a refusal, or its caller hangs up.
Aim = Literal["answer", "refusal", "hang_up"]

PATHS: dict[Api, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "done": {"type": "boolean"}},
    "required": ["name", "done"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"done": {"type": "boolean"}}, "required": ["done"]}
NUM_BEGINNINGS = 6
MAX_ANSWER = 48


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        kind: its name in the table.
        after: pieces of the answer, or seconds where it is not streamed, after which a caller who hangs up does so.
    """

    kind: str
    api: Api
    body: dict[str, Any]
    stream: bool
    aim: Aim = "answer"
    after: float = 0.0


@dataclass
class Traffic:
    """An endless mixture of requests whose kinds and lengths have the same shares at any time.

    Args:
        context_len: of the served model; prompts stay below a third of it.
        seed: same seed, same requests.
    """

    model: str
    context_len: int
    seed: int
    _random: random.Random = field(init=False)
    _source: TextSource = field(init=False)
    _beginnings: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        # A tokenizer of few words cuts a word into up to six tokens.
        self._source = TextSource(self.seed, 6.0)
        self._beginnings = [self._source.text(self.context_len // 6) for _ in range(NUM_BEGINNINGS)]

    def next(self) -> Asked:
        """The next request of whoever comes."""
        api = self._random.choice(list(PATHS))
        asked = self._plain(api)
        special = self._random.random()
        if special < 0.12:
            after = float(self._random.randrange(6)) if asked.stream else self._random.uniform(0.0, 0.2)
            return Asked(f"{api}, hung up", api, asked.body, asked.stream, "hang_up", after)
        if special < 0.16:
            return self._refused(asked)
        if special < 0.24:
            return self._held(asked)
        return asked

    def pause_s(self, mean_s: float) -> float:
        """How long a caller waits before the next request."""
        return self._random.expovariate(1 / mean_s) if mean_s else 0.0

    def _plain(self, api: Api) -> Asked:
        stream = self._random.random() < 0.6
        length = self._random.randint(1, MAX_ANSWER)
        system = self._random.choice(self._beginnings) if self._random.random() < 0.6 else None
        said = self._source.words(self._random.randint(1, max(2, self.context_len // 50)))
        body: dict[str, Any] = {"model": self.model, "stream": stream, "temperature": self._random.choice([0.0, 0.8])}
        user = [{"role": "user", "content": said}]
        if api == "completions":
            body |= {"prompt": f"{system or ''} {said}", "max_tokens": length}
        elif api == "responses":
            body |= {"input": user, "max_output_tokens": length} | ({} if system is None else {"instructions": system})
        elif api == "messages":
            body |= {"messages": user, "max_tokens": length} | ({} if system is None else {"system": system})
        else:
            first = [] if system is None else [{"role": "system", "content": system}]
            body |= {"messages": first + user, "max_tokens": length}
            if self._random.random() < 0.2:
                body |= {"n": 2, "logprobs": True, "top_logprobs": 2}
        return Asked(f"{api}{', streamed' if stream else ''}", api, body, stream)

    def _refused(self, asked: Asked) -> Asked:
        """The same request with a fault of its caller's."""
        faults: list[dict[str, Any]] = [{"temperature": -1}, {"top_p": 7}, {"stream": "perhaps"}, {"model": ["a"]}]
        body = asked.body | self._random.choice(faults)
        return Asked("refused", asked.api, body, asked.stream, "refusal")

    def _held(self, asked: Asked) -> Asked:
        """A chat or completion whose answer is held to a schema, a choice or a tool."""
        body, shape = dict(asked.body), self._random.choice(["schema", "choice", "tool"])
        if asked.api not in ("chat", "completions"):
            return asked
        if shape == "tool" and asked.api == "chat":
            function = {"name": "set_state", "description": "Sets it.", "parameters": PARAMETERS}
            body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        elif shape == "schema":
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "state", "schema": SCHEMA}}
        else:
            body["guided_choice"] = ["yes", "no"]
        return Asked(f"{asked.api}, held", asked.api, body, asked.stream)
