"""Which objects of a schema are closed, and that what the closed schema allows the open one does too."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from server.grammar.closed_schema import closed

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_an_object_that_names_its_properties_is_closed_at_every_depth() -> None:
    schema = {
        "type": "object",
        "properties": {"at": CITY, "all": {"type": "array", "items": CITY}, "one": {"anyOf": [CITY, {"type": "null"}]}},
        "$defs": {"c": CITY},
    }
    found = closed(schema)
    parts = found["properties"]
    for part in (found, parts["at"], parts["all"]["items"], parts["one"]["anyOf"][0], found["$defs"]["c"]):
        assert part["additionalProperties"] is False
    assert "additionalProperties" not in schema


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (CITY | {"additionalProperties": {"type": "integer"}}, {"city": "Rome", "a": 1}),
        (CITY | {"patternProperties": {"^x": {}}}, {"city": "Rome", "xy": 1}),
        (CITY | {"required": ["city", "zip"]}, {"city": "Rome", "zip": 1}),
        (CITY | {"minProperties": 2}, {"city": "Rome", "zip": 1}),
        ({"type": "object"}, {"a": 1}),
        ({"allOf": [CITY, {"properties": {"zip": {}}, "required": ["zip"]}]}, {"city": "Rome", "zip": 1}),
        (CITY | {"anyOf": [{"properties": {"a": {}}, "required": ["a"]}]}, {"city": "Rome", "a": 1}),
        (
            {"$defs": {"c": CITY}, "$ref": "#/$defs/c", "properties": {"zip": {}}, "required": ["zip"]},
            {"city": "Rome", "zip": 1},
        ),
        (True, {"a": 1}),
    ],
)
def test_an_object_is_left_open_that_must_be(schema: Any, value: Any) -> None:
    jsonschema.validate(value, closed(schema))


def test_a_closed_object_refuses_what_it_does_not_name() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"city": "Rome", "zip": 1}, closed(CITY))
