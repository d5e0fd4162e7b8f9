"""POST /admin/calibrations: the request."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, JsonValue, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from quant_core.calibrate.options import Allocation, PresetName, TransformName
from server.calibration.options import SETTINGS, WIRE_NAMES, JobOptions, configured_options
from server.config import ServerConfig
from server.errors import BadRequestError
from server.http.schemas.base import RequestBody, refused
from server.http.schemas.chat_message import ChatMessage
from server.http.schemas.described import CALIBRATION_TEXTS

Bits = Annotated[int, Field(ge=1, le=4)]


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise refused("must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _conversations(value: Any) -> Any:
    """One conversation stands for a list of one."""
    return [value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(_texts),
    WithJsonSchema(CALIBRATION_TEXTS),
]
Conversation = Annotated[list[ChatMessage], Field(min_length=1)]


class _OneOrMore:
    """A conversation, or a list of them, in the description."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        several = handler(core_schema)
        return {"anyOf": [several["items"], several]}


Conversations = Annotated[list[Conversation], BeforeValidator(_conversations), Field(min_length=1), _OneOrMore]


# Bits of both or of each; text of somewhere.
_RULES: list[JsonValue] = [
    {
        "anyOf": [
            {"properties": {"bits": {"type": "null"}}},
            {"properties": {"key_bits": {"type": "null"}, "value_bits": {"type": "null"}}},
        ]
    },
    {
        "anyOf": [
            {"properties": {"builtin": {"enum": [None, True]}}},
            {"properties": {"text": {"not": {"type": "null"}}}, "required": ["text"]},
            {"properties": {"messages": {"not": {"type": "null"}}}, "required": ["messages"]},
        ]
    },
]


class CalibrationBody(RequestBody):
    """What to calibrate on and to how many bits. Without text or messages, on the built-in prompts."""

    model_config = ConfigDict(json_schema_extra={"allOf": _RULES})

    closed: ClassVar[bool] = True

    text: Texts | None = None
    messages: Conversations | None = None
    builtin: bool | None = None
    preset: PresetName | None = None
    samples: int | None = Field(None, ge=2, le=4096)
    sample_len: int | None = Field(None, ge=64, le=131072)
    bits: Bits | None = None
    key_bits: Bits | None = None
    value_bits: Bits | None = None
    transform: TransformName | None = None
    allocation: Allocation | None = None
    codebooks_per_head: Literal[1, 2, 4] | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    max_kl: float | None = Field(None, gt=0, le=100)
    activate: bool = False

    def check(self) -> None:
        """Rules across fields.

        Raises:
            BadRequestError: naming the parameter.
        """
        if self.bits is not None and (self.key_bits or self.value_bits) is not None:
            raise BadRequestError("give 'bits', or 'key_bits' and 'value_bits', not both", param="bits")
        if self.builtin is False and self.text is None and self.messages is None:
            raise BadRequestError("with 'builtin': false, 'text' or 'messages' is needed", param="builtin")

    def options(self, config: ServerConfig, conversation_texts: tuple[str, ...]) -> JobOptions:
        """The job's options; what is not given comes from the configuration."""
        given = {name: getattr(self, WIRE_NAMES.get(name, name)) for name in SETTINGS}
        given["key_bits"], given["value_bits"] = self.key_bits or self.bits, self.value_bits or self.bits
        texts = (self.text or ()) + conversation_texts
        return dataclasses.replace(
            configured_options(config),
            **{name: value for name, value in given.items() if value is not None},
            texts=texts,
            builtin=not texts if self.builtin is None else self.builtin,
            activate=self.activate,
        )
