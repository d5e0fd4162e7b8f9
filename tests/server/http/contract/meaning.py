"""Schemathesis' hooks: what JSON Schema cannot say of a good request is made good before it is sent.

Only requests that are meant to be accepted are changed; those that are meant to be refused are sent as they are. Each
change says why the description cannot say it. No check is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import schemathesis
from schemathesis import Case, HookContext

VOCAB_SIZE = 600
MAX_TOKENS = 1
FEW = 8
Json = dict[str, Any]


@schemathesis.hook
def filter_case(context: HookContext, case: Case[Any]) -> bool:
    """A session's file has a format and checksums of its own: no bytes drawn by chance are one."""
    is_file = (case.operation.path, case.operation.method) == ("/admin/sessions/{name}/file", "put")
    return not (is_file and case.meta is not None and case.meta.generation.mode.is_positive)


@schemathesis.hook
def map_case(context: HookContext, case: Case[Any]) -> Case[Any]:
    """The request as a caller who read docs/api.md would send it."""
    if case.operation.path == "/admin/live":
        # The stream never ends by itself.
        case.query = {**(case.query or {}), "frames": 1}
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        case.body = sensible(case.operation.path, case.body)
    return case


def _few(value: Any) -> Any:
    """The first of each list, at any depth: of messages, and of the parts that each has."""
    if isinstance(value, list):
        return [_few(one) for one in value[:FEW]]
    return {name: _few(one) for name, one in value.items()} if isinstance(value, dict) else value


def sensible(path: str, body: Json) -> Json:
    """The body with names, ids and grammars that exist."""
    body = dict(body)
    if isinstance(body.get("model"), str):
        # Which models there are is the server's configuration.
        body["model"] = "tiny"
    for field in ("messages", "input", "tools", "functions"):
        if isinstance(body.get(field), list):
            # How much fits is the model's.
            body[field] = _few(body[field])
    _limit(path, body)
    _name_tools(path, body)
    _hold(body)
    if path == "/v1/completions":
        _completion(body)
    elif path == "/v1/responses":
        _response(body)
    elif path.startswith("/v1/messages"):
        # Messages of the system alone may be empty, and then nothing is said.
        body["messages"] = [*body["messages"], {"role": "user", "content": "Hi"}]
    elif path == "/v1/embeddings":
        body["input"] = _in_vocabulary(body["input"])
        # As many as the model's embeddings have.
        body["dimensions"] = min(body.get("dimensions") or 1, 128)
    elif path == "/admin/sessions":
        body["prompt"] = _in_vocabulary(body.get("prompt"))
    elif path == "/v1/detokenize":
        body["tokens"] = _in_vocabulary(body["tokens"])
    elif path == "/admin/calibrations":
        # So that it ends soon: there is too little text, which the job finds out.
        body |= {"samples": 2, "sample_len": 64, "builtin": False, "text": "Hi"}
    return body


def _limit(path: str, body: Json) -> None:
    """Few tokens, so that the run ends; token ids of this vocabulary."""
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    if path not in (
        "/v1/messages/count_tokens",
        "/v1/tokenize",
        "/v1/detokenize",
        "/v1/embeddings",
        "/admin/calibrations",
        "/admin/sessions",
    ):
        body[name] = min(MAX_TOKENS, body[name]) if (body.get(name) or 0) > 0 else MAX_TOKENS
    if body.get("stop_token_ids"):
        body["stop_token_ids"] = _in_vocabulary(body["stop_token_ids"])
    if body.get("logit_bias"):
        body["logit_bias"] = {"1": 5}
    if body.get("continue_final_message"):
        # The last of a list must be the assistant's.
        body["messages"] = [*body["messages"], {"role": "assistant", "content": "a"}]


def _name_tools(path: str, body: Json) -> None:
    """Names of tools differ; a chosen tool is among them."""
    for field in ("tools", "functions"):
        if isinstance(body.get(field), list):
            body[field] = list(_distinct(body[field]))
    for field in ("tool_choice", "function_call"):
        choice = body.get(field)
        if (
            not choice
            or choice in ("none", "auto")
            or (isinstance(choice, dict) and choice.get("type") in ("auto", "none"))
        ):
            continue
        if path.startswith("/v1/messages"):
            body["tools"] = [{"name": "look", "input_schema": {"type": "object"}}]
            body[field] = {**choice, "name": "look"}
        else:
            body["tools"] = [{"type": "function", "function": {"name": "look"}}]
            if isinstance(choice, dict):
                body[field] = {"type": "function", "function": {"name": "look"}}


def _distinct(tools: list[Any]) -> Iterator[Any]:
    names: set[str] = set()
    for tool in tools:
        inner = tool.get("tools") if tool.get("type") == "namespace" else [tool]
        found = {str((t.get("function") if isinstance(t.get("function"), dict) else t).get("name")) for t in inner}
        if len(found) == len(inner) and not found & names:
            names |= found
            # Parameters are JSON schemas, whose rules are not those of one schema.
            yield _with_schema(tool)


def _with_schema(tool: Json) -> Json:
    tool = dict(tool)
    for name in ("parameters", "input_schema"):
        if isinstance(tool.get(name), dict):
            tool[name] = {"type": "object"}
    if isinstance(tool.get("function"), dict):
        tool["function"] = _with_schema(tool["function"])
    if isinstance(tool.get("tools"), list):
        tool["tools"] = [_with_schema(inner) for inner in tool["tools"]]
    return tool


def _hold(body: Json) -> None:
    """Schemas, expressions and grammars have languages of their own."""
    for holder, field in (
        (body, "response_format"),
        (body, "output_format"),
        ("output_config", "format"),
        ("text", "format"),
    ):
        if isinstance(holder, str):
            if not isinstance(body.get(holder), dict):
                continue
            body[holder] = inner = dict(body[holder])
        else:
            inner = holder
        wanted = inner.get(field)
        if isinstance(wanted, dict) and wanted.get("type") in ("json_schema", "json_object"):
            inner[field] = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
        elif isinstance(wanted, dict) and wanted.get("type") in ("regex", "grammar"):
            inner[field] = {"type": "regex", "pattern": "[a-z]{1,3}"}


def _completion(body: Json) -> None:
    """Prompts times choices are at most 64; the best of so many are at least as many."""
    body["prompt"] = _in_vocabulary(body["prompt"])
    if body.get("best_of"):
        body["best_of"], body["stream"] = max(body["best_of"], body.get("n") or 1), False
    if isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int):
        body["prompt"] = body["prompt"][:4]


def _response(body: Json) -> None:
    """Earlier responses and items are kept or not; something must be said."""
    body.pop("previous_response_id", None)
    # What is read later was kept.
    body["store"] = True
    said = {"type": "message", "role": "user", "content": "Hi"}
    items = body.get("input")
    if isinstance(items, list):
        body["input"] = [*(item for item in items if item.get("type") != "item_reference"), said]
    elif not items:
        body["input"] = "Hi"


def _in_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_vocabulary(item) for item in value]
    return int(value) % VOCAB_SIZE if isinstance(value, int | float) else value
