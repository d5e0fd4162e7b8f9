"""Schemas whose objects hold the properties they name and no others, unless they say so.

JSON Schema leaves an object open that does not forbid further properties. A weak model then writes names of its own,
which the tool or the program that asked does not know. llama-server and xgrammar close such objects too. What is held
to the closed schema is valid by the open one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keywords by which other schemas have a say in the same object: closing one part would forbid what another asks for.
_SHARED = frozenset(("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef"))
_SHARED |= {"dependentSchemas", "dependentRequired", "dependencies", "propertyNames", "minProperties"}
_SHARED |= {"additionalProperties", "unevaluatedProperties", "patternProperties"}
_MEMBERS = ("anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions")


# What may stand beside a reference without adding to it.
_ANNOTATIONS = frozenset(("$ref", "title", "description", "default", "examples", "deprecated", "$comment"))


def closed(schema: Any) -> Any:
    """A copy of a JSON schema with `additionalProperties: false` where an object names all it requires.

    Left open: what says something of further properties, is put together of several schemas, or requires a property
    that it does not name. Definitions are left open too where any reference to one adds keywords of its own.
    """
    return _closed(schema, is_part=False, open_definitions=_adds_to_references(schema))


def _adds_to_references(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        if "allOf" in schema or ("$ref" in schema and not schema.keys() <= _ANNOTATIONS):
            return True
        return any(_adds_to_references(value) for value in schema.values())
    return isinstance(schema, list) and any(_adds_to_references(value) for value in schema)


def _closed(schema: Any, *, is_part: bool, open_definitions: bool) -> Any:
    """`is_part`: a schema beside this one describes the same value."""

    def closed_one(part: Any, is_part: bool) -> Any:
        return _closed(part, is_part=is_part, open_definitions=open_definitions)

    if not isinstance(schema, Mapping):
        return schema
    out = dict(schema)
    # Beside other keywords on objects, the alternatives describe one value together with them.
    shares = "properties" in schema or "allOf" in schema
    for key in _MEMBERS:
        if isinstance(schema.get(key), list):
            out[key] = [closed_one(s, key != "prefixItems" and (is_part or shares)) for s in schema[key]]
    for key in _NAMED:
        if isinstance(schema.get(key), Mapping):
            is_open = key != "properties" and open_definitions
            out[key] = {name: closed_one(s, is_open) for name, s in schema[key].items()}
    if "items" in schema:
        out["items"] = closed_one(schema["items"], False)
    properties, required = schema.get("properties"), schema.get("required", [])
    if is_part or _SHARED & schema.keys() or not isinstance(properties, Mapping) or not isinstance(required, list):
        return out
    if properties and all(name in properties for name in required):
        out["additionalProperties"] = False
    return out
