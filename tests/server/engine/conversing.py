"""A process that holds conversations on a server with a disk tier, tells them, and waits to be killed."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer
from tests.server.engine.test_disk_prefixes import on_disk
from tests.server.engine.test_warm_equals_cold import CONTEXT, conversations, packed, plain


def main(family: str, kind: str, number: str, seed: str, folder: str) -> None:
    """Write the turns to `turns` in the folder, and prefixes below it; then say so and wait."""
    model = build_tiny_model(family, max_position_embeddings=CONTEXT)
    make = {"packed": packed, "plain": plain}[kind]
    with on_disk(model, tiny_tokenizer(Path(folder)), make(model), Path(folder) / "prefixes") as loop:
        turns = conversations(loop, int(number), int(seed))
        (Path(folder) / "turns").write_bytes(pickle.dumps(turns))
        print("done", flush=True)
        time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
