"""What an answer may contain: how its text is divided, which tools it may call, where it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.output.deltas import OutputState


@dataclass(frozen=True)
class OutputSpec:
    """How the text of one request's answers is read.

    Attributes:
        format: the model's markers for reasoning and tool calls.
        tools: the tools that may be called, as the request names them.
        starts_in: "reasoning" where the prompt ends inside the thinking markers.
        parallel_tool_calls: False ends a choice after its first call.
    """

    format: Any
    tools: tuple[Any, ...] = ()
    starts_in: OutputState = "content"
    parallel_tool_calls: bool = True
