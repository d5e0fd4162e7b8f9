"""What every request body has in common: strict types, nulls mean "not given", unknown fields are named."""

from __future__ import annotations

import reprlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from server.errors import BadRequestError
from server.http.schemas.json_object import parse_json

UnknownFields = Literal["ignore", "refuse"]
MAX_IGNORED_FIELDS = 32


@dataclass
class _Reading:
    """One body being read: what to do with unknown fields, and which were met."""

    unknown_fields: UnknownFields
    ignored: list[str] = field(default_factory=list)


_reading: ContextVar[_Reading | None] = ContextVar("_reading", default=None)


class RequestBody(BaseModel):
    """A strict request body.

    `silent` names fields of the API that cannot change an answer of this server: they are dropped. `unsupported` names
    those that would change it and cannot be had, each with the reason. `aliases` gives other servers' names of a field,
    which count when the field itself is not given. Any other unknown field is ignored and noted, or refused, as
    `parse_body` was told; a `closed` body refuses it in any case. Numbers such as 1.0 are integers, as in JSON.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    silent: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[dict[str, str]] = {}
    aliases: ClassVar[dict[str, str]] = {}
    closed: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept: dict[str, Any] = {}
        for name, value in data.items():
            if value is None or name in cls.silent:
                continue
            if name in cls.unsupported:
                raise refused(cls.unsupported[name], name)
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.aliases:
                _note_unknown(name, cls.closed)
        for other, name in cls.aliases.items():
            if data.get(other) is not None and name not in kept:
                kept[name] = data[other]
        counting = _integer_fields(cls)
        return {name: whole_numbers(value) if name in counting else value for name, value in kept.items()}


def whole_numbers(value: Any) -> Any:
    """1.0 as 1, also in lists: JSON does not tell them apart, and some languages write it so."""
    if isinstance(value, list):
        return [whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def _integer_fields(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(name for name, field in model.model_fields.items() if _counts(field.annotation))


def _counts(annotation: Any) -> bool:
    """Whether what has this annotation holds integers."""
    is_literal = isinstance(annotation, int) and not isinstance(annotation, bool)
    return annotation is int or is_literal or any(map(_counts, get_args(annotation)))


def _note_unknown(name: str, closed: bool) -> None:
    reading = _reading.get()
    if closed or reading is None or reading.unknown_fields == "refuse":
        raise refused(f"unknown field '{clip(name)}'; it is refused because it could change the answer", name)
    note_ignored(name)


def note_ignored(name: str) -> None:
    """Say that a field, or a value of it, was taken without effect."""
    reading = _reading.get()
    # It goes into the log, where a caller's line break would begin a line of its own.
    name = "".join(c if c.isprintable() else "?" for c in clip(name))
    if reading is not None and name not in reading.ignored and len(reading.ignored) < MAX_IGNORED_FIELDS:
        reading.ignored.append(name)


def clip(text: str, max_len: int = 80) -> str:
    """`text`, short enough for an error message."""
    return text if len(text) <= max_len else text[:max_len] + "..."


def refused(message: str, field: str = "") -> PydanticCustomError:
    """A validation error about `field` of the object being validated ("[1].type" for a part of a list)."""
    return PydanticCustomError("refused", "{text}", {"text": message, "field": clip(field)})


Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class ParsedBody(Generic[Body]):
    """A body, and the fields of it that were ignored."""

    body: Body
    ignored: tuple[str, ...] = ()


def known_fields(model: type[BaseModel]) -> frozenset[str]:
    """Names that a body of this model gives meaning to."""
    aliases = model.aliases if issubclass(model, RequestBody) else {}
    return frozenset({*model.model_fields, *aliases})


def parse_body(model: type[Body], raw: bytes, unknown_fields: UnknownFields = "ignore") -> ParsedBody[Body]:
    """The body as `model`.

    Raises:
        BadRequestError: not UTF-8, not JSON, not an object, or a field is wrong; `param` names it.
        PayloadTooLargeError: too many objects, lists, keys or items.
    """
    data = parse_json(raw, known_fields(model))
    reading = _Reading(unknown_fields)
    token = _reading.set(reading)
    try:
        return ParsedBody(model.model_validate(data), tuple(reading.ignored))
    except ValidationError as error:
        raise bad_request(error.errors(include_url=False)[0]) from error
    finally:
        _reading.reset(token)


def bad_request(error: ErrorDetails) -> BadRequestError:
    """A validation error in OpenAI's words."""
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{clip(p)}" for p in error["loc"])
    named = str((error.get("ctx") or {}).get("field", ""))
    param = (param + (named if named.startswith("[") else f".{named}" if named else "")).lstrip(".")
    if error["type"] == "missing":
        return BadRequestError(f"'{param}' is required", param=param, code="missing_required_parameter")
    if error["type"] == "refused":
        code = "invalid_value" if named.startswith("[") or not named else "unsupported_parameter"
        return BadRequestError(f"{param}: {error['msg']}", param=param or None, code=code)
    given = reprlib.repr(error["input"])
    return BadRequestError(f"{param}: {error['msg']}, got {given}", param=param or None, code="invalid_value")
