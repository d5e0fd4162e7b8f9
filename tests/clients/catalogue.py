"""Which clients there are, the environment each one lives in, and the checks that its script holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

HERE = Path(__file__).parent
# Run by CI, but for the demo model's clients, whose codec is fitted first; the rest by `deploy/run-tests --full`.
QUICK_ENVIRONMENT = "quick"
_PYTHON_CHECK = re.compile(r"^@check\n(?:async )?def (\w+)\(", re.MULTILINE)
_NODE_CHECK = re.compile(r'^check\("(\w+)"', re.MULTILINE)


@dataclass(frozen=True)
class Client:
    """A script under python/ or node/, and the environment whose packages it imports."""

    language: Literal["python", "node"]
    environment: str
    name: str

    @property
    def script(self) -> Path:
        suffix = "py" if self.language == "python" else "mjs"
        return HERE / self.language / f"{self.name}.{suffix}"

    @property
    def id(self) -> str:
        return f"{self.language}-{self.name}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The servers it talks to."""
        return ("demo",) if re.search(r"\bDEMO\b", self.script.read_text(encoding="utf-8")) else ("plain", "thinking")

    @property
    def is_quick(self) -> bool:
        """Whether CI has the time for it."""
        return self.environment == QUICK_ENVIRONMENT and "demo" not in self.kinds

    def checks(self) -> list[str]:
        """The names of the script's checks; the script is read, not run."""
        pattern = _PYTHON_CHECK if self.language == "python" else _NODE_CHECK
        return pattern.findall(self.script.read_text(encoding="utf-8"))


_NAMES: dict[tuple[Literal["python", "node"], str], tuple[str, ...]] = {
    ("python", "quick"): (
        "openai_sdk",
        "openai_demo",
        "openai_responses",
        "anthropic_sdk",
        "pydantic_ai_client",
        "openai_agents",
        "curl_client",
    ),
    ("python", "frameworks"): (
        "langchain_client",
        "smolagents_client",
        "autogen_client",
        "ag2_client",
        "haystack_client",
        "agno_client",
        "chatlas_client",
        "magentic_client",
        "semantic_kernel_client",
        "inspect_client",
        "llm_cli",
    ),
    ("python", "litellm"): (
        "litellm_client",
        "instructor_client",
        "strands_client",
        "llama_index_client",
        "dspy_client",
        "mirascope_client",
        "google_adk_client",
        "guidance_client",
        "outlines_client",
        "griptape_client",
    ),
    ("python", "crewai"): ("crewai_client",),
    ("python", "lm_eval"): ("lm_eval_client",),
    ("node", "quick"): ("openai_sdk", "anthropic_sdk", "ai_sdk"),
    ("node", "frameworks"): ("langchain_js", "openai_agents_js"),
}
CLIENTS = tuple(Client(language, env, name) for (language, env), names in _NAMES.items() for name in names)


def cases(language: str) -> list[object]:
    """A pytest parameter for each check of each client of a language."""
    return [
        pytest.param(client, check, id=f"{client.name}-{check}", marks=() if client.is_quick else full)
        for client in CLIENTS
        if client.language == language
        for check in client.checks()
    ]


full = (pytest.mark.full,)
