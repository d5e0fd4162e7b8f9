"""The OpenAPI description: bodies that are read by hand (for exact errors), errors, streams and keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF_TEMPLATE = "#/components/schemas/{model}"
ERRORS = {
    400: "The request is malformed, or asks for what cannot be had",
    401: "No key, or a wrong one",
    403: "By a name that is not this server's, or from a web page that may not call",
    404: "No such thing",
    408: "The request did not come in time",
    409: "Not in this state",
    413: "The body is too large",
    415: "A web page's body that is not JSON",
    429: "Too many requests wait",
    503: "Not ready",
}
KEYS: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
# OpenAI's form, and Anthropic's.
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
    },
}


def body_of(model: type[BaseModel], *, stream: bool = False) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `model`; `stream`: it may answer with server-sent events."""
    reference = {"$ref": REF_TEMPLATE.format(model=model.__name__)}
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
    return {**body, "x-stream": True} if stream else body


def describe(
    app: FastAPI, bodies: list[type[BaseModel]], keys: Mapping[str, str], *, takes_unknown: bool, open_api: bool
) -> None:
    """Let the application's /openapi.json define `bodies`, and what every operation may answer.

    Args:
        keys: "api", "admin" or "none", by path.
        takes_unknown: whether fields that no body knows are ignored (`http.unknown_fields`).
        open_api: whether no API key is configured.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, shapes = models_json_schema([(b, "validation") for b in bodies], ref_template=REF_TEMPLATE)
            components = schema.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas.update(_lenient(shapes.get("$defs", {}), takes_unknown))
            schemas["Error"] = ERROR
            components["securitySchemes"] = KEYS
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _complete(operation, path, keys.get(path, "none"), open_api)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], path: str, key: str, open_api: bool) -> None:
    """Add errors, streams and keys to an operation."""
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    for status in _statuses(operation, path, key):
        responses.setdefault(str(status), _error(ERRORS[status]))
    responses["default"] = _error("Another error")
    stream = operation.pop("x-stream", False)
    if stream:
        text = {"schema": {"type": "string", "description": "server-sent events"}}
        responses["200"]["content"] = {**responses["200"].get("content", {}), "text/event-stream": text}
    if key != "none":
        operation["security"] = [{"bearer": []}, {"header": []}, *([{}] if key == "api" and open_api else [])]


def _statuses(operation: Mapping[str, Any], path: str, key: str) -> Iterable[int]:
    yield from (400, 401, 408, 503) if key != "none" else (503,)
    if key != "admin":
        yield 403
    if "{" in path or key != "none":
        yield 404
    if "requestBody" in operation:
        yield from (413, 415, 429)
    if key == "admin":
        yield 409


def _error(description: str) -> dict[str, Any]:
    reference = {"$ref": REF_TEMPLATE.format(model="Error")}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _lenient(shapes: dict[str, Any], takes_unknown: bool) -> dict[str, Any]:
    """The schemas as bodies are read: null means "not given", and unknown fields are ignored."""
    for shape in shapes.values():
        required = shape.get("required", ())
        for name, field in shape.get("properties", {}).items():
            if name not in required and not _takes_null(field):
                described = {k: field.pop(k) for k in ("title", "description", "default") if k in field}
                shape["properties"][name] = {"anyOf": [field, {"type": "null"}], **described}
        if takes_unknown and shape.get("additionalProperties") is False:
            shape["additionalProperties"] = True
    return shapes


def _takes_null(field: Mapping[str, Any]) -> bool:
    return any(option.get("type") == "null" for option in field.get("anyOf", ())) or not set(field) - {
        "title",
        "description",
        "default",
    }
