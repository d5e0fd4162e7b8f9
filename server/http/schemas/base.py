"""What every request body has in common: strict types, nulls mean "not given", nothing is ignored in silence."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from server.errors import BadRequestError

Neutral = Callable[[Any], bool]


def always(value: Any) -> bool:
    """A field that never changes the answer."""
    return True


def one_of(*allowed: Any) -> Neutral:
    """A field that only has these values left to take (types compared too: 1 is not true)."""
    return lambda value: any(type(value) is type(a) and value == a for a in allowed)


class RequestBody(BaseModel):
    """A strict request body.

    `neutral` names the fields of the OpenAI API that are not implemented, each with a test for the values that
    ask for nothing; those are dropped, any other value is refused by name, and so is a field nobody knows.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    neutral: ClassVar[dict[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept: dict[str, Any] = {}
        for name, value in data.items():
            if value is None or (name in cls.neutral and cls.neutral[name](value)):
                continue
            if name in cls.neutral:
                raise refused(f"this value of '{name}' is not supported by this server; leave the field out", name)
            if name not in cls.model_fields:
                raise refused(f"unknown field '{clip(name)}'; it is refused because it could change the answer", name)
            kept[name] = value
        return kept


def clip(text: str, max_len: int = 80) -> str:
    """`text`, short enough for an error message."""
    return text if len(text) <= max_len else text[:max_len] + "..."


def refused(message: str, field: str = "") -> PydanticCustomError:
    """A validation error about `field` of the object being validated ("[1].type" for a part of a list)."""
    return PydanticCustomError("refused", "{text}", {"text": message, "field": clip(field)})


Body = TypeVar("Body", bound=BaseModel)


def parse_body(model: type[Body], raw: bytes) -> Body:
    """The body as `model`.

    Raises:
        BadRequestError: not UTF-8, not JSON, not an object, or a field is wrong; `param` names it.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(data).__name__}", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from error


def _bad_request(error: ErrorDetails) -> BadRequestError:
    """The first validation error in OpenAI's words."""
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{clip(p)}" for p in error["loc"])
    field = str((error.get("ctx") or {}).get("field", ""))
    param = (param + (field if field.startswith("[") else f".{field}" if field else "")).lstrip(".")
    if error["type"] == "missing":
        return BadRequestError(f"'{param}' is required", param=param, code="missing_required_parameter")
    if error["type"] == "refused":
        code = "invalid_value" if field.startswith("[") or not field else "unsupported_parameter"
        return BadRequestError(f"{param}: {error['msg']}", param=param or None, code=code)
    given = reprlib.repr(error["input"])
    return BadRequestError(f"{param}: {error['msg']}, got {given}", param=param or None, code="invalid_value")
