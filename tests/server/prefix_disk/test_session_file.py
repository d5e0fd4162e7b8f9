"""A session's file as hostile input: nothing but one clear error, and no memory for what is not there."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.prefix_disk.session_file import (
    SavedSession,
    SessionFileError,
    SessionFolder,
    SessionInfo,
    read_session,
    write_session,
)

INFO = SessionInfo(
    name="mine", created=1, model="tiny", fingerprint="f" * 64, artifact="art-1", mlx_lm="1", owner="", is_salted=False,
    num_tokens=100, num_pages=2, page_bytes=300, state_bytes=50,
)  # fmt: skip
SESSION = SavedSession(INFO, np.arange(100, dtype=np.int32), [b"a" * 300, b"b" * 300], b"s" * 50)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sessions") / "file"
    with open(found, "wb") as file:
        write_session(file, SESSION)
    return found


@pytest.fixture(scope="module")
def written(path: Path) -> bytes:
    return path.read_bytes()


def read(path: Path, content: bytes) -> SavedSession | None:
    """The session in these bytes; None: they were refused, with one line."""
    path.write_bytes(content)
    with open(path, "rb") as file:
        try:
            return read_session(file)
        except SessionFileError as error:
            assert 10 < len(str(error)) < 200 and "\n" not in str(error)
            return None


def forged(written: bytes, header: Any, payload: bytes) -> bytes:
    """A file whose header's length and digest are right, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = written[:12] + len(text).to_bytes(4, "little") + text + payload
    return content + hashlib.blake2b(content, digest_size=16).digest()


def test_what_is_written_is_read(path: Path, written: bytes) -> None:
    found = read(path, written)
    assert found is not None and found.info == INFO and (found.tokens == SESSION.tokens).all()
    assert list(found.pages) == SESSION.pages and found.state == SESSION.state
    assert read(path, forged(written, INFO.model_dump(), written[-1066:-16])) is not None


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_change_is_refused(path: Path, written: bytes, data: st.DataObject) -> None:
    content = bytearray(written)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    assert bytes(content[:end]) == written or read(path, bytes(content[:end])) is None


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused(path: Path, content: bytes) -> None:
    assert read(path, content) is None


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@given(st.one_of(JSON, st.dictionaries(st.sampled_from(list(INFO.model_dump())), JSON)), st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_header_with_a_right_checksum_is_refused(path: Path, written: bytes, header: Any, payload: bytes) -> None:
    if isinstance(header, dict):
        header = {**INFO.model_dump(), **header}
    assert read(path, forged(written, header, payload)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 2**31 - 1},
        {"num_pages": 2**31 - 1},
        {"page_bytes": 2**31 - 1},
        {"num_pages": 2**31 - 1, "page_bytes": 0, "state_bytes": 650},
        {"state_bytes": 2**47},
        {"state_bytes": -1},
        {"num_tokens": 0},
        {"name": "x" * 600},
    ],
)
def test_sizes_that_are_not_there_cost_no_memory(path: Path, written: bytes, changes: dict[str, Any]) -> None:
    content = forged(written, {**INFO.model_dump(), **changes}, written[-1066:-16])
    tracemalloc.start()
    try:
        assert read(path, content) is None
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", [b"[" * 16_000, b"{" * 16_000, b"\xff" * 10, b"x" * 20_000, b"1e999", b"null"])
def test_headers_that_no_reader_should_follow(path: Path, written: bytes, header: bytes) -> None:
    assert read(path, forged(written, header, b"")) is None


def test_a_folder_takes_the_place_of_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = SessionFolder(tmp_path / "sessions")
    assert folder.list() == []
    folder.write(SESSION)
    bad = SavedSession(INFO, SESSION.tokens, [b"a" * 300, "no bytes"], SESSION.state)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        folder.write(bad)
    assert [p.name for p in folder.folder.iterdir()] == ["mine.vecinfer-session"]
    assert folder.read("mine").state == SESSION.state
    assert folder.delete("mine") and not folder.delete("mine")
