"""`vecinfer session` on running servers: save, list, export, import on another machine, restore, delete."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import httpx
from typer.testing import CliRunner, Result

from server import cli
from tests.server.http.conftest import ADMIN_KEY
from tests.server.http.prefix_server import asked, num_cached, prefix_server

HEAD = "one two three " * 60


def run(client: httpx.Client, folder: Path, *arguments: str) -> Result:
    key = folder / "key"
    key.write_text(ADMIN_KEY)
    key.chmod(0o600)
    where = ("--url", str(client.base_url), "--admin-key-file", str(key))
    return CliRunner().invoke(cli.build_app(), ("session", *arguments, *where))


def test_a_conversation_moves_to_another_machine(tmp_path: Path) -> None:
    file, text = tmp_path / "talk.vecinfer-session", tmp_path / "prompt.txt"
    text.write_text(HEAD)
    with prefix_server(tmp_path, data_dir=tmp_path / "here") as here:
        first = asked(here, HEAD, max_tokens=20)
        assert (
            f"talk: {first['usage']['prompt_tokens'] - 1:,} of"
            in run(here, tmp_path, "save", "talk", "--prompt", str(text)).stdout
        )
        assert "talk" in run(here, tmp_path, "list").stdout
        assert run(here, tmp_path, "export", "talk", str(file)).exit_code == 0
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        again = run(here, tmp_path, "export", "talk", str(file))
        assert again.exit_code == 1 and "File exists" in again.stderr
        assert run(here, tmp_path, "delete", "talk").exit_code == 0
        assert run(here, tmp_path, "list").stdout == "no sessions are saved\n"
    with prefix_server(tmp_path, data_dir=tmp_path / "there") as there:
        assert "talk: " in run(there, tmp_path, "import", str(file)).stdout
        assert "are in the cache" in run(there, tmp_path, "restore", "talk").stdout
        second = asked(there, HEAD, max_tokens=20)
        assert second["choices"] == first["choices"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    with prefix_server(tmp_path, data_dir=tmp_path / "other", artifact="art-2") as other:
        refused = run(other, tmp_path, "import", str(file))
        assert refused.exit_code == 1 and "artifact art-1" in refused.stderr.replace("\n", " ")


def test_a_session_is_saved_by_an_answer_or_by_messages(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": HEAD}], "max_tokens": 4}
    request, wrong = tmp_path / "request.json", tmp_path / "wrong.json"
    request.write_text(json.dumps(body))
    wrong.write_text("{}")
    with prefix_server(tmp_path, data_dir=tmp_path) as client:
        answer = client.post("/v1/chat/completions", json=body).json()
        assert run(client, tmp_path, "save", "a", "--response-id", answer["id"]).exit_code == 0
        assert run(client, tmp_path, "save", "b", "--messages", str(request)).exit_code == 0
        refused = run(client, tmp_path, "save", "b", "--messages", str(request))
        assert refused.exit_code == 1 and "there is a session 'b'" in refused.stderr
        assert run(client, tmp_path, "save", "b", "--messages", str(request), "--replace").exit_code == 0
        assert run(client, tmp_path, "save", "c", "--messages", str(wrong)).exit_code == 1
        assert "not in the cache" not in run(client, tmp_path, "restore", "b").stdout
        assert num_cached(client, "never said") == 0
