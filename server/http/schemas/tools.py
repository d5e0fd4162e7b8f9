"""Tools of a chat request: `tools` and `tool_choice`, and their older names `functions` and `function_call`."""

from __future__ import annotations

import json
import re
from typing import Any

from server.http.schemas.base import clip, note_ignored, refused
from server.model.conversation import Json, ToolChoice, ToolSpec

MAX_TOOLS = 512
MAX_PARAMETER_CHARS = 200_000
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


def read_tools(value: Any, field: str = "tools") -> tuple[ToolSpec, ...]:
    """OpenAI's list of tools; those that are no functions are ignored and noted."""
    if not isinstance(value, list):
        raise refused("must be a list")
    if len(value) > MAX_TOOLS:
        raise refused(f"at most {MAX_TOOLS} tools, got {len(value)}")
    tools = []
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise refused("a tool must be an object", f"[{i}]")
        kind = kind_of_tool(entry, i)
        if kind != "function":
            note_ignored(f"{field}[{i}] ({clip(kind, 40)})")
            continue
        nested = entry.get("function")
        place = f"[{i}].function" if isinstance(nested, dict) else f"[{i}]"
        tools.append(read_function(nested if isinstance(nested, dict) else entry, place))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refused(f"two tools have the name '{twice}'")
    return tuple(tools)


def kind_of_tool(entry: Json, i: int, default: str = "function") -> str:
    """What the tool at place `i` is."""
    kind = entry.get("type")
    if kind is not None and not isinstance(kind, str):
        raise refused("must be a string", f"[{i}].type")
    return default if kind is None else kind


def read_functions(value: Any) -> tuple[ToolSpec, ...]:
    """The older list of functions."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise refused("must be a list of functions")
    if len(value) > MAX_TOOLS:
        raise refused(f"at most {MAX_TOOLS} functions, got {len(value)}")
    return tuple(read_function(entry, f"[{i}]") for i, entry in enumerate(value))


def read_function(entry: Json, place: str, schema_field: str = "parameters") -> ToolSpec:
    """One function; `place` says where it stands, for errors."""
    name, parameters = entry.get("name"), entry.get(schema_field)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refused("must be 1 to 128 letters, digits, '_', '-', '.', ':' or '/'", f"{place}.name")
    if parameters is not None and not isinstance(parameters, dict):
        raise refused("must be a JSON schema", f"{place}.{schema_field}")
    if parameters is not None and len(json.dumps(parameters)) > MAX_PARAMETER_CHARS:
        raise refused(f"is longer than {MAX_PARAMETER_CHARS} characters", f"{place}.{schema_field}")
    description = entry.get("description")
    if description is not None and not isinstance(description, str):
        raise refused("must be a string", f"{place}.description")
    return ToolSpec(name, description or "", parameters or None, entry.get("strict") is True)


def read_choice(value: Any) -> ToolChoice:
    """OpenAI's `tool_choice`: a mode, a function's name, or a set of allowed tools."""
    if isinstance(value, str):
        mode = {"any": "required"}.get(value, value)
        if mode not in ("none", "auto", "required"):
            raise refused(f"'{clip(value)}' is not none, auto, required, a function or allowed_tools")
        return ToolChoice(mode)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise refused("must be a string or an object")
    if value.get("type") == "allowed_tools":
        allowed = value.get("allowed_tools", value)
        if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
            raise refused("must be a list", "allowed_tools.tools")
        if not isinstance(allowed.get("mode"), str | None):
            raise refused("must be a string", "allowed_tools.mode")
        names = tuple(_name_of(tool, f"allowed_tools.tools[{i}]") for i, tool in enumerate(allowed["tools"]))
        return ToolChoice("required" if allowed.get("mode") == "required" else "auto", names)
    return ToolChoice("required", (_name_of(value, "function"),))


def _name_of(tool: Any, place: str) -> str:
    if isinstance(tool, dict):
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise refused("must name a function", f"{place}.name")


def check_choice(tools: tuple[ToolSpec, ...], choice: ToolChoice) -> str | None:
    """What is wrong with a choice among these tools, None when nothing is."""
    known = {tool.name for tool in tools}
    unknown = next((name for name in choice.names or () if name not in known), None)
    if unknown is not None:
        return f"the function '{clip(unknown)}' is not among the tools of this request"
    if choice.mode == "required" and not (known if choice.names is None else choice.names):
        return "a tool is required, but the request has none"
    return None
