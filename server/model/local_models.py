"""Models that lie in the Hugging Face cache already. Reads names and sizes only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.system.json_file import read_object

_PREFIX = "models--"


@dataclass(frozen=True)
class LocalModel:
    """One model.

    Attributes:
        name: what `--model` takes.
        weight_bytes: of its model*.safetensors.
    """

    name: str
    folder: Path
    weight_bytes: int


def cached_models(cache: Path | None = None) -> list[LocalModel]:
    """Complete language models in the Hugging Face cache, by name.

    Args:
        cache: the hub's folder; None: the one that huggingface_hub uses.
    """
    if cache is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = Path(HF_HUB_CACHE)
    try:
        repositories = sorted(cache.glob(f"{_PREFIX}*"))
    except OSError:
        return []
    return sorted((m for r in repositories if (m := _cached(r)) is not None), key=lambda m: m.name.lower())


def _cached(repository: Path) -> LocalModel | None:
    name = repository.name.removeprefix(_PREFIX).replace("--", "/")
    for folder in _snapshots(repository):
        try:
            config = read_object(folder / "config.json")
            files = _weight_files(folder)
            if files and _is_language_model(config):
                return LocalModel(name, folder, sum(file.stat().st_size for file in files))
        except (OSError, ValueError):  # a download that was cut short
            continue
    return None


def _snapshots(repository: Path) -> Iterator[Path]:
    """The revision that `main` names first, then the others, the latest first."""
    snapshots = repository / "snapshots"
    with suppress(OSError, ValueError):
        yield snapshots / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    try:
        yield from sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    except OSError:
        return


def _weight_files(folder: Path) -> list[Path]:
    """All weight files; none where the index names one that is missing."""
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = read_object(index).get("weight_map", {})
        wanted = {str(name) for name in named.values()} if isinstance(named, dict) else set()
        return files if wanted <= {file.name for file in files} else []
    return files


def _is_language_model(config: Any) -> bool:
    """Whether mlx-lm may load it: a decoder with a vocabulary."""
    if not isinstance(config, dict) or "model_type" not in config:
        return False
    inner, named = config.get("text_config"), config.get("architectures")
    text = {**config, **inner} if isinstance(inner, dict) else config
    kinds = [str(kind) for kind in named] if isinstance(named, list) and named else ["ForCausalLM"]
    return "vocab_size" in text and any(kind.endswith(("ForCausalLM", "ForConditionalGeneration")) for kind in kinds)
