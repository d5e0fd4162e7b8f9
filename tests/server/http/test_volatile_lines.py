"""Lines that change with each request, over a real socket: dropped where they are no instruction, else told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from typer.testing import CliRunner

from server import cli
from tests.server.http.conftest import ADMIN_KEY
from tests.server.http.prefix_server import prefix_server

RULES = "You are an agent. " + "Read the files with care and say what they do. " * 30
Json = dict[str, Any]


def header(nonce: str) -> str:
    return f"x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch={nonce};"


def system(first: str | None) -> list[Json]:
    """As Claude Code sends it: the changing line in a block of its own."""
    rules = {"type": "text", "text": RULES, "cache_control": {"type": "ephemeral"}}
    return [rules] if first is None else [{"type": "text", "text": first}, rules]


def usage(client: httpx.Client, first: str | None, said: str = "Go on.") -> Json:
    body = {"model": "claude-x", "system": system(first), "messages": [{"role": "user", "content": said}]}
    answer = client.post("/v1/messages", json={**body, "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    count = client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    found: Json = answer.json()["usage"]
    assert count == found["input_tokens"] + found["cache_read_input_tokens"]
    return found


def misses(client: httpx.Client) -> list[Json]:
    found: list[Json] = client.get("/admin/prefixes/misses").json()["data"]
    return found


def test_a_new_nonce_does_not_cost_the_prompt(tmp_path: Path) -> None:
    with prefix_server(tmp_path) as client:
        first, second = usage(client, header("71fea")), usage(client, header("0aaa9"))
        assert first["cache_read_input_tokens"] == 0
        assert second["cache_read_input_tokens"] >= 0.95 * first["input_tokens"]
        assert first["input_tokens"] == usage(client, None)["cache_read_input_tokens"] + 1
        assert [miss["reason"] for miss in misses(client)] == ["new"]


def test_kept_lines_are_read_and_told(tmp_path: Path) -> None:
    with prefix_server(tmp_path, volatile_lines="keep") as client:
        usage(client, header("71fea"))
        assert usage(client, header("0aaa9"))["cache_read_input_tokens"] < 100
        told, first = misses(client)
        assert (told["reason"], told["parting"]["looks_like"]) == ("parted", "billing header")
        assert told["parting"]["before"].endswith("cch=") and told["parting"]["here"].startswith("0aaa9")
        assert told["parting"]["there"].startswith("71fea") and told["shared_tokens"] > told["cached_tokens"] - 1
        assert (first["reason"], first["parting"]) == ("new", None)
        key = tmp_path / "key"
        key.write_text(ADMIN_KEY)
        key.chmod(0o600)
        arguments = ["status", "--prefixes", "--url", str(client.base_url), "--admin-key-file", str(key)]
        shown = CliRunner().invoke(cli.build_app(), arguments).stdout
        assert "at a billing header" in shown and "no earlier prompt begins like it" in shown and "0aaa9" in shown


def test_dates_are_never_changed_but_named(tmp_path: Path) -> None:
    with prefix_server(tmp_path) as client:
        usage(client, "Today's date: 2026-11-29")
        assert usage(client, "Today's date: 2026-11-30")["cache_read_input_tokens"] < 100
        told = misses(client)[0]
        assert (told["reason"], told["parting"]["looks_like"]) == ("parted", "date or time")
        assert "30" in told["parting"]["here"][:2] + told["parting"]["before"]


def test_who_may_share_nothing_is_new_and_a_clearing_forgets(tmp_path: Path) -> None:
    def ask(**fields: Any) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": RULES}], "max_tokens": 2, **fields}
        assert client.post("/v1/chat/completions", json=body).status_code == 200

    with prefix_server(tmp_path) as client:
        ask()
        ask(cache_salt="x")
        assert [miss["reason"] for miss in misses(client)] == ["new", "new"]
        client.delete("/admin/prefixes")
        assert misses(client) == []


def test_the_report_is_for_the_administrator(tmp_path: Path) -> None:
    with prefix_server(tmp_path) as client:
        refused = client.get("/admin/prefixes/misses", headers={"authorization": "Bearer wrong"})
        assert refused.status_code == 401
