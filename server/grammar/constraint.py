"""What one row may say next: its thinking, its grammar, its shortest length. MLX thread only, like the row itself."""

from __future__ import annotations

from collections.abc import Sequence

from server.grammar.compile import CompiledGrammar, GrammarCompiler
from server.grammar.marker import MarkerWatch
from server.grammar.mask import MaskRow, allow, forbid
from server.grammar.matcher import Matcher
from server.grammar.reasoning import Reasoning
from server.grammar.spec import GrammarSpec, ReasoningMarkers
from server.grammar.tokens import TokenTable

# Newline tokens between the thinking's end and JSON, as models are trained to write them.
MAX_GAP_TOKENS = 2
_BLANKS_ALLOWED = ("json_object", "json_schema")


class _Answer:
    """Held to the grammar from the first token after the thinking to the end."""

    def __init__(self, grammar: CompiledGrammar, tokens: TokenTable) -> None:
        self._matcher = grammar.matcher(tokens)
        self._tokens = tokens
        self._gap = MAX_GAP_TOKENS if grammar.spec.kind in _BLANKS_ALLOWED else 0
        self.after_reasoning = False
        self.is_over = False

    @property
    def error(self) -> str | None:
        return self._matcher.error

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_complete

    def mask(self, row: MaskRow) -> bool:
        self._matcher.mask(row)
        if self._gap_left:
            allow(row, self._tokens.newline_ids)
        return True

    def accept(self, token_id: int) -> None:
        if self._gap_left and token_id in self._tokens.newline_ids:
            self._gap -= 1
        else:
            self._matcher.accept(token_id)

    def accept_rest(self, rest: bytes) -> None:
        self.after_reasoning = True
        self._matcher.accept_rest(rest)

    @property
    def _gap_left(self) -> bool:
        return self.after_reasoning and self._gap > 0 and self._matcher.num_tokens == 0


class _Calls:
    """Free text in which every call that the model opens is held to the grammar until it is complete."""

    is_complete = False
    is_over = False

    def __init__(self, grammar: CompiledGrammar, tokens: TokenTable, trigger: str) -> None:
        self._grammar = grammar
        self._tokens = tokens
        self._watch = MarkerWatch(trigger)
        self._matcher: Matcher | None = None

    @property
    def error(self) -> str | None:
        return self._matcher.error if self._matcher is not None else None

    def mask(self, row: MaskRow) -> bool:
        if self._matcher is not None:
            self._matcher.mask(row)
        return self._matcher is not None

    def accept(self, token_id: int) -> None:
        if self._matcher is None:
            self._look(self._tokens.token_bytes(token_id))
            return
        self._matcher.accept(token_id)
        if self._matcher.is_complete and self._matcher.error is None:
            self._matcher = None

    def accept_rest(self, rest: bytes) -> None:
        self._look(rest)

    def _look(self, text: bytes) -> None:
        rest = self._watch.push(text)
        if rest is not None:
            self._matcher = self._grammar.matcher(self._tokens)
            self._matcher.accept_rest(rest)


class RowConstraint:
    """The masks of one row, step by step: `mask` before each token is drawn, `accept` with the token.

    Args:
        reasoning: None, the answer starts with the first token.
        held: what follows the thinking.
        min_tokens: no token of `end_ids` before so many were generated.
    """

    def __init__(
        self,
        reasoning: Reasoning | None,
        held: _Answer | _Calls | None,
        min_tokens: int,
        end_ids: Sequence[int],
    ) -> None:
        self._reasoning = reasoning
        self._held = held
        self._min_tokens = min_tokens
        self._end_ids = tuple(end_ids)
        self._num_tokens = 0

    @property
    def error(self) -> str | None:
        """Why the row must end: its grammar cannot go on."""
        return self._held.error if self._held is not None else None

    @property
    def is_over(self) -> bool:
        """Whether the row is free for the rest of its answer."""
        return self._reasoning is None and self._held is None and self._num_tokens >= self._min_tokens

    def mask(self, out_row: MaskRow) -> bool:
        """Write the allowed tokens into `out_row` (`[ceil(vocab / 32)]`, all ones before); False leaves it as it is.

        Never forbids every token. After an error the row is free; its caller ends it.
        """
        if self.error is not None:
            return False
        wrote = self._mask(out_row)
        if self._num_tokens < self._min_tokens:
            forbid(out_row, self._end_ids)
            wrote = True
        if self.error is not None:
            out_row.fill(-1)
            return False
        return wrote

    def accept(self, token_id: int) -> None:
        """Take the row's next token."""
        self._num_tokens += 1
        if self._reasoning is None:
            self._accept(token_id)
            return
        was_inside, has_answer = self._reasoning.is_inside, isinstance(self._held, _Answer)
        rest = self._reasoning.accept(token_id, only_opener=has_answer)
        if not self._reasoning.is_over:
            return
        self._reasoning = None
        if has_answer and not was_inside:
            self._accept(token_id)
        elif self._held is not None:
            self._held.accept_rest(rest or b"")

    def _mask(self, row: MaskRow) -> bool:
        answer = self._held if isinstance(self._held, _Answer) else None
        if self._reasoning is None:
            return self._held is not None and self._held.mask(row)
        if self._reasoning.is_inside:
            wrote = self._reasoning.mask(row)
            if answer is not None and not wrote:
                forbid(row, self._end_ids)  # an answer must follow
            return wrote or answer is not None
        if answer is not None:
            answer.mask(row)
            allow(row, self._reasoning.openers)
        return answer is not None

    def _accept(self, token_id: int) -> None:
        if self._held is not None and self._held.error is None:
            self._held.accept(token_id)


def make_constraint(
    compiler: GrammarCompiler,
    spec: GrammarSpec | None,
    *,
    reasoning: ReasoningMarkers | None = None,
    in_reasoning: bool = False,
    max_reasoning_tokens: int | None = None,
    min_tokens: int = 0,
    end_ids: Sequence[int] = (),
) -> RowConstraint | None:
    """One row's constraint; None where nothing constrains it.

    Args:
        spec: None, no grammar. With "at_once" the answer has no thinking.
        reasoning: the model's thinking markers; None, it has none.
        in_reasoning: the prompt ends inside the thinking.
        max_reasoning_tokens: of the thinking, its markers not counted; None: no limit.
        min_tokens: no end token before so many tokens.
        end_ids: what ends the row: the model's end tokens and the request's own.

    Raises:
        BadRequestError: the grammar cannot be compiled; it is best compiled before the request is submitted.
    """
    if spec is None and min_tokens == 0 and (reasoning is None or max_reasoning_tokens is None):
        return None
    thinking = None
    waits = spec.starts != "at_once" if spec is not None else max_reasoning_tokens is not None
    if reasoning is not None and waits:
        thinking = Reasoning(reasoning, compiler.tokens, inside=in_reasoning, max_tokens=max_reasoning_tokens)
    held = _held(compiler, spec) if spec is not None else None
    return RowConstraint(thinking, held, min_tokens, end_ids or compiler.end_ids)


def _held(compiler: GrammarCompiler, spec: GrammarSpec) -> _Answer | _Calls:
    grammar = compiler.compile(spec)
    if spec.starts != "in_tool_call":
        return _Answer(grammar, compiler.tokens)
    assert spec.calls is not None  # the compiler refuses it
    return _Calls(grammar, compiler.tokens, spec.calls.format.trigger)
