"""PyPI llm: the command line, with a model of extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
from pathlib import Path

from harness import CAPITAL, PERSON, PLAIN, WEATHER, check, run

home = Path("llm")
home.mkdir(exist_ok=True)
(home / "extra-openai-models.yaml").write_text(
    f"""- model_id: local
  model_name: scripted
  api_base: {PLAIN}/v1
  api_key_name: local
  supports_tools: true
  supports_schema: true
"""
)


def llm(*words):
    environment = {**os.environ, "LLM_USER_PATH": str(home.resolve())}
    command = [str(Path(sys.executable).with_name("llm")), *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=50, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@check
def prompt():
    assert "Paris" in llm("-m", "local", "--key", "x", CAPITAL)


@check
def no_stream():
    assert "Paris" in llm("-m", "local", "--key", "x", "--no-stream", CAPITAL)


@check
def conversation():
    llm("-m", "local", "--key", "x", "hello")
    assert "Paris" in llm("-c", "--key", "x", CAPITAL)


@check
def schema():
    assert json.loads(llm("-m", "local", "--key", "x", "--schema", "name, age int", PERSON)) == {
        "name": "Ada",
        "age": 36,
    }


@check
def tools():
    code = 'def get_weather(city: str) -> str:\n    """The weather."""\n    return "18 degrees"'
    assert "18 degrees" in llm("-m", "local", "--key", "x", "--functions", code, WEATHER)


run()
