"""How a model marks its reasoning and its tool calls, found in its tokenizer and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import _infer_structural_markers, _infer_thinking, _infer_tool_parser

from server.errors import ConfigError
from server.grammar.call_formats import CALL_FORMATS
from server.grammar.spec import CallFormat, ReasoningMarkers
from server.output.deltas import OutputState
from server.output.parser import OutputParser
from server.output.spec import OutputSpec
from server.output.syntaxes import CHANNEL_MARKERS, SYNTAX_NAMES, CallReader, CallSyntax, syntax

# Thinking markers that mlx-lm does not look for.
_MORE_THINKING = (("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("<think>", "</think>"))

_CHANNEL_REASONING = {
    "harmony": ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>"),
    "muse_spark": ReasoningMarkers("to=self<|message|>", "<|eom|>"),
}


@dataclass(frozen=True)
class OutputFormat:
    """The markers of one model.

    Attributes:
        name: of the tool calls' format, one of `syntaxes.SYNTAX_NAMES`.
        think_start, think_end: markers around the reasoning; None where the model has none, or has channels.
        structural: markers that are always left out.
        markers: special tokens whose text the parser must see.
        is_native: the model was taught this format; else it must be described to it (`prompt.generic_tool_prompt`),
            and a request without tools has no call markers.
    """

    name: str
    think_start: str | None = None
    think_end: str | None = None
    structural: tuple[str, ...] = ()
    markers: frozenset[str] = frozenset()
    is_native: bool = True

    @property
    def reasoning(self) -> ReasoningMarkers | None:
        """The texts around the reasoning, also where it is a channel."""
        if self.think_start and self.think_end:
            return ReasoningMarkers(self.think_start, self.think_end)
        return _CHANNEL_REASONING.get(self.name)

    @property
    def call_format(self) -> CallFormat | None:
        """How a grammar writes calls; None where no grammar can."""
        return CALL_FORMATS.get(self.name)

    @property
    def reader(self) -> CallReader:
        """Of what follows a call's marker."""
        return self._syntax.reader

    @property
    def call_starts(self) -> tuple[str, ...]:
        """Markers that a call follows."""
        return self._syntax.starts

    @property
    def has_bare_calls(self) -> bool:
        """An answer that begins with "{" may be a call without a marker."""
        return self._syntax.has_bare_calls

    @property
    def has_channels(self) -> bool:
        """Messages with headers make up the answer."""
        return self._syntax.has_channels

    def parser(self, spec: OutputSpec) -> OutputParser:
        """A parser for one choice."""
        return OutputParser(self, spec.tools, spec.starts_in, spec.parallel_tool_calls)

    def starts_in(self, prompt: str) -> OutputState:
        """Where the answer to a rendered prompt begins: in the reasoning if the prompt ends with its marker."""
        opened = self.think_start is not None and prompt.rstrip().endswith(self.think_start)
        return "reasoning" if opened else "content"

    def machine(self, *, with_calls: bool) -> TextStateMachine:
        """mlx-lm's text splitter, whose states are "text" and, once a marker is met, the marker."""
        return self._machine if with_calls else self._machine_without_calls

    def is_cut_marker(self, text: str) -> bool:
        """Whether the end of an answer is at least half of a marker."""
        return bool(text) and any(m.startswith(text) and 2 * len(text) >= len(m) for m in self._all_markers)

    @cached_property
    def _syntax(self) -> CallSyntax:
        return syntax(self.name)

    @cached_property
    def _text_markers(self) -> tuple[str, ...]:
        thinking = tuple(m for m in (self.think_start, self.think_end) if m)
        return tuple(dict.fromkeys((*thinking, *self.structural)))

    @cached_property
    def _all_markers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._text_markers, *self._syntax.starts, *self._syntax.others)))

    @cached_property
    def _machine(self) -> TextStateMachine:
        return _machine(self._all_markers)

    @cached_property
    def _machine_without_calls(self) -> TextStateMachine:
        return _machine(self._text_markers)


def _machine(markers: tuple[str, ...]) -> TextStateMachine:
    return TextStateMachine({"text": [(m, m) for m in markers], **{m: [] for m in markers}})


def check_format_name(name: str | None) -> None:
    """Refuse a name that is no format's; None leaves the choice to the model's template.

    Raises:
        ConfigError: the message lists those that are.
    """
    if name is not None and name not in SYNTAX_NAMES:
        raise ConfigError(f"model.tool_parser: unknown format {name!r}; known: {', '.join(SYNTAX_NAMES)}")


def detect_format(tokenizer: Any, override: str | None = None) -> OutputFormat:
    """The format of a model.

    Args:
        tokenizer: mlx-lm's wrapper, or a Hugging Face tokenizer.
        override: the name of a format (`model.tool_parser`), instead of what the template and vocabulary tell.

    Raises:
        ConfigError: there is no such format; the message lists those that are.
    """
    check_format_name(override)
    name = override or _infer(tokenizer)
    start, end = (None, None) if name == "harmony" else _thinking(tokenizer)
    found = OutputFormat(name or "hermes", start, end, tuple(_infer_structural_markers(tokenizer)))
    special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    markers = frozenset(text for text in special if any(text in marker for marker in found._all_markers))
    return OutputFormat(found.name, start, end, found.structural, markers, is_native=name is not None)


def _infer(tokenizer: Any) -> str | None:
    """The format that the template and the vocabulary tell; None for none."""
    given = tokenizer.init_kwargs.get("tool_parser_type")
    vocab = tokenizer.get_vocab()
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if given in SYNTAX_NAMES:
        return str(given)
    if all(marker in vocab for marker in CHANNEL_MARKERS[:3]):
        return "harmony"
    if (
        "｜DSML｜" in template
        or "｜DSML｜" in vocab
        or tokenizer.init_kwargs.get("chat_template_type") == "deepseek_v32"
    ):
        return "deepseek_v32"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek"
    known = _infer_tool_parser(tokenizer)
    if known in SYNTAX_NAMES:
        return str(known)
    if "<|python_tag|>" in vocab:
        return "llama3"
    return "hermes" if "<tool_call>" in template else None


def _thinking(tokenizer: Any) -> tuple[str | None, str | None]:
    start, end = _infer_thinking(tokenizer)[:2]
    if start is not None:
        return start, end
    vocab = tokenizer.get_vocab()
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    known = ((s, e) for s, e in _MORE_THINKING if (s in vocab and e in vocab) or e in template)
    return next(known, (None, None))
