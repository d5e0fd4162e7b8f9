"""Specifications to grammars, once each. Any thread; never the event loop, as a compilation may take a second."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from server.errors import BadRequestError
from server.grammar.call_text import call_grammar
from server.grammar.closed_schema import closed
from server.grammar.matcher import Matcher
from server.grammar.spec import GrammarSpec
from server.grammar.tokens import TokenTable

MAX_GRAMMARS = 128
# Above it compilations take seconds (a schema of 10 000 properties: seven).
MAX_TEXT_BYTES = 128 << 10
# As JSON is written: a blank or two, or a new line and its indentation. Without a bound a weak model goes on for ever.
WHITESPACE = r"\x20{1,2}|\x0D?\x0A(\x20{0,32}|\x09{0,16})"


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar that rows can be held to; `warnings` say what a schema that is not strict leaves unchecked."""

    spec: GrammarSpec
    prototype: Any
    warnings: tuple[str, ...]

    def matcher(self, tokens: TokenTable) -> Matcher:
        """One row's own, at the start."""
        return Matcher(self.prototype.deep_copy(), tokens)


class GrammarCompiler:
    """Compiles for one model and keeps what was compiled last.

    Args:
        tokenizer: a Hugging Face tokenizer, or mlx-lm's wrapper of one.
        logits_width: entries of the model's logits.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, logits_width: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._logits_width = logits_width
        self.end_ids = tuple(end_ids)
        self._tokens: TokenTable | None = None
        self._tokens_lock = threading.Lock()
        self._grammars: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> TokenTable:
        """The model's tokens, set up at the first use."""
        with self._tokens_lock:
            if self._tokens is None:
                self._tokens = TokenTable(self._tokenizer, self._logits_width, self.end_ids)
            return self._tokens

    def warm_up(self) -> threading.Thread:
        """Set the tokens up in the background, so that the first grammar need not wait for them."""
        thread = threading.Thread(target=lambda: self.tokens, name="grammar-tokens", daemon=True)
        thread.start()
        return thread

    def compile(self, spec: GrammarSpec, *, param: str | None = None) -> CompiledGrammar:
        """The grammar of `spec`.

        Args:
            param: the request's field that it comes from, named in errors.

        Raises:
            BadRequestError: it is malformed, too large, or says what cannot be held.
        """
        with self._lock:
            known = self._grammars.get(spec)
            if known is not None:
                self._grammars.move_to_end(spec)
                return known
        compiled = self._compile(spec, param)
        with self._lock:
            self._grammars[spec] = compiled
            while len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        return compiled

    def _compile(self, spec: GrammarSpec, param: str | None) -> CompiledGrammar:
        tools = spec.calls.tools if spec.calls is not None else ()
        num_bytes = len(spec.text.encode()) + sum(len(t.parameters.encode()) for t in tools)
        if num_bytes > MAX_TEXT_BYTES:
            message = f"the {_NOUNS[spec.kind]} has {num_bytes} bytes; at most {MAX_TEXT_BYTES} are allowed"
            raise BadRequestError(message, param=param, code="invalid_grammar")
        try:
            text = _grammar_text(spec, self.tokens)
        except (ValueError, RecursionError) as error:
            raise _refusal(spec, str(error), param) from error
        prototype = llguidance.LLMatcher(self.tokens.ll, text, log_level=0)
        if prototype.is_error():
            raise _refusal(spec, prototype.get_error(), param)
        return CompiledGrammar(spec, prototype, tuple(prototype.get_grammar_warnings()))


_NOUNS = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "grammar": "grammar",
    "tool_calls": "tools' parameters",
}


def _grammar_text(spec: GrammarSpec, tokens: TokenTable) -> str:
    """llguidance's own form.

    Raises:
        ValueError, RecursionError: the text cannot be read.
    """
    options = {"whitespace_pattern": WHITESPACE, "lenient": not spec.strict}
    if spec.kind in ("json_object", "json_schema"):
        schema = closed(json.loads(spec.text or '{"type":"object"}'))
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
    if spec.kind == "tool_calls":
        calls = call_grammar(spec, tokens.special_ids, options)
        if spec.text:
            schema = json.dumps({**closed(json.loads(spec.text)), "x-guidance": options})
            calls = calls.replace("\nstart: ", "\nstart: calls | answer\nanswer: %json " + schema + "\ncalls: ", 1)
        return str(llguidance.LLMatcher.grammar_from_lark(calls))
    if spec.kind == "choice":
        choices = json.loads(spec.text)
        if not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("choices must be a non-empty list of non-empty strings")
    return str(llguidance.grammar_from(spec.kind, spec.text))


def _refusal(spec: GrammarSpec, reason: str, param: str | None) -> BadRequestError:
    reason = reason.strip()
    reason = reason if len(reason) <= 500 else reason[:500] + " ..."
    message = f"the {_NOUNS[spec.kind]} cannot be used to guide the answer: {reason}"
    return BadRequestError(message, param=param, code="invalid_grammar")
