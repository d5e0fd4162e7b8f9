"""The one configuration: frozen, equal to config.yaml, unknown keys refused. The only reader of os.environ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from quant_core.calibrate.options import Allocation, CalibrationOptions, PresetName, TransformName
from quant_core.codec.spec import WindowSpec
from server.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
# No infinity: timers cannot wait for it.
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
Bits = Annotated[int, Field(ge=1, le=4)]
# Set when the process restarted itself with a BLAS preloaded, so that it does so only once.
BLAS_GUARD = "VECINFER_BLAS_RESTARTED"
_OPTIONS = CalibrationOptions()


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    """Which model is served."""

    name: str = "demo"
    served_name: str | None = None
    aliases: tuple[str, ...] = ("claude-*",)
    context_len: PositiveInt | None = None
    trust_remote_code: bool = False
    chat_template: Path | None = None
    tool_parser: str | None = None
    embedding_model: str | None = None


class CacheConfig(_Section):
    """How keys and values are held."""

    method: Literal["vecinfer", "fp16"] = "vecinfer"
    key_bits: Bits = _OPTIONS.key_bits
    value_bits: Bits = _OPTIONS.value_bits
    transform: TransformName = _OPTIONS.transform
    codebooks_per_head: Literal[1, 2, 4] | None = None
    allocation: Allocation = _OPTIONS.allocation
    window: PositiveInt = _OPTIONS.window.window
    num_sink_tokens: Annotated[int, Field(ge=0, le=64)] = _OPTIONS.window.num_sink_tokens
    bucket_len: PositiveInt = _OPTIONS.window.bucket_len
    pool_bytes: Literal["auto"] | PositiveInt = "auto"
    snapshot_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.2
    artifact: str | None = None
    backend: Literal["auto", "metal", "cuda", "reference"] = "auto"
    require_packed: bool = False

    @model_validator(mode="after")
    def _a_window_that_can_be(self) -> Self:
        WindowSpec(self.window, self.num_sink_tokens, self.bucket_len)
        return self


class EngineConfig(_Section):
    """Batching, queueing and time limits."""

    max_num_seqs: PositiveInt = 16
    max_waiting: PositiveInt = 64
    prefill_tokens_per_step: PositiveInt | None = None
    target_gap_ms: Annotated[float, Field(gt=0)] | None = None
    default_max_tokens: PositiveInt = 4096
    queue_timeout_s: Seconds = 300.0
    watchdog_s: Seconds = 300.0
    drain_timeout_s: Seconds = 25.0
    wired_limit: Literal["off", "auto"] | PositiveInt = "off"

    @property
    def max_rows(self) -> int:
        """`max_num_seqs`, and a quarter more for who has no row beside a caller or request with more than its share."""
        return self.max_num_seqs + max(1, self.max_num_seqs // 4)


class PrefixCacheConfig(_Section):
    """Beginnings of prompts, kept for reuse."""

    shared: bool = False
    disk_bytes: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    volatile_lines: Literal["drop", "keep"] = "drop"


class CalibrationConfig(_Section):
    """The first calibration and the defaults of later jobs."""

    auto: Literal["block"] | bool = True
    preset: PresetName = _OPTIONS.preset
    num_samples: PositiveInt | None = _OPTIONS.num_samples
    sample_len: PositiveInt | None = _OPTIONS.sample_len
    seed: int = _OPTIONS.seed
    max_kl: Annotated[float, Field(gt=0)] = _OPTIONS.max_kl
    text: Path | None = None
    refine: Annotated[Literal["idle", "off"], BeforeValidator(lambda v: "off" if v is False else v)] = "idle"
    refine_after_s: Annotated[float, Field(ge=0)] = 60.0
    refine_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    refine_minutes: Annotated[float, Field(gt=0)] = 30.0


class HTTPConfig(_Section):
    """Listening, keys and limits."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    insecure: bool = False
    page: bool = True
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ("localhost",)
    max_body_bytes: PositiveInt = 8_000_000
    max_connections: PositiveInt = 1000
    keepalive_s: Seconds = 10.0
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    reasoning_field: Literal["both", "reasoning_content", "reasoning"] = "both"
    request_templates: bool = False
    store_responses: bool = False
    max_stored_responses: PositiveInt = 1000
    max_stored_bytes: PositiveInt = 100_000_000


class LogConfig(_Section):
    """Where logs go; with a file, it is rotated by the server itself."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    file: Path | None = None
    max_bytes: PositiveInt = 10_000_000
    num_backups: Annotated[int, Field(ge=0)] = 5


class ServerConfig(_Section):
    """Everything in config.yaml."""

    model: ModelConfig = ModelConfig()
    kv_cache: CacheConfig = CacheConfig()
    engine: EngineConfig = EngineConfig()
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    http: HTTPConfig = HTTPConfig()
    log: LogConfig = LogConfig()
    data_dir: Path | None = None


def load_config(path: Path | None) -> ServerConfig:
    """Read config.yaml (all defaults when `path` is None).

    Raises:
        ConfigError: unreadable file, bad YAML, unknown or wrong keys; the message names each key.
    """
    if path is None:
        return ServerConfig()
    try:
        data = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ConfigError(f"cannot read {path}: it is nested too deeply") from error
    # A date or number that cannot be is a ValueError of PyYAML's.
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return _validated({} if data is None else data, str(path))


def override(config: ServerConfig, changes: Mapping[str, object]) -> ServerConfig:
    """`config` with settings replaced: {"http.port": 9000}; None leaves a setting as it is.

    Raises:
        ConfigError: unknown key or wrong value; the message names each.
    """
    data = config.model_dump(exclude_unset=True)
    for dotted, value in changes.items():
        if value is not None:
            *sections, key = dotted.split(".")
            section = data
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
    return _validated(data, "the command line")


def _validated(data: object, source: str) -> ServerConfig:
    try:
        return ServerConfig.model_validate(data)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from error


def chat_template(config: ServerConfig) -> str | None:
    """The text of `model.chat_template`; None: the model's own.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = config.model.chat_template
    if path is None:
        return None
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template: cannot read {path}: {error}") from error


def user_data_dir(config: ServerConfig) -> Path:
    """Where models, artifacts and verdicts are kept: data_dir, else $VECINFER_HOME, else ~/.cache/vecinfer."""
    if config.data_dir is not None:
        return config.data_dir.expanduser()
    home = os.environ.get("VECINFER_HOME")
    return Path(home) if home else Path.home() / ".cache" / "vecinfer"


def default_environment(name: str, value: str) -> None:
    """Set a variable that a library of this process reads, unless it is given."""
    os.environ.setdefault(name, value)


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process, or for this one started again: ours with `changes`."""
    return {**os.environ, **changes}


@dataclass(frozen=True)
class BlasEnvironment:
    """What the environment says about preloaded libraries and our own restart."""

    preload: str
    restarted: bool
    disabled: bool


def blas_environment() -> BlasEnvironment:
    """$LD_PRELOAD, whether `BLAS_GUARD` marks a restart for it, and whether $VECINFER_BLAS=off forbids one."""
    return BlasEnvironment(
        preload=os.environ.get("LD_PRELOAD", ""),
        restarted=BLAS_GUARD in os.environ,
        disabled=os.environ.get("VECINFER_BLAS", "").lower() == "off",
    )


def environment_key(variable: str) -> str | None:
    """A key from the environment, which may be blank; None when the variable is not set."""
    value = os.environ.get(variable)
    return None if value is None else value.strip()
