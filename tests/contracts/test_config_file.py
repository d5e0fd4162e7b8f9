"""config.yaml says every setting, with the default the code has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import ServerConfig, load_config, override
from server.errors import ConfigError

CONFIG_FILE = Path(__file__).parents[2] / "config.yaml"


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


DEFAULTS = dict(_leaves(ServerConfig().model_dump(mode="json")))


def test_same_keys_in_the_same_order() -> None:
    assert [key for key, _ in _leaves(yaml.safe_load(CONFIG_FILE.read_text()))] == list(DEFAULTS)


@pytest.mark.parametrize("key", DEFAULTS)
def test_same_value(key: str) -> None:
    written = dict(_leaves(yaml.safe_load(CONFIG_FILE.read_text())))[key]
    assert written == DEFAULTS[key]
    assert type(written) is type(DEFAULTS[key])


def test_loads_as_the_defaults() -> None:
    assert load_config(CONFIG_FILE) == ServerConfig()


@pytest.mark.parametrize("text", ["kv_cache: {bit: 2}", "nonsense: 1", "http: {port: 99999}", "[1, 2]", "0", "a: ["])
def test_wrong_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(file)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing\n")
    assert load_config(file) == ServerConfig()


def test_the_command_line_wins_and_none_does_not() -> None:
    changed = override(ServerConfig(), {"http.port": 9000, "http.host": None, "kv_cache.key_bits": 4})
    assert (changed.http.port, changed.http.host, changed.kv_cache.key_bits) == (9000, "127.0.0.1", 4)


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache\.key_bits"):
        override(ServerConfig(), {"kv_cache.key_bits": 5})
