"""`vecinfer`: help, options over the file, one-line errors, and talking to a server."""

from __future__ import annotations

import importlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from server import cli
from server.commands import serve as serve_command
from server.config import ServerConfig
from server.errors import ConfigError
from server.serving.port import check_port
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny_models import write_tiny_model
from tests.server.http.conftest import ADMIN_KEY, serve
from tests.server.model.test_local_models import put


def _run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.build_app(), arguments, input=stdin)


@pytest.fixture
def url() -> Iterator[str]:
    engine = FakeEngine()
    with serve(engine) as port:
        yield f"http://127.0.0.1:{port}"
    engine.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Configurations `vecinfer serve` would have started with."""
    configs: list[ServerConfig] = []
    monkeypatch.setattr(serve_command, "start", configs.append)
    return configs


@pytest.mark.parametrize("command", ["serve", "chat", "model", "status"])
def test_help_names_every_command_and_each_has_its_own(command: str) -> None:
    assert command in _run("--help").output
    assert _run(command, "--help").exit_code == 0


def test_version_needs_no_command() -> None:
    result = _run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("vecinfer-server ")


@pytest.mark.parametrize("message", ["No module named 'mlx'", "libmlx.so: cannot open shared object file"])
def test_a_missing_back_end_is_a_command_to_run(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def start(config: ServerConfig) -> None:
        raise ImportError(message, name="mlx" if "module" in message else None)

    monkeypatch.setattr(serve_command, "start", start)
    result = _run("serve", "--model", "demo")
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert "install 'mlx[cpu]==" in result.stderr.replace("\n", "") or "install --python" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    words = {"COMP_WORDS": "vecinfer ser", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "vecinfer ser"}
    asked = {"_VECINFER_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(cli.build_app(), [], env={**asked, **words}, prog_name="vecinfer")
    assert "serve" in result.output and "service" in result.output


def test_without_a_model_the_cache_is_listed_and_the_demo_served(
    started: list[ServerConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(tmp_path, "owner/known")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = _run("serve")
    assert result.exit_code == 0, result.output
    assert "owner/known" in result.stderr and "0.0 GB" in result.stderr
    assert started[0].model.name == "demo"


def test_a_command_that_does_not_import_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> ModuleType:
        if name == "server.commands.chat":
            raise ImportError("no module named parrot")
        return importlib.__import__(name, fromlist=["register"])

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert _run("model", "--help").exit_code == 0
    result = _run("chat", "hi", "--url", "http://localhost")
    assert result.exit_code == 1
    assert "`vecinfer chat` cannot run here: no module named parrot" in result.stderr


def test_options_win_over_the_file(started: list[ServerConfig], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("http: {port: 7000, host: 0.0.0.0}\nkv_cache: {value_bits: 1}\n")
    result = _run("serve", "-c", str(tmp_path / "mine.yaml"), "--port", "7001", "--bits", "3", "--key-bits", "4")
    assert result.exit_code == 0, result.output
    (config,) = started
    assert (config.http.port, config.http.host) == (7001, "0.0.0.0")
    assert (config.kv_cache.key_bits, config.kv_cache.value_bits) == (4, 3)
    assert not config.http.insecure and config.http.allowed_hosts == ()


def test_who_may_call_is_an_option(started: list[ServerConfig]) -> None:
    result = _run("serve", "--host", "0.0.0.0", "--insecure", "--allowed-host", "a.example", "--allowed-host", "*.lan")
    assert result.exit_code == 0, result.output
    assert started[0].http.insecure and started[0].http.allowed_hosts == ("a.example", "*.lan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "kv_cache.key_bits"),
        (["--method", "zip"], "kv_cache.method"),
        (["--port", "70000"], "http.port"),
        (["-c", "/nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_options_are_one_line_errors(arguments: list[str], message: str, started: list[ServerConfig]) -> None:
    result = _run("serve", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not started


def test_debug_lets_the_traceback_through() -> None:
    assert isinstance(_run("--debug", "serve", "-c", "/nowhere.yaml").exception, ConfigError)


def test_a_port_in_use_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1 is in use.*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        check_port(host, 8080)


def test_model_prints_the_folder_last(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "gemma3_text")
    result = _run("model", str(folder))
    assert result.stdout.splitlines()[-1] == str(folder)
    assert "6 layers" in result.stderr


def test_chat_streams_one_answer(url: str) -> None:
    result = _run("chat", "What is the capital of France?", "--url", url)
    assert result.exit_code == 0, result.output
    assert result.stdout == "The capital of France is Paris. Ünïcödé 🗼\n"


def test_chat_keeps_the_conversation(url: str) -> None:
    result = _run("chat", "--url", f"{url}/v1", "--system", "Be brief.", stdin="one\ntwo\n\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Paris") == 2


def test_chat_saves_a_conversation_and_goes_on_with_it(url: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Paris is in France.")
    saved = tmp_path / "talk.json"
    typed = f"/system Be brief.\n/file {tmp_path / 'notes.txt'}\none\n/save {saved}\n\n"
    result = _run("chat", "--url", url, stdin=typed)
    assert result.exit_code == 0, result.output
    roles = [(m["role"], m["content"]) for m in json.loads(saved.read_text())["messages"]]
    assert roles[0] == ("system", "Be brief.") and roles[1] == ("user", "Paris is in France.\n\none")
    assert roles[2][0] == "assistant" and "Paris" in roles[2][1]
    assert _run("chat", "--url", url, "--load", str(saved), stdin=f"two\n/save {saved}\n\n").exit_code == 0
    assert [m["role"] for m in json.loads(saved.read_text())["messages"]][3:] == ["user", "assistant"]


def test_chat_names_a_file_that_is_not_there(url: str, tmp_path: Path) -> None:
    result = _run("chat", "--url", url, stdin=f"/load {tmp_path / 'none.json'}\nhello\n\n")
    assert result.exit_code == 0 and "cannot read" in result.output and "Paris" in result.stdout


def test_chat_says_what_the_server_refuses(url: str) -> None:
    result = _run("chat", "hi", "--url", url, "--model", "nobody")
    assert result.exit_code == 1
    assert "HTTP 404" in result.stderr


@pytest.mark.parametrize("command", [["chat", "hi"], ["status"]])
def test_no_server_is_one_line_with_the_remedy(command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    result = _run(*command, "--url", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert "vecinfer serve" in result.stderr


def test_status_shows_what_is_measured(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECINFER_ADMIN_KEY", ADMIN_KEY)
    result = _run("status", "--url", url)
    assert result.exit_code == 0, result.output
    for text in ("ready", "fake/model", "1 of 2 packed", "1 RotatingKVCache", "8.0 times smaller", "3 used"):
        assert text in result.stdout
    assert '"fp16_bytes": 12000' in _run("status", "--json", "--url", url).stdout


def test_open_gives_a_link_that_logs_in_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_link(link: str) -> bool:
        opened.append(link)
        return True

    monkeypatch.setattr("webbrowser.open", open_link)
    monkeypatch.setenv("VECINFER_ADMIN_KEY", ADMIN_KEY)
    assert _run("open", "--url", f"{url}/v1").output == ""
    printed = _run("open", "--url", url, "--print").stdout.strip()
    assert [link.partition("/#link=")[0] for link in (*opened, printed)] == [url, url]
    assert opened != [printed] and ADMIN_KEY not in printed


def test_a_machine_without_a_browser_is_given_the_link(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda link: False)
    monkeypatch.setenv("VECINFER_ADMIN_KEY", ADMIN_KEY)
    assert "/#link=" in _run("open", "--url", url).stdout
