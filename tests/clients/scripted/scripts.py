"""The answers of the scripted model: a table of what the user says, and for each the text a model would write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.clients.scripted.conversation import Conversation, Tool, read

THOUGHT = "<think>\nThe user wants a short answer. I know it.\n</think>\n\n"
Answer = Callable[[Conversation, re.Match[str]], str]
# What a plain text goes on with.
CORPUS = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo.\n"
    "def add(a, b):\n    return a + b\n"
    "Once upon a time there was a server that every client could talk to. It answered in whole sentences.\n"
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20\n"
)
# What a property of a schema is filled with, by its name.
KNOWN: dict[str, Any] = {
    "name": "Ada",
    "age": 36,
    "city": "Paris",
    "location": "Paris",
    "country": "France",
    "capital": "Paris",
    "unit": "celsius",
    "answer": "Paris",
    "a": 2,
    "b": 3,
}


def answer_to(prompt: str, *, thinks: bool) -> str:
    """The assistant's whole turn after a prompt in ChatML, thinking and markers included."""
    conversation = read(prompt)
    assert conversation is not None, prompt  # only prompts that end at an assistant's turn come here
    return (THOUGHT if thinks else "") + _spoken(conversation)


def _spoken(conversation: Conversation) -> str:
    for pattern, answer in TABLE:
        if found := re.search(pattern, conversation.user, re.DOTALL | re.IGNORECASE):
            return answer(conversation, found)
    return "Hello! How can I help you today?"


def continuation(text: str) -> str:
    """What the corpus says after the longest end of `text` that it holds; nothing if it holds none."""
    for length in range(min(len(text), 80), 2, -1):
        place = CORPUS.find(text[-length:])
        if place >= 0:
            return CORPUS[place + length :]
    return ""


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """A call as the Hermes family writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def instance(schema: dict[str, Any], name: str = "", root: dict[str, Any] | None = None, **known: Any) -> Any:
    """A value of a JSON schema; properties in KNOWN, or given, have their value from there when its type fits."""
    root = root or schema
    if "$ref" in schema:
        target: Any = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        return instance(target, name, root, **known)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return instance(schema[key][0], name, root, **known)
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [None])[0])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    value = known.get(name, KNOWN.get(name))
    if kind == "object":
        wanted = schema.get("properties") or {}
        required = schema.get("required", list(wanted))
        return {k: instance(s, k, root, **known) for k, s in wanted.items() if k in required or k in known}
    if kind == "array":
        return [instance(schema.get("items") or {"type": "string"}, name, root, **known)]
    fits: Any = {"string": str, "integer": int, "number": (int, float), "boolean": bool}.get(kind)
    if fits is not None and isinstance(value, fits):
        return value
    return {"string": "text", "integer": 1, "number": 1.5, "boolean": True}.get(kind)


def call_tool(tool: Tool, **known: Any) -> str:
    """A call of `tool` with arguments that its schema allows."""
    return tool_call(tool.name, instance(tool.parameters, **known))


# The rules' answers


def say(text: str) -> Answer:
    """Always this text."""
    return lambda conversation, found: text


def weather(conversation: Conversation, found: re.Match[str]) -> str:
    """One call for each city named, then a sentence with the results."""
    cities = [city for city in found.groups() if city]
    if len(conversation.results) >= len(cities):
        return finish(conversation, "It is 18 degrees and sunny in " + " and ".join(cities) + ".")
    tool = conversation.tool("weather|temp|forecast")
    if tool is None:
        return finish(conversation, "I cannot look up the weather.")
    before = "Let me look. \n" if "first say" in conversation.user else ""
    return before + "\n".join(call_tool(tool, city=c, location=c) for c in cities)


def add(conversation: Conversation, found: re.Match[str]) -> str:
    """One call of a tool that adds, then the sum."""
    a, b = int(found[1]), int(found[2])
    tool = conversation.tool("add|sum|plus|calc")
    if tool is None or conversation.results:
        return finish(conversation, f"The sum is {a + b}.", answer=str(a + b))
    return tool_call(tool.name, dict(zip(tool.properties, (a, b), strict=False)))


def person(conversation: Conversation, found: re.Match[str]) -> str:
    """Ada, 36, through whichever tool takes a name, else as JSON."""
    takers = [
        t for t in conversation.tools if "name" in t.properties or "final" in t.name or "output" in t.name.lower()
    ]
    if takers:
        return call_tool(takers[0])
    return json.dumps({"name": "Ada", "age": 36})


def finish(conversation: Conversation, text: str, **known: Any) -> str:
    """`text`, or a framework's own last tool with it."""
    tool = conversation.tool(r"^final_answer$|^final_result$|^finish$|attempt_completion|^submit")
    if tool is None:
        return text
    return tool_call(tool.name, dict.fromkeys(list(tool.properties)[:1] or ["answer"], known.get("answer", text)))


def observed(conversation: Conversation, found: re.Match[str]) -> str:
    """The result that a framework hands on as a message of the user."""
    return finish(conversation, f"It is {found[1]}.")


def count(conversation: Conversation, found: re.Match[str]) -> str:
    """1 2 3 ..."""
    return " ".join(map(str, range(1, int(found[1]) + 1)))


def capital(conversation: Conversation, found: re.Match[str]) -> str:
    """Paris, in the form the prompt asks for."""
    fields = re.findall(r"\[\[ ## (\w+) ## \]\]", conversation.user.rpartition("Respond with")[2])
    if fields:  # DSPy's own markers
        return "\n\n".join(f"[[ ## {f} ## ]]\n{'' if f == 'completed' else 'Paris'}" for f in fields)
    if "Respond with a JSON object" in conversation.text:  # DSPy's adapter for JSON
        return json.dumps({"answer": "Paris"})
    return finish(conversation, "The capital of France is Paris.", answer="Paris")


def write_file(conversation: Conversation, found: re.Match[str]) -> str:
    """A coding agent's task of two turns: write the file with whatever tool the agent has, then say so."""
    if conversation.results:
        return finish(conversation, "I have written greeting.txt.")
    content = "hello from vecinfer\n"
    writer = conversation.tool(r"^(write|write_file|write_to_file|create_file)$")
    if writer is not None:
        path = next(p for p in writer.properties if "path" in p.lower() or "file" in p.lower())
        target = f"{found[1]}/greeting.txt" if found[1] else "greeting.txt"
        return call_tool(writer, **{path: target, "content": content})
    shell = conversation.tool(r"shell|bash|exec_command|run_command|run_commands|terminal|execute")
    if shell is not None:
        return shell_call(shell, "printf 'hello from vecinfer\\n' > greeting.txt")
    if "SEARCH" in conversation.text and "REPLACE" in conversation.text:  # aider
        return f"greeting.txt\n```\n<<<<<<< SEARCH\n=======\n{content}>>>>>>> REPLACE\n```\n"
    return "Write a greeting file"


def shell_call(tool: Tool, line: str) -> str:
    """A call of a tool that runs a command, given as a line or as words."""
    name = next((p for p in tool.properties if p in ("command", "cmd", "commands", "script")), "command")
    schema = tool.properties.get(name) or {}
    words: Any = ["bash", "-lc", line] if name == "command" else [line]
    return tool_call(tool.name, instance(tool.parameters) | {name: words if schema.get("type") == "array" else line})


TABLE: tuple[tuple[str, Answer], ...] = (
    (r"greeting\.txt(?: in the folder (\S+))?", write_file),
    (r"^Observation:\s*(18 degrees[^\n]*)", observed),
    (r"weather in (\w+)(?: and (?:in )?(\w+))?", weather),
    (r"add (\d+) and (\d+)", add),
    (r"\bAda\b", person),
    (r"count to (\d+)", count),
    (r"capital of France", capital),
    (r"Unicode", say("Grüße aus 東京 🗼, naïve café.")),
    (r"yes or no", say("yes")),
    (r"markdown", say("# Title\n\n- one\n- two\n")),
)
