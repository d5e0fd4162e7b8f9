"""What the callers of a load test say: prompts of a wanted length, all different, the same for every server."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from quant_core.calibrate.windows import builtin_prompts

LoadKind = Literal["completions", "chat", "shared", "agent"]
KINDS: tuple[LoadKind, ...] = get_args(LoadKind)

# Of a conversation whose callers share its beginning, the part that is each one's own.
OWN_TOKENS = 200
# What an agent's tools give back each turn.
RESULT_TOKENS = 250
SYSTEM_TOKENS = 1200


@dataclass(frozen=True)
class LoadCase:
    """One kind of traffic.

    Attributes:
        kind: completions and chat have prompts of `num_tokens`; shared: chats whose system message of `num_tokens` is
            the same for all; agent: conversations of `turns` turns under a system message with tools.
    """

    kind: LoadKind
    num_tokens: int
    turns: int = 1

    @property
    def name(self) -> str:
        """As in tables."""
        return f"agent x{self.turns}" if self.kind == "agent" else f"{self.kind} {self.num_tokens}"


@dataclass(frozen=True)
class Script:
    """One caller's part: a prompt to be completed, or a system message and what the user says turn by turn."""

    api: Literal["completions", "chat"]
    system: str | None
    says: tuple[str, ...]

    def body(self, answers: list[str]) -> dict[str, Any]:
        """The request that follows these answers."""
        if self.api == "completions":
            return {"prompt": self.says[0]}
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn, said in enumerate(self.says[: len(answers) + 1]):
            messages.append({"role": "user", "content": said})
            if turn < len(answers):
                messages.append({"role": "assistant", "content": answers[turn]})
        return {"messages": messages}


class TextSource:
    """Random words of the built-in prompts.

    Args:
        seed: same seed, same texts.
        tokens_per_word: of the server's tokenizer, measured.
    """

    def __init__(self, seed: int, tokens_per_word: float = 1.5) -> None:
        self._random = random.Random(seed)
        self._tokens_per_word = tokens_per_word
        self._words = sorted(set(re.findall(r"[a-z]{2,}", " ".join(builtin_prompts()))))

    def words(self, count: int) -> str:
        """So many words."""
        return " ".join(self._random.choices(self._words, k=max(1, count)))

    def text(self, num_tokens: int) -> str:
        """About so many tokens."""
        return self.words(round(num_tokens / self._tokens_per_word))

    def scripts(self, case: LoadCase, count: int) -> list[Script]:
        """The parts of `count` callers."""
        if case.kind == "completions":
            return [Script("completions", None, (self.text(case.num_tokens),)) for _ in range(count)]
        if case.kind == "chat":
            return [Script("chat", None, (self.text(case.num_tokens),)) for _ in range(count)]
        if case.kind == "shared":
            system = self.text(case.num_tokens)
            return [Script("chat", system, (self.text(OWN_TOKENS),)) for _ in range(count)]
        system = self._tools()
        return [
            Script("chat", system, (self.text(RESULT_TOKENS // 2), *self._results(case.turns - 1)))
            for _ in range(count)
        ]

    def _results(self, count: int) -> list[str]:
        return [f"Result of the tool:\n{self.text(RESULT_TOKENS)}\nGo on." for _ in range(count)]

    def _tools(self) -> str:
        """A system message that describes tools, as agents' clients write it where a template has no place for them."""
        tools = [
            {
                "name": f"{self.words(1)}_{self.words(1)}",
                "description": self.text(60),
                "parameters": {"type": "object", "properties": {self.words(1): {"type": "string"} for _ in range(3)}},
            }
            for _ in range(8)
        ]
        head = "You are an agent. Call one of these tools, or answer.\n" + json.dumps(tools)
        return head + "\n" + self.text(SYSTEM_TOKENS // 2)
