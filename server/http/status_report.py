"""The body of GET /admin/status."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from server.calibration.agreement import served_settings, wanted_of_codec
from server.calibration.packing import PackingStatus
from server.engine.interface import EngineStatus, KVStatus
from server.engine.prefix_cache import EVICTION_CAUSES, PrefixStats
from server.http.context import AppContext
from server.prefix_disk.disk import DiskStats
from server.system.uptime import since_boot_s

PACKAGES = ("vecinfer-server", "mlx", "mlx-lm", "fastapi", "uvicorn")


def status_report(context: AppContext) -> dict[str, Any]:
    """Everything an operator asks first. Byte figures are `nbytes` of evaluated arrays, None before any."""
    status = context.engine.status()
    return {
        "state": status.state,
        "detail": status.detail,
        "progress": status.progress,
        "model": {
            "id": status.model_id,
            "names": list(context.model_names),
            "context_len": status.context_len,
        },
        "backend": status.backend,
        "packing": _packing(context, status),
        "codec": _codec(context, status),
        "refinement": _refinement(context),
        "active_artifact": status.active_artifact,
        "live_artifacts": list(status.live_artifacts),
        "requests": {
            "running": status.num_running,
            "waiting": status.num_waiting,
            "last_token_age_s": status.last_token_age_s,
        },
        "kv": None if status.kv is None else _kv(status.kv),
        "kv_last_busy": None if status.kv_last_busy is None else _kv(status.kv_last_busy),
        "layers": _layers(status),
        "prefix_cache": None if status.prefixes is None else _prefixes(status.prefixes, status.disk),
        "counters": dict(status.counters),
        "versions": {"python": platform.python_version(), **_versions()},
        "uptime_s": round(since_boot_s() - context.started_s, 1),
    }


def packing_status(context: AppContext) -> PackingStatus:
    """How new conversations are held."""
    if context.calibration is None:
        return PackingStatus("exact", "kv_cache.method is fp16")
    return context.calibration.packing


def _packing(context: AppContext, status: EngineStatus) -> dict[str, Any]:
    """How new conversations are held, and how many of the running and of all are packed."""
    packing, counters = packing_status(context), status.counters
    return {
        "state": packing.state,
        "detail": packing.detail,
        "progress": packing.progress,
        "running": {"packed": status.num_packed, "exact": status.num_running - status.num_packed},
        "since_start": {kind: int(counters.get(f"{kind}_requests", 0)) for kind in ("packed", "exact")},
    }


def _refinement(context: AppContext) -> dict[str, Any] | None:
    """How far the search for a better codec is; None: it is off."""
    status = None if context.calibration is None else context.calibration.refinement
    return None if status is None else asdict(status)


def _codec(context: AppContext, status: EngineStatus) -> dict[str, Any]:
    """What the settings ask of the codec, and what the active one has."""
    return {"asked": wanted_of_codec(context.config), "served": served_settings(status.codec)}


def _kv(kv: KVStatus) -> dict[str, Any]:
    """`ratio`: how many times less than float16 the running conversations hold, tables not counted."""
    held = sum(kv.held_bytes.values())
    # Snapshots keep past prompts and belong to no running conversation.
    running = held - kv.held_bytes.get("snapshots", 0)
    measured = [layer.bytes_per_token for layer in kv.layers if layer.bytes_per_token is not None]
    return {
        "method": kv.method,
        "held_bytes": held,
        "held_bytes_by_part": dict(kv.held_bytes),
        "running_bytes": running,
        "fp16_bytes": kv.fp16_bytes,
        "other_row_bytes": kv.other_row_bytes,
        "ratio": round(kv.fp16_bytes / running, 3) if running and kv.tokens_held else None,
        "tokens_held": kv.tokens_held,
        "bytes_per_token": round(running / kv.tokens_held, 2) if kv.tokens_held else None,
        "first_step_bytes_per_token": round(sum(measured), 2) if measured else None,
        "table_bytes": kv.table_bytes,
        "budget_bytes": kv.budget_bytes,
        "pages": {"total": kv.pages_total, "used": kv.pages_used, "reserved": kv.pages_reserved},
    }


def _prefixes(prefixes: PrefixStats, disk: DiskStats | None) -> dict[str, Any]:
    return {
        "snapshots": prefixes.num_snapshots,
        "bytes": prefixes.nbytes,
        "hits": prefixes.num_hits,
        "misses": prefixes.num_misses,
        "saved_tokens": prefixes.num_saved_tokens,
        "evicted": {cause: prefixes.num_evicted.get(cause, 0) for cause in EVICTION_CAUSES},
        "disk": None if disk is None else _disk(disk),
    }


def _disk(disk: DiskStats) -> dict[str, int]:
    return {
        "prefixes": disk.num_prefixes,
        "bytes": disk.nbytes,
        "max_bytes": disk.max_bytes,
        "reads": disk.num_reads,
        "read_bytes": disk.num_read_bytes,
        "written_bytes": disk.num_written_bytes,
        "evicted": disk.num_evicted,
        "damaged": disk.num_damaged,
    }


def _layers(status: EngineStatus) -> dict[str, Any]:
    layers = status.kv.layers if status.kv is not None else ()
    return {
        "total": len(layers),
        "packed": sum(layer.packed for layer in layers),
        "all": [
            {
                "index": layer.index,
                "kind": layer.kind,
                "packed": layer.packed,
                "bytes_per_token": layer.bytes_per_token,
            }
            for layer in layers
        ],
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
