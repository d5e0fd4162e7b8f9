"""POST /v1/embeddings: the request."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.http.schemas.base import RequestBody
from server.http.schemas.completions import prompts
from server.http.schemas.described import prompts_schema
from server.model.conversation import TextPrompt

MAX_INPUTS = 2048

Inputs = Annotated[
    tuple[TextPrompt, ...],
    BeforeValidator(lambda value: prompts(value, MAX_INPUTS)),
    WithJsonSchema(prompts_schema(MAX_INPUTS)),
]


class EmbeddingBody(RequestBody):
    """Texts, or token ids of the embedding model."""

    silent: ClassVar[frozenset[str]] = frozenset({"user", "truncate", "task_type", "prompt_name"})

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
