"""JSON schemas of the fields that are read by hand, for /openapi.json: each accepts what its reader accepts.

What JSON Schema cannot say is left out: names that must differ or occur elsewhere, token ids of a vocabulary, grammars.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}


def either(*options: Schema) -> Schema:
    """Any of them."""
    return {"anyOf": list(options)}


def listed(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """A list of `items`."""
    limits = {"minItems": least or None, "maxItems": most}
    return {"type": "array", "items": items} | {k: v for k, v in limits.items() if v is not None}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these fields, and any others; `optional` ones may be null."""
    nullable = {name: either(schema, NULL) for name, schema in (optional or {}).items()}
    return {"type": "object", "properties": {**required, **nullable}, "required": list(required)}


def kind_of(*kinds: str) -> Schema:
    """One of these values of `type`."""
    return {"enum": list(kinds)}


def other_kind(*known: str) -> Schema:
    """An object of another `type` than these, which is ignored."""
    return record({"type": {"type": "string", "not": {"enum": list(known)}}})


# Of `content_text` in chat_message.py.
_TEXT_PART = either(
    STRING,
    record({"text": STRING}, {"type": kind_of("text", "input_text", "output_text")}),
    record({"type": kind_of("refusal"), "refusal": STRING}),
    record({"type": kind_of("thinking", "reasoning")}),
)
CONTENT = either(*_TEXT_PART["anyOf"], listed(_TEXT_PART))
ARGUMENTS = either(STRING, OBJECT, {"type": "array"})

# Of `read_function` in tools.py; without a length: names are matched as a whole.
_NAME: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9_.:/-]+$", "minLength": 1, "maxLength": 128}
_FUNCTION_FIELDS: dict[str, Schema] = {"description": STRING, "parameters": OBJECT}
FUNCTION = record({"name": _NAME}, _FUNCTION_FIELDS)
_CHAT_FUNCTION = record({"function": FUNCTION}, {"type": kind_of("function")})
_FLAT_FUNCTION = {
    **record({"name": _NAME}, {**_FUNCTION_FIELDS, "type": kind_of("function")}),
    "not": {"properties": {"function": OBJECT}, "required": ["function"]},
}
TOOLS = listed(either(_CHAT_FUNCTION, _FLAT_FUNCTION, other_kind("function")), most=512)
FUNCTIONS = listed(FUNCTION, most=512)
_NAMESPACE = record(
    {"type": kind_of("namespace"), "name": {"type": "string", "minLength": 1}, "tools": listed(_FLAT_FUNCTION)}
)
FLAT_TOOLS = listed(either(_CHAT_FUNCTION, _FLAT_FUNCTION, _NAMESPACE, other_kind("function", "namespace")), most=512)
ANTHROPIC_TOOLS = listed(
    either(
        record({"name": _NAME, "input_schema": OBJECT}, {"description": STRING, "type": STRING}),
        record({"name": _NAME}, {"description": STRING, "type": kind_of("custom", "function"), "input_schema": OBJECT}),
        {
            **other_kind("custom", "function"),
            "not": {"required": ["input_schema"]},
        },
    ),
    most=512,
)

# Of `read_choice` in tools.py.
_NAMED = either(record({"function": record({"name": STRING})}), record({"name": STRING}))
_ALLOWED = record({"tools": listed(_NAMED)}, {"mode": STRING})
CHOICE = either(
    kind_of("none", "auto", "required", "any"),
    record({"type": kind_of("allowed_tools"), "allowed_tools": _ALLOWED}),
    {
        **record({"type": kind_of("allowed_tools"), "tools": listed(_NAMED)}, {"mode": STRING}),
        "not": {"required": ["allowed_tools"]},
    },
    record({"function": record({"name": STRING})}, {"type": kind_of("function")}),
    {
        **record({"name": STRING}, {"type": kind_of("function", "tool")}),
        "not": {"required": ["function"]},
    },
)

# Of `_thinking` in chat.py.
_BUDGET: Schema = {"type": "integer", "minimum": 0}
THINKING = record({}, {"budget_tokens": _BUDGET, "max_tokens": _BUDGET})

# Of `response_format` in structured.py.
_ANY_SCHEMA: Schema = {"type": ["object", "boolean"]}
_SOME_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 200_000}
FORMAT = either(
    record({"type": kind_of("text")}),
    {"type": "object", "maxProperties": 0},
    record({"type": kind_of("json_object")}, {"schema": _ANY_SCHEMA}),
    record({"type": kind_of("json_schema"), "json_schema": record({"schema": _ANY_SCHEMA})}),
    {
        **record({"type": kind_of("json_schema"), "schema": _ANY_SCHEMA}),
        "not": {"required": ["json_schema"]},
    },
    record({"type": kind_of("regex"), "pattern": _SOME_TEXT}, {"value": NULL}),
    record({"type": kind_of("regex", "grammar"), "value": _SOME_TEXT}),
    record({"type": kind_of("grammar"), "grammar": _SOME_TEXT}, {"value": NULL}),
)

# Of `prompts` in completions.py.
_PROMPT_TEXT: Schema = {"type": "string", "minLength": 1}
_IDS = listed({"type": "integer", "minimum": 0}, least=1)


PROMPT = either(_PROMPT_TEXT, _IDS)


def prompts_schema(most: int) -> Schema:
    """A text, token ids, or up to `most` of either."""
    return either(_PROMPT_TEXT, _IDS, listed(either(_PROMPT_TEXT, _IDS), 1, most))


# Of `_stops` and `_biases` in generation.py.
def stops_schema(most: int) -> Schema:
    """A text or up to `most` of them."""
    return either(STRING, listed(STRING, most=most))


_TOKEN_ID = r"^[0-9]{1,9}$"
_BIAS: Schema = {"type": "number", "minimum": -100, "maximum": 100}
_TOKEN = either({"type": "integer", "minimum": 0, "maximum": 999_999_999}, {"type": "string", "pattern": _TOKEN_ID})
_PAIR: Schema = {
    "type": "array",
    "prefixItems": [_TOKEN, either(_BIAS, {"const": False})],
    "minItems": 2,
    "maxItems": 2,
}
BIASES = either(
    {"type": "object", "propertyNames": {"pattern": _TOKEN_ID}, "additionalProperties": _BIAS}, listed(_PAIR)
)

# Of content_blocks.py.
_TEXT_BLOCK = record({"type": kind_of("text"), "text": STRING})
_TEXTS = either(STRING, listed(_TEXT_BLOCK))
_DOCUMENT = record(
    {
        "type": kind_of("document"),
        "source": either(
            record({"type": kind_of("text"), "data": STRING}), record({"type": kind_of("content"), "content": _TEXTS})
        ),
    }
)
_SEARCH_RESULT: Schema = {
    "type": "object",
    "properties": {"type": kind_of("search_result"), "content": _TEXTS},
    "required": ["type"],
}
_FOREIGN = record(
    {
        "type": either(
            kind_of("redacted_thinking", "tool_reference", "compaction", "fallback"),
            {"type": "string", "pattern": "(server_tool_use|mcp_tool_use|_tool_result)$"},
        )
    }
)
_READ_TEXT = (_TEXT_BLOCK, _DOCUMENT, _SEARCH_RESULT, _FOREIGN)
TEXT_BLOCKS = either(STRING, listed(either(*_READ_TEXT)))
BLOCKS = either(
    STRING,
    listed(
        either(
            *_READ_TEXT,
            record({"type": kind_of("thinking"), "thinking": STRING}),
            {
                "type": "object",
                "properties": {"type": kind_of("tool_use"), "id": STRING, "name": STRING, "input": OBJECT},
                "required": ["type", "id", "name"],
            },
            record({"type": kind_of("tool_result"), "tool_use_id": STRING}, {"content": TEXT_BLOCKS}),
        )
    ),
)

# Of `InputItem` in response_items.py.
_ITEM_PART = either(*_TEXT_PART["anyOf"], record({"type": kind_of("reasoning_text", "summary_text"), "text": STRING}))
_ITEM_TEXT = either(*_TEXT_PART["anyOf"], listed(_ITEM_PART))
_ID: Schema = {"type": "string", "maxLength": 256}
_SOME_ID: Schema = {**_ID, "minLength": 1}
_ITEM_FIELDS: dict[str, Schema] = {
    "id": _ID,
    "role": kind_of("system", "developer", "user", "assistant"),
    "content": _ITEM_TEXT,
    "call_id": _ID,
    "name": _ID,
    "namespace": _ID,
    "arguments": ARGUMENTS,
    "input": STRING,
    "output": _ITEM_TEXT,
    "summary": _ITEM_TEXT,
    "encrypted_content": STRING,
}


def _item(kinds: tuple[str, ...], **required: Schema) -> Schema:
    optional = {name: schema for name, schema in _ITEM_FIELDS.items() if name not in required}
    if "message" in kinds:
        return record(required, {**optional, "type": kind_of(*kinds)})
    return record({"type": kind_of(*kinds), **required}, optional)


_KNOWN_ITEMS = (
    _item(("message",), role=_ITEM_FIELDS["role"]),
    _item(("function_call", "custom_tool_call"), call_id=_SOME_ID, name=_SOME_ID),
    _item(("function_call_output", "custom_tool_call_output"), call_id=_SOME_ID),
    _item(("reasoning",)),
    _item(("item_reference",), id=_SOME_ID),
)
_KINDS = (
    "message", "function_call", "custom_tool_call", "function_call_output", "custom_tool_call_output", "reasoning",
    "item_reference",
)  # fmt: skip
ITEMS = either(STRING, listed(either(*_KNOWN_ITEMS, other_kind(*_KINDS)), most=4096))

# Of `_texts` in calibration.py.
_SAYS_SOMETHING: Schema = {"type": "string", "pattern": r"\S"}
CALIBRATION_TEXTS = either(_SAYS_SOMETHING, listed(_SAYS_SOMETHING, least=1))
