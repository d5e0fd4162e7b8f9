"""How long a small chat waits beside one request of many prompts: `python -m tests.tools.fairness [--model demo]`.

Starts `vecinfer serve` on the model and codec that are stored already (`vecinfer serve` fits one at its first start).
Prints seconds to the first token of a chat of a few words, alone and while 64 prompts of one request wait and run.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx

from server.config import ServerConfig, user_data_dir
from server.model.blas import ensure_fast_blas
from tests.tools.prefixes import Bench, Json, link_stored, streamed

PROMPT_TOKENS, ANSWER_TOKENS = 60, 60
NUM_CHATS, PAUSE_S = 8, 4.0


def main() -> None:
    """Print both."""
    ensure_fast_blas(print)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    chat: Json = {"model": "model", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 2}
    with tempfile.TemporaryDirectory() as folder:
        link_stored(user_data_dir(ServerConfig()), Path(folder) / "data")
        bench = Bench(Path(folder), options.model, PROMPT_TOKENS, 0)
        prompts = [bench.prompt(100 + number) for number in range(options.prompts)]
        many: Json = {"model": "model", "prompt": prompts, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        with bench.server() as server:
            alone = [streamed(server, chat, "/v1/chat/completions").first_s for _ in range(3)]
            done: list[int] = []

            def ask_much() -> None:
                # The server is killed at the end, with this one under way.
                with suppress(httpx.HTTPError), httpx.Client(timeout=3600) as client:
                    done.append(client.post(f"{server.url}/v1/completions", json=many).status_code)

            threading.Thread(target=ask_much, daemon=True).start()
            beside = []
            for _ in range(NUM_CHATS):
                time.sleep(PAUSE_S)
                if done:
                    break
                beside.append(streamed(server, chat, "/v1/chat/completions").first_s)
    print("alone:", ", ".join(f"{s:.2f} s" for s in alone))
    print(f"beside {len(prompts)} prompts:", ", ".join(f"{s:.2f} s" for s in beside) or f"they ended at once: {done}")


if __name__ == "__main__":
    main()
