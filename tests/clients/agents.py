"""Coding agents: how each is started without a terminal, on its own home, with the server as its only model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.clients.environments import node_folder, python_of

LIMIT_S = 180
TASK = "Create the file greeting.txt in the folder {folder} with a greeting in it."


@dataclass(frozen=True)
class Run:
    """What an agent is started with.

    Attributes:
        url: the server, without /v1.
        home: an empty folder, the agent's home.
        work: a git repository without files, where the task is done.
    """

    url: str
    home: Path
    work: Path

    @property
    def task(self) -> str:
        return TASK.format(folder=self.work)

    def write(self, name: str, text: str) -> Path:
        """A file of the agent's configuration."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


@dataclass(frozen=True)
class Command:
    """An agent's command line and what its environment has besides HOME and PATH."""

    words: list[str | Path]
    environment: dict[str, str]


def codex(run: Run) -> Command:
    """Speaks the Responses API only."""
    run.write(
        ".codex/config.toml",
        f"""model = "scripted"
model_provider = "vecinfer"
check_for_update_on_startup = false
[model_providers.vecinfer]
name = "vecinfer"
base_url = "{run.url}/v1"
wire_api = "responses"
[analytics]
enabled = false
""",
    )
    words = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", run.task]
    return Command([_bin("codex"), *words], {"CODEX_HOME": str(run.home / ".codex")})


def claude_code(run: Run) -> Command:
    """Speaks the Messages API."""
    program = next(node_folder("agents").glob("node_modules/@anthropic-ai/claude-code-*/claude"))
    environment = {
        "ANTHROPIC_BASE_URL": run.url,
        "ANTHROPIC_API_KEY": "local",
        "ANTHROPIC_MODEL": "scripted",
        "ANTHROPIC_SMALL_FAST_MODEL": "scripted",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    return Command([program, "-p", "--permission-mode", "acceptEdits", run.task], environment)


def opencode(run: Run) -> Command:
    """Speaks chat completions, through the AI SDK."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "vecinfer",
        "options": {"baseURL": f"{run.url}/v1", "apiKey": "local"},
        "models": {"scripted": {"name": "scripted", "tool_call": True, "limit": {"context": 131072, "output": 4096}}},
    }
    settings = {
        "autoupdate": False,
        "share": "disabled",
        "model": "vecinfer/scripted",
        "small_model": "vecinfer/scripted",
        "provider": {"vecinfer": provider},
    }
    run.write(".config/opencode/opencode.json", json.dumps(settings))
    # Some processors need the "baseline" build; it runs on all.
    programs = sorted(node_folder("agents").glob("node_modules/opencode-*/bin/opencode"))
    names = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")
    return Command([programs[-1], "run", run.task], {f"OPENCODE_DISABLE_{name}": "1" for name in names})


def qwen_code(run: Run) -> Command:
    """Speaks chat completions, through the openai package."""
    environment = {"OPENAI_API_KEY": "local", "OPENAI_BASE_URL": f"{run.url}/v1", "OPENAI_MODEL": "scripted"}
    run.write(".qwen/settings.json", json.dumps({"privacy": {"usageStatisticsEnabled": False}}))
    words = ["--auth-type", "openai", "--approval-mode", "yolo", "-p", run.task]
    return Command([_bin("qwen"), *words], environment)


def cline(run: Run) -> Command:
    """Speaks chat completions, through the AI SDK."""
    program = next(node_folder("agents").glob("node_modules/@cline/cli-*/bin/cline"))
    login = ["auth", "--provider", "openai", "--apikey", "local", "--modelid", "scripted", "--baseurl", f"{run.url}/v1"]
    script = '"$0" "${@:1:9}" >&2 && "$0" "${@:10}"'
    return Command(["bash", "-c", script, program, *login, "--json", "--auto-approve", "true", run.task], {})


def continue_cli(run: Run) -> Command:
    """Speaks chat completions, through the openai package."""
    config = run.write(
        "config.yaml",
        f"""name: local
version: 0.0.1
schema: v1
models:
  - name: scripted
    provider: openai
    model: scripted
    apiBase: {run.url}/v1
    apiKey: local
    roles: [chat, edit, apply]
    capabilities: [tool_use]
""",
    )
    return Command(
        [_bin("cn"), "--config", config, "--auto", "-p", run.task],
        {"CONTINUE_TELEMETRY_ENABLED": "0", "CONTINUE_CLI_ENABLE_TELEMETRY": "0"},
    )


def aider(run: Run) -> Command:
    """Speaks chat completions, through litellm; edits come as text, not as tool calls."""
    environment = {
        "OPENAI_API_KEY": "local",
        "OPENAI_API_BASE": f"{run.url}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    off = ("git", "analytics", "check-update", "show-model-warnings", "pretty", "show-release-notes", "detect-urls")
    words = ["--model", "openai/scripted", "--edit-format", "diff", "--yes-always", *(f"--no-{name}" for name in off)]
    task = "Create greeting.txt with a greeting in it."
    return Command([python_of("aider").with_name("aider"), *words, "--message", task], environment)


AGENTS: dict[str, Callable[[Run], Command]] = {
    "codex": codex,
    "claude-code": claude_code,
    "opencode": opencode,
    "qwen-code": qwen_code,
    "cline": cline,
    "continue": continue_cli,
    "aider": aider,
}


def do_task(agent: str, run: Run, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The agent does its task; returns what it printed, and its exit status."""
    command = AGENTS[agent](run)
    subprocess.run(["git", "init", "-q", "."], cwd=run.work, check=True)
    return subprocess.run(
        [str(word) for word in command.words],
        cwd=run.work,
        env={**environment, **command.environment, "HOME": str(run.home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def _bin(name: str) -> Path:
    return node_folder("agents") / "node_modules" / ".bin" / name
