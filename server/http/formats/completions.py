"""Answers of /v1/completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.engine.request import PromptLogprobsEvent
from server.errors import ServerError
from server.http.answer_state import AnswerState, ChoiceState, NewOutput, TokenLogprobs
from server.http.formats.envelope import DONE, Envelope, Json, finite, token_name
from server.http.sse import Frame
from server.output.deltas import ContentDelta


@dataclass(frozen=True)
class CompletionFormat:
    """OpenAI's text completion object and its chunks.

    Attributes:
        echo: the prompts' texts, told before each answer; None: they are not.
        suffix: told after each answer.
        best_of: choices made per prompt, of which the `n` with the highest mean log-probability are told; 0: all.
        n: choices told per prompt.
    """

    envelope: Envelope
    echo: Sequence[str] | None = None
    suffix: str = ""
    best_of: int = 0
    n: int = 1

    def opening(self, answer: AnswerState) -> Iterable[Frame]:
        """Nothing, or the prompt that is to be echoed."""
        if self.echo is not None:
            for choice in answer.choices:
                yield self._chunk(choice, self.echo[choice.prompt_index], None, answer)

    def output(self, new: NewOutput, answer: AnswerState) -> Iterable[Frame]:
        """A chunk with text."""
        text = "".join(d.text for d in new.deltas if isinstance(d, ContentDelta))
        yield self._chunk(new.choice, text, self._logprobs(new.logprobs, new.offset), answer)

    def finish(self, choice: ChoiceState, answer: AnswerState) -> Iterable[Frame]:
        """The suffix, if any, and the reason."""
        yield self._chunk(choice, self.suffix, None, answer, choice.reason)

    def ending(self, answer: AnswerState) -> Iterable[Frame]:
        """No choices, only usage."""
        return self.envelope.usage_chunk(answer)

    def error(self, error: ServerError) -> Iterable[Frame]:
        """OpenAI's error body as an event of that name."""
        yield Frame(error.body(), "error")

    def closing(self) -> bytes:
        """`data: [DONE]`, with which OpenAI's streams end."""
        return DONE

    def whole(self, answer: AnswerState) -> Json:
        """The text_completion object of an answer that has ended."""
        told = self._best(answer) if self.best_of else answer.choices
        choices = []
        for index, choice in enumerate(told):
            echoed = self.echo[choice.prompt_index] if self.echo is not None else ""
            logprobs = self._logprobs(choice.logprobs, len(echoed))
            scored = answer.prompt_logprobs[choice.prompt_index]
            if logprobs is not None and scored is not None:
                prompt = _prompt_logprobs(scored)
                logprobs = {name: prompt[name] + logprobs[name] for name in logprobs}
            text = echoed + choice.content + self.suffix
            choices.append(_choice(index, text, logprobs, choice.reason))
        return self.envelope.whole(choices, answer)

    def _best(self, answer: AnswerState) -> list[ChoiceState]:
        """The `n` best of each prompt's choices, by mean log-probability of the generated tokens."""
        best: list[ChoiceState] = []
        for start in range(0, len(answer.choices), self.best_of):
            group = answer.choices[start : start + self.best_of]
            best += sorted(group, key=_mean_logprob, reverse=True)[: self.n]
        return best

    def _chunk(
        self, choice: ChoiceState, text: str, logprobs: Json | None, answer: AnswerState, reason: str | None = None
    ) -> Frame:
        return self.envelope.chunk([_choice(choice.index, text, logprobs, reason)], answer)

    def _logprobs(self, tokens: TokenLogprobs, offset: int) -> Json | None:
        """OpenAI's parallel lists; `offset` is where the first token's text begins, in characters."""
        if not self.envelope.with_logprobs:
            return None
        offsets = []
        for chosen, *_ in tokens:
            offsets.append(offset)
            offset += len(chosen.token)
        return {
            "tokens": [token_name(chosen) for chosen, *_ in tokens],
            "token_logprobs": [finite(chosen.logprob) for chosen, *_ in tokens],
            "top_logprobs": [{token_name(t): finite(t.logprob) for t in top} for _, *top in tokens],
            "text_offset": offsets,
        }


def _choice(index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _mean_logprob(choice: ChoiceState) -> float:
    chosen = [finite(entries[0].logprob) for entries in choice.logprobs]
    return sum(chosen) / max(1, len(chosen))


def _prompt_logprobs(scored: PromptLogprobsEvent) -> Json:
    """The parallel lists of an echoed prompt; its first token has no probability: null."""
    offsets, offset = [], 0
    for text in scored.texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": list(scored.texts),
        "token_logprobs": [None if e is None else finite(e[0].logprob) for e in scored.entries],
        "top_logprobs": [
            None if e is None else {token_name(t): finite(t.logprob) for t in e[1:]} for e in scored.entries
        ],
        "text_offset": offsets,
    }
