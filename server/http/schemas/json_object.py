"""A JSON object read with bounded work: only fields that are looked at become Python objects."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
import pydantic_core

from server.errors import BadRequestError, PayloadTooLargeError

# Objects, lists and keys of one body: 4,096 messages with calls and tools have a tenth of it.
MAX_STRUCTURE = 100_000
# Items of lists, which are numbers mostly; bodies of more hold 64 prompts of 32,768 token ids and over.
MAX_ITEMS = 2_097_152
# A field that nobody reads is not built when it is larger.
LARGE_FIELD_BYTES = 262_144

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse_json(raw: bytes, known: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object; large fields that are not `known` are there by name, with a text in the place of their value.

    Raises:
        BadRequestError: not UTF-8, not JSON, or not an object.
        PayloadTooLargeError: too many objects, lists, keys or items.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    _check_structure(raw)
    try:
        fields = _FIELDS.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return _whole(raw)
    return {name: _value(value, name in known) for name, value in fields.items()}


def _whole(raw: bytes) -> dict[str, Any]:
    """What is no object of fields, read by the parser whose messages tell where and why."""
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise BadRequestError(f"the body must be a JSON object, got {type(data).__name__}", code="invalid_json")
    return data


def _value(value: msgspec.Raw, is_known: bool) -> Any:
    raw = bytes(value)
    if len(raw) > LARGE_FIELD_BYTES and not is_known:
        return "(not read)"
    try:
        return pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error


def _check_structure(raw: bytes) -> None:
    if raw.count(b"{") + raw.count(b"[") + raw.count(b":") <= MAX_STRUCTURE and raw.count(b",") <= MAX_ITEMS:
        return
    # Once more, without what stands in strings: text may be full of these characters.
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    if outside.count(b"{") + outside.count(b"[") + outside.count(b":") > MAX_STRUCTURE:
        raise PayloadTooLargeError(f"the body has more than {MAX_STRUCTURE:,} objects, lists and keys")
    if outside.count(b",") > MAX_ITEMS:
        raise PayloadTooLargeError(f"the body has more than {MAX_ITEMS:,} list items")
