"""The OpenAPI description: bodies that are read by hand (for exact errors), errors, streams and keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
# One of a stream; JSON in `data`, but for "[DONE]" at the end of OpenAI's.
SSE_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
# `responses` of a route that answers with a stream only.
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": SSE_EVENT}}}}
# What an answer names, and by which routes it can be asked for: path of the answer, its status, where the name stands.
LINKS = (
    ("post", "/v1/responses", "200", "$response.body#/id", "/v1/responses/{response_id}"),
    ("get", "/v1/models", "200", "$response.body#/data/0/id", "/v1/models/{model_id}"),
    ("post", "/admin/calibrations", "202", "$response.body#/id", "/admin/calibrations/{job_id}"),
    ("get", "/admin/artifacts", "200", "$response.body#/data/0/id", "/admin/artifacts/{artifact_id}"),
)
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


def answers(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers in one of these forms."""
    return {200: {"content": {name: {} for name in media_types}}}


def describe(
    app: FastAPI,
    bodies: list[type[BaseModel]],
    keys: Mapping[str, str],
    *,
    takes_unknown: bool,
    open_api: bool,
    refused: Mapping[type[BaseModel], Collection[str]],
) -> None:
    """Let the application's /openapi.json define `bodies`, and what every operation may answer.

    Args:
        keys: "api", "admin" or "none", by path.
        takes_unknown: whether fields that no body knows are ignored (`http.unknown_fields`).
        open_api: whether no API key is configured.
        refused: fields that this server's configuration does not allow.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, shapes = models_json_schema([(b, "validation") for b in bodies], ref_template=REF_TEMPLATE)
            components = schema.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            closed = {body.__name__ for body in bodies if getattr(body, "closed", False)}
            schemas.update(_lenient(shapes.get("$defs", {}), takes_unknown, closed))
            for body in bodies:
                _refuse(schemas[body.__name__], {*getattr(body, "unsupported", ()), *refused.get(body, ())})
            schemas["Error"] = ERROR
            components["securitySchemes"] = KEYS
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _complete(operation, path, keys.get(path, "none"), open_api)
            _link(schema["paths"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _link(paths: dict[str, Any]) -> None:
    """Say of answers that name something by which routes it can be asked for."""
    for method, path, status, name, wanted in LINKS:
        links = paths[path][method]["responses"][status].setdefault("links", {})
        parameter = wanted.rpartition("{")[2].rstrip("}")
        for found, operations in paths.items():
            if found.startswith(wanted):
                for operation in operations.values():
                    links[operation["operationId"]] = {
                        "operationId": operation["operationId"],
                        "parameters": {parameter: name},
                    }


def _complete(operation: dict[str, Any], path: str, key: str, open_api: bool) -> None:
    """Add errors, streams and keys to an operation."""
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    for status in _statuses(operation, path, key):
        responses.setdefault(str(status), _error(ERRORS[status]))
    responses["default"] = _error("Another error")
    stream = operation.pop("x-stream", False)
    if stream:
        text = {"schema": SSE_EVENT}
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


def _lenient(shapes: dict[str, Any], takes_unknown: bool, closed: Collection[str]) -> dict[str, Any]:
    """The schemas as bodies are read: null means "not given", and unknown fields are ignored, but for `closed` ones."""
    for title, shape in shapes.items():
        required = shape.get("required", ())
        for name, field in shape.get("properties", {}).items():
            if name not in required and not _takes_null(field):
                described = {k: field.pop(k) for k in ("title", "description", "default") if k in field}
                shape["properties"][name] = {"anyOf": [field, {"type": "null"}], **described}
        if takes_unknown and title not in closed and shape.get("additionalProperties") is False:
            shape["additionalProperties"] = True
    return shapes


def _refuse(shape: dict[str, Any], names: Iterable[str]) -> None:
    """Fields that can be given as null only."""
    shape["properties"].update({name: {"type": "null"} for name in names})


def _takes_null(field: Mapping[str, Any]) -> bool:
    return any(option.get("type") == "null" for option in field.get("anyOf", ())) or not set(field) - {
        "title",
        "description",
        "default",
    }
