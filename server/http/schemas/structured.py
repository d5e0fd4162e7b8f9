"""Fields that hold an answer to a form: OpenAI's `response_format`, and what vLLM and llama-server call theirs."""

from __future__ import annotations

import json
from typing import Any

from server.http.generation_spec import ResponseFormat
from server.http.schemas.base import clip, note_ignored, refused

MAX_GRAMMAR_CHARS = 200_000


def response_format(value: Any) -> ResponseFormat | None:
    """OpenAI's `response_format`, with the variants that other servers take; None for plain text."""
    if isinstance(value, ResponseFormat):
        return value
    if not isinstance(value, dict):
        raise refused("must be an object")
    kind = value.get("type")
    if kind == "text" or not value:
        return None
    if kind == "json_object":
        schema = value.get("schema")
        return ResponseFormat("json_object") if schema is None else _schema(schema, strict=False)
    if kind == "json_schema":
        inner = value.get("json_schema", value)
        if not isinstance(inner, dict) or "schema" not in inner:
            raise refused("must hold a schema", "json_schema.schema")
        return _schema(inner["schema"], strict=inner.get("strict") is True)
    if kind in ("regex", "grammar"):
        text = value.get("value")
        text = value.get("pattern" if kind == "regex" else "grammar") if text is None else text
        return _text(kind, text, kind)
    raise refused(f"'{clip(str(kind))}' is not text, json_object or json_schema", "type")


def other_formats(data: dict[str, Any]) -> ResponseFormat | None:
    """The answer's form from fields other than `response_format`.

    vLLM: `structured_outputs`, `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`; llama-server:
    `json_schema`, `grammar`. Each is taken out of `data`.
    """
    given: dict[str, Any] = {}
    nested = data.pop("structured_outputs", None)
    if nested is not None:
        if not isinstance(nested, dict):
            raise refused("must be an object", "structured_outputs")
        given |= {f"structured_outputs.{name}": value for name, value in nested.items()}
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "grammar"):
        given[name] = data.pop(name, None)
    found: ResponseFormat | None = None
    for name, value in given.items():
        if value is None or value == "" or value is False:
            continue
        made = _other_format(name, value)
        if made is None:
            note_ignored(name)
        elif found is not None:
            raise refused(f"give one of '{found.param}' and '{name}'", name)
        else:
            found = made
    return found


def _other_format(name: str, value: Any) -> ResponseFormat | None:
    kind = name.rpartition(".")[2].removeprefix("guided_")
    if kind in ("json", "json_schema"):
        return _schema(_parsed(value, name), strict=False, param=name)
    if kind == "json_object":
        return ResponseFormat("json_object", param=name)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise refused("must be a list of texts, none of them empty", name)
        return ResponseFormat("choice", json.dumps(value), param=name)
    if kind in ("regex", "grammar"):
        return _text(kind, value, name)
    return None


def _schema(schema: Any, *, strict: bool, param: str = "response_format") -> ResponseFormat:
    if not isinstance(schema, dict | bool):
        raise refused("must be a JSON schema", "" if param == "response_format" else param)
    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise refused(f"a schema of {len(text)} characters is longer than {MAX_GRAMMAR_CHARS}")
    return ResponseFormat("json_schema", text, strict, param)


def _text(kind: Any, value: Any, param: str) -> ResponseFormat:
    if not isinstance(value, str) or not value:
        raise refused("must be a text that is not empty", param)
    if len(value) > MAX_GRAMMAR_CHARS:
        raise refused(f"{len(value)} characters are more than {MAX_GRAMMAR_CHARS}", param)
    return ResponseFormat(kind, value, param=param if param not in ("regex", "grammar") else "response_format")


def _parsed(value: Any, name: str) -> Any:
    """A schema may come as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise refused(f"is not valid JSON: {error}", name) from error
