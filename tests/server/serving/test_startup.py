"""What cannot be had is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import ModelConfig, ServerConfig
from server.errors import ConfigError
from server.serving.run import run


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tool_parser": "nonsense"}, r"model\.tool_parser.*known: .*hermes"),
        ({"chat_template": Path("/nowhere/template.jinja")}, r"model\.chat_template: cannot read"),
    ],
)
def test_a_wrong_setting_of_the_model_is_named_at_start(setting: dict[str, str | Path], message: str) -> None:
    config = ServerConfig(model=ModelConfig.model_validate(setting))
    with pytest.raises(ConfigError, match=message):
        run(config)
