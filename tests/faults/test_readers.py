"""Whatever stands in a file that is read: what was meant, or an error of our own, never another exception.

Each reader gets a file as it is written, changed by hypothesis: bytes turned, cut, doubled; values of its JSON replaced
by any others; and what breaks parsers, such as nesting without end.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant_core.artifact.store import ArtifactStore
from quant_core.errors import QuantError
from quant_core.proof.random_codec import random_codec
from quant_core.proof.selftest import KernelVerdict
from server.access.keys import load_keys
from server.access.local_servers import announced, local_server
from server.calibration.text_file import read_text_files
from server.config import ServerConfig, load_config
from server.doctor.verdict_book import Verdict, VerdictBook, known_verdicts
from server.errors import ServerError
from server.http.response_store import STORE_FILE, ResponseStore
from server.memory.fit import fit_of
from server.model.loader import read_config
from server.model.local_models import cached_models
from server.model.weight_files import VERIFIED_FILE, check_weight_files, record_checksums
from server.prefix_disk.disk import open_disk
from server.prefix_disk.inspection import INDEX_FILE
from tests.helpers.tiny_models import write_tiny_model
from tests.server.prefix_disk.prefixes import check, offer

NUM_EXAMPLES = 60
# PyYAML takes 50 ms for the whole of config.yaml.
CONFIG = """
model: {name: demo, context_len: null}
kv_cache: {key_bits: 2, transform: auto, pool_bytes: 1.0e+9}
calibration:
  auto: true
http: {port: 8080, allowed_hosts: [box.local]}
data_dir: ~/vecinfer  # here
"""
SAID = {"role": "user", "content": "Hello"}
RESPONSES: list[dict[str, Any]] = [
    {"id": "resp_1", "previous_response_id": None, "output": [{"id": "msg_1", "text": "one"}]},
    {"id": "resp_2", "previous_response_id": "resp_1", "output": [{"id": "msg_2", "text": "two"}]},
]


@dataclass(frozen=True)
class Reader:
    """A file and who reads it.

    Attributes:
        write: makes the file in a folder; returns it.
        read: reads it, given the folder, as a server or a command does.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]


def written(name: str, content: str) -> Callable[[Path], Path]:
    """Makes a file of this content."""

    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


def put_artifact(folder: Path) -> Path:
    store = ArtifactStore(folder)
    artifact_id = store.put(random_codec(1, 1, 64), {"kl_mean": 0.03}, "m")
    store.set_active("m", artifact_id)
    return folder / artifact_id / "manifest.json"


def put_active(folder: Path) -> Path:
    put_artifact(folder)
    return folder / "active.json"


def use_artifacts(folder: Path) -> None:
    """What a start does, and a list over HTTP."""
    store = ArtifactStore(folder)
    json.dumps([m.model_dump() for m in store.list()], allow_nan=False).encode()
    for artifact_id in filter(None, (store.active("m"), *(d.artifact_id for d in store.damaged()))):
        with suppress(QuantError):
            store.get(artifact_id, "m")


def put_verdicts(folder: Path) -> Path:
    VerdictBook(folder / "verdicts.json", "key").begin("vq_append")
    kernel = KernelVerdict("vq_append", True, 0.1, 1.0, "", "all", 3, 1e-4)
    tested = Verdict("metal", (kernel,), ("64/2",), "2026-11-29T00:00:00")
    VerdictBook(folder / "verdicts.json", "other").write(tested)
    return folder / "verdicts.json"


def use_verdicts(folder: Path) -> None:
    known_verdicts(folder / "verdicts.json")
    for key in ("key", "other"):
        book = VerdictBook(folder / "verdicts.json", key)
        book.read()
        book.begin("vq_append")
        book.end("vq_append")


def put_model(name: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        model = write_tiny_model(folder / "model", "llama")
        record_checksums(model)
        check_weight_files(model, folder, lambda line, fraction: None)
        return (folder / name) if name == VERIFIED_FILE else model / name

    return put


def use_weights(folder: Path) -> None:
    check_weight_files(folder / "model", folder, lambda line, fraction: None)


def put_cached(name: str) -> Callable[[Path], Path]:
    """A model as the hub's cache has it, with an index of its weights."""

    def put(folder: Path) -> Path:
        repository = folder / "models--a--b"
        model = write_tiny_model(repository / "snapshots" / "1", "llama")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        config = json.loads((model / "config.json").read_text())
        quantised = {**config, "quantization": {"bits": 4, "group_size": 64}, "text_config": {"num_hidden_layers": 2}}
        (model / "config.json").write_text(json.dumps(quantised))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1")
        return repository / "refs" / "main" if name == "main" else model / name

    return put


def use_cached(folder: Path) -> None:
    for model in cached_models(folder):
        fit_of(model.folder, model.weight_bytes)
        read_config(model.folder).get("eos_token_id")


def put_note(folder: Path) -> Path:
    path = folder / "home" / ".cache" / "vecinfer" / "servers" / "8080"
    config = ServerConfig.model_validate({"data_dir": folder, "http": {"port": 8080}})
    with announced(config, 8080, folder / "admin_key"):
        content = path.read_bytes()
    path.write_bytes(content)
    return path


def put_responses(folder: Path) -> Path:
    store = ResponseStore(folder / STORE_FILE, 10, 10**6)
    for response in RESPONSES:
        store.keep(response, [{"id": "in_1", "role": "user", "content": "Hi " * 300}])
    store.close()
    return folder / STORE_FILE


def use_responses(folder: Path) -> None:
    """Found or not; what comes afterwards is kept and found."""
    store = ResponseStore(folder / STORE_FILE, 10, 10**6)

    async def use() -> None:
        await store.chain("resp_2")
        await store.item("in_1")
        store.keep({**RESPONSES[0], "id": "resp_new"}, [])
        kept = await store.get("resp_new")
        assert kept is not None and kept.items[-1]["text"] == "one"
        await store.delete("resp_1")

    try:
        asyncio.run(use())
    finally:
        store.close()


def put_index(folder: Path) -> Path:
    disk = open_disk(folder, 10**7)
    assert disk is not None
    for path in ((1, 2, 3), (1, 2, 4), (5,)):
        offer(disk, path)
    disk.close()
    return folder / INDEX_FILE


def use_index(folder: Path) -> None:
    """What it says is read as it was written, or dropped; what comes afterwards is kept."""
    disk = open_disk(folder, 10**7)
    assert disk is not None
    try:
        for prefix in disk.catalogue.prefixes():
            check(disk, prefix)
        name = offer(disk, (7, 8, 9))
        disk.wait()
        assert disk.catalogue.get(name) is not None
    finally:
        disk.close()


def use_note(folder: Path) -> None:
    """While a server holds it; of one that nobody holds nothing is believed."""
    with (folder / "home/.cache/vecinfer/servers/8080").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        local_server(8080)


READERS = [
    Reader("config.yaml", written("config.yaml", CONFIG), lambda f: load_config(f / "config.yaml")),
    Reader(
        "key file", written("keys", "# ours\nsk-one\nsk-two\n"),
        lambda f: load_keys(ServerConfig.model_validate({"http": {"api_key_file": f / "keys"}})),
    ),
    Reader("active.json", put_active, use_artifacts),
    Reader("manifest", put_artifact, use_artifacts),
    Reader("verdicts", put_verdicts, use_verdicts),
    Reader("weights", put_model("model.safetensors"), use_weights),
    Reader("checksums of weights", put_model("checksums.json"), use_weights),
    Reader("verified weights", put_model(VERIFIED_FILE), use_weights),
    Reader("config.json of a cached model", put_cached("config.json"), use_cached),
    Reader("index of a cached model", put_cached("model.safetensors.index.json"), use_cached),
    Reader("revision of a cached model", put_cached("main"), use_cached),
    Reader("note of a server", put_note, use_note),
    Reader(
        "calibration text, JSON", written("text.json", json.dumps([{"text": "one"}, "two", {"messages": [SAID]}])),
        lambda f: read_text_files([f / "text.json"]),
    ),
    Reader(
        "calibration text, lines", written("text.jsonl", f'"one"\n{json.dumps({"messages": [SAID]})}\n'),
        lambda f: read_text_files([f / "text.jsonl"]),
    ),
    Reader("kept responses", put_responses, use_responses),
    Reader("index of prefixes", put_index, use_index),
]  # fmt: skip

NODES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
HOSTILE = (
    b"", b"\0", b"\xff\xfe\0", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"[1e999, NaN, -Infinity]", b"null",
    b"- 2001-99-99", b"a: 0x", b"&a [*a, *a]", b"? [a]\n: b", b"<<: 1", b"!!binary a", b"\xef\xbb\xbf",
    b"SQLite format 3\0",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each node of a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], node: Any) -> Any:
    """A copy with one node replaced."""
    if not path:
        return node
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], node)
    return copy


@st.composite
def turned(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes changed, cut out, put in or doubled, a few times."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        end = min(len(changed), at + draw(st.sampled_from([0, 1, 1, 8, 100, 4096])))
        how = draw(st.sampled_from(["new", "cut", "twice"]))
        part = bytes(changed[at:end])
        changed[at:end] = {"new": draw(st.binary(min_size=end - at, max_size=end - at)) if how == "new" else b"",
                           "cut": b"", "twice": part + part}[how]  # fmt: skip
    return bytes(changed)


def contents(content: bytes) -> st.SearchStrategy[bytes]:
    """What a file may hold that was written with `content`."""
    found = [turned(content), st.sampled_from(HOSTILE), st.binary(max_size=64)]
    with suppress(ValueError):
        value = json.loads(content)
        paths = list(places(value))
        found.append(
            st.builds(
                lambda path, node: json.dumps(replaced(value, path, node)).encode(), st.sampled_from(paths), NODES
            )
        )
    return st.one_of(found)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@pytest.mark.parametrize("num", [NUM_EXAMPLES, pytest.param(1000, marks=pytest.mark.full)], ids=["some", "many"])
def test_any_content_is_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Reader, num: int
) -> None:
    monkeypatch.setenv("VECINFER_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = reader.write(tmp_path)
    content = path.read_bytes()
    reader.read(tmp_path)
    others = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    @settings(max_examples=num, deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True)
    @given(contents(content))
    def read(changed: bytes) -> None:
        for left in [p for p in tmp_path.rglob("*") if p.is_file() and p not in others]:
            left.unlink()
        for other, whole in others.items():
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(whole)
        path.write_bytes(changed)
        with suppress(QuantError, ServerError):
            reader.read(tmp_path)

    read()
