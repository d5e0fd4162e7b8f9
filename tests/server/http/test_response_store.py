"""Responses that are kept: gone on from, read, listed, deleted, and bounded."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from server.http.response_store import STORE_FILE, ResponseStore
from server.output.deltas import ReasoningDelta, ToolCallArguments, ToolCallStart
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT, in_process, serve
from tests.server.http.test_errors import error_of

pytestmark = pytest.mark.anyio
URL = "/v1/responses"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VECINFER_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def keeping(engine: FakeEngine) -> httpx.AsyncClient:
    return in_process(engine, store_responses=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResponseStore]:
    store = ResponseStore(tmp_path / "store" / STORE_FILE, max_responses=3, max_bytes=10_000)
    yield store
    store.close()


def response(name: str, previous: str | None = None, text: str = "") -> dict[str, Any]:
    return {"id": name, "previous_response_id": previous, "output": [{"id": f"msg_{name}", "text": text}]}


async def create(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_a_conversation_goes_on_from_a_response(keeping: httpx.AsyncClient, engine: FakeEngine) -> None:
    first = await create(keeping, input="One", instructions="Be brief.")
    second = await create(keeping, input="Two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"] and second["instructions"] is None
    await create(keeping, input="Three", previous_response_id=second["id"])
    prompt = engine.tokenizer.decode(engine.submitted[-1].prompt)
    said = ["user\nOne", f"assistant\n{TEXT}", "user\nTwo", f"assistant\n{TEXT}", "user\nThree", "assistant\n"]
    assert prompt.rstrip("\n") == "\n".join(said).rstrip("\n")


async def test_calls_and_thinking_are_gone_on_from(keeping: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.pieces = (ReasoningDelta("Hm"), ToolCallStart(0, "c1", "look"), ToolCallArguments(0, "{}"))
    first = await create(keeping, input="One", tools=[{"type": "function", "name": "look"}])
    output = {"type": "function_call_output", "call_id": "c1", "output": "sea"}
    second = await create(keeping, input=[output], previous_response_id=first["id"])
    assert [item["type"] for item in first["output"]] == ["reasoning", "function_call"]
    assert second["status"] == "completed"


async def test_a_kept_response_is_read_back_and_deleted(keeping: httpx.AsyncClient) -> None:
    made = await create(keeping, input="One")
    assert (await keeping.get(f"{URL}/{made['id']}")).json() == made and made["store"] is True
    assert error_of(await keeping.get(f"{URL}/{made['id']}?stream=true"), 400)["param"] == "stream"
    assert error_of(await keeping.post(f"{URL}/{made['id']}/cancel"), 400)["message"].endswith("completed already")
    gone = (await keeping.delete(f"{URL}/{made['id']}")).json()
    assert gone == {"id": made["id"], "object": "response", "deleted": True}
    assert error_of(await keeping.get(f"{URL}/{made['id']}"), 404)["code"] == "response_not_found"


async def test_a_response_is_not_kept_when_the_request_says_so(keeping: httpx.AsyncClient) -> None:
    made = await create(keeping, input="One", store=False)
    error_of(await keeping.get(f"{URL}/{made['id']}"), 404)
    body = {"input": "Two", "previous_response_id": made["id"]}
    assert error_of(await keeping.post(URL, json=body), 400)["code"] == "previous_response_not_found"


async def test_input_items_are_listed_page_by_page(keeping: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in "abc"]
    made = await create(keeping, input=items)
    url = f"{URL}/{made['id']}/input_items"
    page = (await keeping.get(f"{url}?order=asc&limit=2")).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("msg_a", "msg_b", True)
    assert page["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
    rest = (await keeping.get(f"{url}?order=asc&after=msg_b")).json()
    assert [item["id"] for item in rest["data"]] == ["msg_c"] and rest["has_more"] is False
    assert [item["id"] for item in (await keeping.get(url)).json()["data"]] == ["msg_c", "msg_b", "msg_a"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=²", "order=up", "after=nothing"])
async def test_a_wrong_page_is_named(keeping: httpx.AsyncClient, query: str) -> None:
    made = await create(keeping, input="One")
    error = error_of(await keeping.get(f"{URL}/{made['id']}/input_items?{query}"), 400)
    assert error["param"] == query.partition("=")[0]


async def test_a_reference_stands_for_a_kept_item(keeping: httpx.AsyncClient, engine: FakeEngine) -> None:
    made = await create(keeping, input="One")
    reference = {"type": "item_reference", "id": made["output"][0]["id"]}
    await create(keeping, input=[reference, {"role": "user", "content": "Two"}])
    assert f"assistant\n{TEXT}" in engine.tokenizer.decode(engine.submitted[-1].prompt)
    unknown = {"type": "item_reference", "id": "msg_0"}
    assert error_of(await keeping.post(URL, json={"input": [unknown]}), 400)["code"] == "item_not_found"


def test_the_openai_package_reads_what_was_kept(engine: FakeEngine) -> None:
    with serve(engine, store_responses=True) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        *_, last = client.responses.create(model="fake/model", input="One", stream=True)
        assert last.type == "response.completed"
        name = last.response.id
        assert client.responses.retrieve(name).output_text == TEXT
        assert [item.type for item in client.responses.input_items.list(name)] == ["message"]
        more = client.responses.create(model="fake/model", input="Two", previous_response_id=name)
        assert more.previous_response_id == name
        client.responses.delete(name)


async def test_only_the_owner_reads_the_file(store: ResponseStore, tmp_path: Path) -> None:
    store.keep(response("a"), [])
    assert await store.get("a") is not None
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").iterdir()}
    assert modes == {0o600}


async def test_the_oldest_go_first(store: ResponseStore) -> None:
    for name, previous in [("a", None), ("b", "a"), ("c", "b"), ("d", "c")]:
        store.keep(response(name, previous), [])
    assert await store.get("a") is None and await store.item("msg_a") is None
    assert await store.get("b") is not None and await store.chain("d") is None


async def test_the_bytes_are_bounded(store: ResponseStore) -> None:
    for name in "ab":
        store.keep(response(name, text="x" * 6_000), [])
    assert await store.get("a") is None and await store.get("b") is not None
    store.keep(response("c", text="x" * 20_000), [])
    assert await store.get("c") is None


async def test_a_deleted_response_leaves_no_words_in_the_files(store: ResponseStore, tmp_path: Path) -> None:
    store.keep(response("a", text="a secret of the user"), [])
    assert await store.delete("a") and not await store.delete("a")
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "store").iterdir())


async def test_what_was_kept_outlives_the_server(tmp_path: Path) -> None:
    for _ in range(2):
        store = ResponseStore(tmp_path / STORE_FILE, 3, 10_000)
        if await store.get("a") is None:
            store.keep(response("a"), [{"id": "i"}])
        store.close()
    store = ResponseStore(tmp_path / STORE_FILE, 3, 10_000)
    kept = await store.chain("a")
    assert kept is not None and kept[0].input == ({"id": "i"},)
    store.close()


async def test_a_disk_that_refuses_fails_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = ResponseStore(tmp_path / "file" / STORE_FILE, 3, 10_000)
    store.keep(response("a"), [])
    store.close()
    assert "could not be kept" in caplog.text
