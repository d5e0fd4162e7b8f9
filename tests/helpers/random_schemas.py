"""Random JSON schemas as clients write them, and some with keywords that few implementations know."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
PATTERNS = ("^[a-z]{2,5}$", "^[A-Z][0-9]+", "[0-9]$", r"^\d{4}-\d{2}$", r"^(red|green|blue)$", r"^\w+@\w+\.com$")
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "hostname", "uri", "duration", "regex")
CONSTANTS: tuple[Any, ...] = (None, True, 0, -1.5, "a", 'q"\\', "é\U0001f600", [], [1, "x"], {"k": None})
RARE: tuple[Schema, ...] = (
    {"not": {"type": "null"}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "integer"}},
    {"if": {"type": "integer"}, "then": {"minimum": 0}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "minProperties": 2},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "multipleOf": 0.5},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "string", "minLength": 5, "maxLength": 2},
    {"type": "string", "pattern": "^(?!a)"},
    {"$ref": "#/$defs/missing"},
    {},
)


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema; nested at most `depth` deep."""
    makers: list[Callable[[random.Random, int], Schema]] = [_string, _number, _integer, _choice, _plain]
    if depth > 0:
        makers += [_object, _object, _object, _array, _array, _union, _all_of, _with_definition]
    if rng.random() < 0.05:
        return dict(rng.choice(RARE))
    return rng.choice(makers)(rng, depth)


def _plain(rng: random.Random, _: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]]), "description": "any"}


def _string(rng: random.Random, _: int) -> Schema:
    kind = rng.randrange(5)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    low = rng.randrange(4)
    return (
        {"type": "string", "minLength": low, "maxLength": low + rng.randrange(9)} if kind == 2 else {"type": "string"}
    )


def _number(rng: random.Random, _: int) -> Schema:
    low = rng.choice([-10, 0, 0.5, 3])
    bounds: list[Schema] = [
        {},
        {"minimum": low},
        {"exclusiveMinimum": low, "maximum": low + 7.25},
        {"minimum": low, "exclusiveMaximum": low + rng.choice([1, 0.1, 100])},
    ]
    return {"type": "number", **rng.choice(bounds)}


def _integer(rng: random.Random, _: int) -> Schema:
    low = rng.randrange(-200, 200)
    bounds: list[Schema] = [{}, {"minimum": low}, {"maximum": low}, {"minimum": low, "exclusiveMaximum": low + 40}]
    return {"type": "integer", **rng.choice(bounds)}


def _choice(rng: random.Random, _: int) -> Schema:
    return {"const": rng.choice(CONSTANTS)} if rng.random() < 0.3 else {"enum": rng.sample(CONSTANTS, 3)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["a", "b", "name", "with space", 'q"uote', "é", "$ref2", "x-1"], rng.randrange(5))
    schema: Schema = {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    extra = rng.choice([None, False, False, True, "schema"])
    if extra is not None:
        schema["additionalProperties"] = random_schema(rng, depth - 1) if extra == "schema" else extra
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": random_schema(rng, depth - 1)}
    if rng.random() < 0.6:
        schema["minItems"] = rng.randrange(3)
        schema["maxItems"] = schema["minItems"] + rng.randrange(3)
    return schema


def _union(rng: random.Random, depth: int) -> Schema:
    return {
        rng.choice(["anyOf", "anyOf", "oneOf"]): [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    }


def _all_of(rng: random.Random, depth: int) -> Schema:
    return {"allOf": [_object(rng, depth), {"properties": {"a": random_schema(rng, 0)}}]}


def _with_definition(rng: random.Random, depth: int) -> Schema:
    """At the top one that refers to a definition, which may refer to itself; below, what is referred to."""
    node: Schema = {"type": "object", "properties": {"v": random_schema(rng, 0)}, "required": ["v"]}
    if depth < 3:
        return node
    if rng.random() < 0.5:
        node["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
