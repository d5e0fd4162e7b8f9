"""The server that a soak starts for itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.config import ServerConfig, user_data_dir
from server.model.demo import demo_model
from tests.faults.process import ServerProcess, server_process
from tests.faults.stored import store_for
from tests.server.http.conftest import eventually

# A codec is fitted first, where none is stored for the model.
PACKED_LIMIT_S = 900.0


@contextmanager
def served(folder: Path, model: str, settings: dict[str, dict[str, Any]]) -> Iterator[ServerProcess]:
    """A server on "tiny" (a random model with a random codec), "demo" or a model folder, until the block ends.

    Args:
        folder: for its data; codecs that the user has stored for a model are copied there.
        settings: sections of config.yaml.
    """
    # A better codec that comes in the middle would change what is measured.
    settings = {"calibration": {"refine": "off"}, "engine": {"max_num_seqs": 8}, **settings}
    if model == "tiny":
        store_for(folder / "data", 1)
    else:
        own = user_data_dir(ServerConfig())
        if (own / "artifacts").is_dir():
            shutil.copytree(own / "artifacts", folder / "data" / "artifacts")
        path = demo_model(own, lambda line, fraction: None) if model == "demo" else Path(model).resolve()
        settings["model"] = {"name": str(path), "served_name": path.name}
    with server_process(folder, settings) as server:
        if settings["kv_cache"]["method"] == "vecinfer":
            eventually(lambda: '"packed"' in httpx.get(f"{server.url}/readyz").text, "it packs", PACKED_LIMIT_S)
        yield server
