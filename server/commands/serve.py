"""`vecinfer serve`: options over config.yaml, then the server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from server.config import ServerConfig


def register(app: typer.Typer) -> None:
    """Add `vecinfer serve`."""
    app.command("serve")(serve)


def _option(help_text: str, *names: str, panel: str = "KV cache", **extra: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False, **extra)


ConfigFile = Annotated[
    Path | None, _option("A config.yaml; options given here win over it.", "--config", "-c", panel="Server")
]
Model = Annotated[
    str | None,
    _option(
        "demo, gemma3-270m, a folder, or a Hugging Face name (default: asks at a terminal, else demo).",
        "--model",
        "-m",
        panel="Server",
    ),
]
ServedName = Annotated[str | None, _option("What clients call the model (default: its own name).", panel="Server")]
Host = Annotated[str | None, _option("Address to listen on (default: 127.0.0.1, this machine only).", panel="Server")]
Port = Annotated[int | None, _option("Port to listen on (default: 8080).", "--port", "-p", panel="Server")]
Insecure = Annotated[bool | None, _option("Listen to other machines without an API key.", "--insecure", panel="Server")]
AllowedHost = Annotated[
    list[str] | None, _option("A further name by which this server is called; several times.", panel="Server")
]
DataDir = Annotated[
    Path | None, _option("Models and artifacts (default: $VECINFER_HOME, else ~/.cache/vecinfer).", panel="Server")
]
ContextLen = Annotated[int | None, _option("Longest conversation in tokens (default: the model's).", panel="Server")]
MaxNumSeqs = Annotated[int | None, _option("Conversations decoded at a time (default: 16).", panel="Server")]
LogLevel = Annotated[str | None, _option("debug, info, warning or error (default: info).", panel="Server")]
Method = Annotated[str | None, _option("vecinfer packs the cache (default); fp16 keeps mlx-lm's own, to compare.")]
Bits = Annotated[int | None, _option("Bits per channel of keys and values, 1-4 (default: 2).")]
KeyBits = Annotated[int | None, _option("Bits of the keys alone.")]
ValueBits = Annotated[int | None, _option("Bits of the values alone; they bear fewer than keys.")]
Artifact = Annotated[str | None, _option("Id of a stored codec (default: the active one, else one is fitted).")]
PoolBytes = Annotated[int | None, _option("Memory for all caches in bytes (default: from what is free).")]
Backend = Annotated[str | None, _option("auto (default), metal, cuda or reference.")]


def serve(
    config: ConfigFile = None,
    model: Model = None,
    served_name: ServedName = None,
    host: Host = None,
    port: Port = None,
    insecure: Insecure = None,
    allowed_host: AllowedHost = None,
    data_dir: DataDir = None,
    context_len: ContextLen = None,
    max_num_seqs: MaxNumSeqs = None,
    log_level: LogLevel = None,
    method: Method = None,
    bits: Bits = None,
    key_bits: KeyBits = None,
    value_bits: ValueBits = None,
    artifact: Artifact = None,
    pool_bytes: PoolBytes = None,
    backend: Backend = None,
) -> None:
    """Serve a model over an OpenAI-compatible API.

    It answers when the weights are loaded. At the first start of a model its codec is fitted beside the chats
    (minutes, with progress), which are packed from then on; later starts are packed at once.
    Without --model and --config the models in the Hugging Face cache are listed, with their size and whether they
    fit; at a terminal you choose one, else the demo is served.

    Example: vecinfer serve --model demo --bits 2 --port 8080
    """
    from server.config import load_config, override

    if model is None and config is None:
        model = _chosen_model()
    changes = {
        "model.name": model,
        "model.served_name": served_name,
        "model.context_len": context_len,
        "http.host": host,
        "http.port": port,
        "http.insecure": insecure,
        "http.allowed_hosts": allowed_host or None,
        "data_dir": data_dir,
        "engine.max_num_seqs": max_num_seqs,
        "log.level": log_level,
        "kv_cache.method": method,
        "kv_cache.key_bits": bits if key_bits is None else key_bits,
        "kv_cache.value_bits": bits if value_bits is None else value_bits,
        "kv_cache.artifact": artifact,
        "kv_cache.pool_bytes": pool_bytes,
        "kv_cache.backend": backend,
    }
    start(override(load_config(config), changes))


def _chosen_model() -> str | None:
    """Asked for at a terminal, else the demo; None, and no word, where the demo is all there is."""
    from server.model.local_models import cached_models

    found = cached_models()
    if not found:
        return None
    from server.memory.fit import fit_of  # imports MLX
    from server.terminal.choice import choose

    rows = [("135M parameters, for a first try; 93 MB to fetch once",)]
    rows += [(f"{m.weight_bytes / 1e9:.1f} GB: {fit_of(m.folder, m.weight_bytes)}",) for m in found]
    console = Console(stderr=True, soft_wrap=True)
    return choose(["demo", *(m.name for m in found)], rows, console, ask=sys.stdin.isatty() and sys.stderr.isatty())


def start(config: ServerConfig) -> None:
    """Check what can be checked at once, then run the server until it is stopped."""
    from server.memory.limits import check_address_space
    from server.model.device import prepare_device
    from server.serving.port import check_port
    from server.system.descriptors import raise_descriptor_limit

    console = Console(stderr=True, soft_wrap=True)
    raise_descriptor_limit()
    check_address_space()
    check_port(config.http.host, config.http.port)
    prepare_device(lambda line: console.print(line, highlight=False, markup=False))
    from server.serving.run import run  # imports MLX, FastAPI and mlx-lm: seconds

    run(config)
