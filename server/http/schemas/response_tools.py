"""Tools of the Responses API: flat functions, alone or inside a namespace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from server.http.schemas.base import clip, note_ignored, refused
from server.http.schemas.tools import MAX_TOOLS, kind_of_tool, read_function
from server.model.conversation import Json, ToolSpec


@dataclass(frozen=True)
class OfferedTool:
    """A function under the name that the model sees, and under the caller's.

    Attributes:
        spec: its name is `name`, with the namespace before it where another tool has that name already.
        namespace: empty outside a namespace.
    """

    spec: ToolSpec
    name: str
    namespace: str = ""

    def to_wire(self) -> Json:
        """The tool as the Responses API shows it: flat, without a `function` object."""
        return {"type": "function", **self.spec.to_wire()["function"], "strict": self.spec.strict}


def read_flat_tools(value: Any) -> tuple[OfferedTool, ...]:
    """Function tools, also inside a namespace; others are ignored and noted."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise refused(f"must be a list of at most {MAX_TOOLS} tools")
    found: list[OfferedTool] = []
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise refused("a tool must be an object", f"[{i}]")
        found.extend(_functions(entry, i))
    if len(found) > MAX_TOOLS:
        raise refused(f"at most {MAX_TOOLS} functions, got {len(found)}")
    tools: dict[str, OfferedTool] = {}
    # Those outside a namespace first: they keep their names.
    for tool in sorted(found, key=lambda tool: bool(tool.namespace)):
        flat = f"{tool.namespace}.{tool.name}" if tool.namespace and tool.name in tools else tool.name
        if flat in tools:
            raise refused(f"two tools have the name '{flat}'")
        tools[flat] = replace(tool, spec=replace(tool.spec, name=flat))
    return tuple(tools.values())


def _functions(entry: Json, i: int) -> Iterator[OfferedTool]:
    kind = kind_of_tool(entry, i)
    if kind == "function":
        # Chat's form, with the function inside, is taken too.
        nested = entry.get("function")
        spec = read_function(nested, f"[{i}].function") if isinstance(nested, dict) else read_function(entry, f"[{i}]")
        yield OfferedTool(spec, spec.name)
    elif kind == "namespace" and isinstance(entry.get("tools"), list):
        namespace = entry.get("name")
        if not isinstance(namespace, str) or not namespace:
            raise refused("must be a string", f"[{i}].name")
        for at, inner in enumerate(entry["tools"]):
            if isinstance(inner, dict) and inner.get("type", "function") == "function":
                spec = read_function(inner, f"[{i}].tools[{at}]")
                yield OfferedTool(spec, spec.name, namespace)
            else:
                note_ignored(f"tools[{i}].tools[{at}]")
    else:
        note_ignored(f"tools[{i}] ({clip(kind, 40)})")
