"""Installing, installing again, removing and asking, on a Mac that is not one."""

from __future__ import annotations

import plistlib
import shlex
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import load_config
from server.errors import ConfigError, ServiceError
from server.launchd.install import InstallOptions, install, plan_install
from server.launchd.launchctl import LAUNCHCTL, Launchctl, parse_print
from server.launchd.machine import Answer, Outcome
from server.launchd.places import SERVER_LABEL, WIRED_LABEL, Places
from server.launchd.status import service_status
from server.launchd.uninstall import uninstall
from tests.helpers.fake_machine import PRINT, FakeMachine


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    folder = tmp_path / "LaunchDaemons"
    folder.mkdir()
    return Places(tmp_path / "Application Support" / "VecInfer", folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def installed(machine: FakeMachine, places: Places, **options: Any) -> list[str]:
    """Install with a free port unless `changes` says otherwise; what it said."""
    said: list[str] = []
    options.setdefault("changes", {"http.port": free_port()})
    plan = plan_install(InstallOptions(places=places, python=Path("/opt/venv/bin/python"), **options), machine)
    install(plan, machine, said.append)
    return said


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_install_writes_files_with_owners_and_modes(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    assert (mode(places.key), mode(places.config), mode(places.data)) == (0o600, 0o644, 0o750)
    assert mode(places.plist(SERVER_LABEL)) == 0o644
    assert machine.owners[places.key] == machine.owners[places.data] == machine.owners[places.logs] == 380
    assert machine.owners[places.prefix] == 0
    owners_of_replaced = {path.name: uid for path, uid in machine.owners.items() if path.suffix == ".new"}
    assert owners_of_replaced == {"config.yaml.new": 0, f"{SERVER_LABEL}.plist.new": 0}
    assert not list(places.prefix.glob("*.new"))


def test_install_makes_a_long_random_key_and_shows_it_nowhere(machine: FakeMachine, places: Places) -> None:
    said = installed(machine, places)
    key = places.key.read_text().strip()
    assert len(key) >= 40
    shown = [*said, places.config.read_text(), places.plist(SERVER_LABEL).read_text(), repr(machine.commands)]
    assert not any(key in text for text in shown)


def test_install_loads_the_daemon_and_says_how_to_use_it(machine: FakeMachine, places: Places) -> None:
    (said,) = installed(machine, places)
    assert machine.loaded == {SERVER_LABEL}
    assert machine.verbs() == ["enable", "bootstrap"]
    config = load_config(places.config)
    assert f"curl http://127.0.0.1:{config.http.port}/v1/chat/completions" in said
    assert str(places.key) in said


def test_daemon_configuration_has_its_places(machine: FakeMachine, places: Places) -> None:
    installed(machine, places, changes={"model.name": "mlx-community/Qwen3-8B-4bit", "http.port": free_port()})
    config = load_config(places.config)
    assert config.model.name == "mlx-community/Qwen3-8B-4bit"
    assert (config.http.api_key_file, config.log.file, config.data_dir) == (places.key, places.log, places.data)


def test_second_install_unloads_first_and_keeps_key_and_settings(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    key, port = places.key.read_text(), load_config(places.config).http.port
    edited = places.config.read_text() + "engine:\n  max_num_seqs: 3  # mine\n"
    places.config.write_text(edited)
    machine.commands.clear()
    machine.unload_delay = 2
    installed(machine, places, changes={})
    assert machine.verbs() == ["bootout", "enable", "bootstrap"]
    assert places.key.read_text() == key
    assert places.config.read_text() == edited
    assert load_config(places.config).http.port == port
    assert machine.slept_s >= 2


def test_second_install_changes_only_what_is_asked(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    places.config.write_text(places.config.read_text() + "engine:\n  max_num_seqs: 3\n")
    port = free_port()
    installed(machine, places, changes={"http.port": port})
    config = load_config(places.config)
    assert (config.http.port, config.engine.max_num_seqs) == (port, 3)


def test_dry_run_describes_every_command_and_file(machine: FakeMachine, places: Places) -> None:
    options = InstallOptions(
        places=places, python=Path("/opt/v/bin/python"), wired_limit_mb=8192, changes={"http.port": free_port()}
    )
    plan = plan_install(options, machine)
    text = plan.describe()
    assert machine.commands == [] and not places.prefix.exists()
    install(plan, machine, lambda line: None)
    run = [shlex.join(c) for c in machine.commands if c[:2] != (LAUNCHCTL, "print")]
    assert run and all(command in text for command in run)
    written = [p for root in (places.prefix, places.daemon_folder) for p in root.rglob("*") if p.is_file()]
    assert len(written) == 4 and all(str(path) in text for path in written)
    assert places.key.read_text().strip() not in text


def test_wired_limit_has_a_daemon_of_its_own(machine: FakeMachine, places: Places) -> None:
    installed(machine, places, wired_limit_mb=12_288)
    assert machine.loaded == {SERVER_LABEL, WIRED_LABEL}
    arguments = plistlib.loads(places.plist(WIRED_LABEL).read_bytes())["ProgramArguments"]
    assert arguments == ["/usr/sbin/sysctl", "iogpu.wired_limit_mb=12288"]


def test_wired_limit_that_starves_macos_is_refused(machine: FakeMachine, places: Places) -> None:
    with pytest.raises(ServiceError, match="at most 12288"):
        installed(machine, places, wired_limit_mb=12_289)
    assert not places.prefix.exists()


def test_home_is_the_accounts_or_the_data_folder(machine: FakeMachine, places: Places) -> None:
    homes = {}
    for user in ("anna", "_vecinfer"):
        installed(machine, places, user=user)
        properties = plistlib.loads(places.plist(SERVER_LABEL).read_bytes())
        homes[user] = properties["EnvironmentVariables"]["HOME"]
    assert homes == {"anna": "/Users/anna", "_vecinfer": str(places.data)}


def test_long_drain_gets_a_longer_exit_timeout(machine: FakeMachine, places: Places, tmp_path: Path) -> None:
    source = tmp_path / "c.yaml"
    source.write_text("engine: {drain_timeout_s: 100}")
    installed(machine, places, source=source, changes={"http.port": free_port()})
    assert plistlib.loads(places.plist(SERVER_LABEL).read_bytes())["ExitTimeOut"] == 105


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http: {prot: 1}", "http.prot"),
        ("log: {file: server.log}", r"make absolute log.file \(server.log\)"),
        ("data_dir: ~/vecinfer", "make absolute data_dir"),
        ("model: {name: ./model}", "make absolute model.name"),
        ("http: {port: 0}", "a daemon needs one"),
        ("a: [", "cannot read"),
    ],
)
def test_settings_no_daemon_can_run_with(
    machine: FakeMachine, places: Places, tmp_path: Path, text: str, said: str
) -> None:
    source = tmp_path / "c.yaml"
    source.write_text(text)
    with pytest.raises(ConfigError, match=said):
        installed(machine, places, source=source, changes={})
    assert machine.commands == []


def test_model_folder_becomes_absolute(machine: FakeMachine, places: Places, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    plan = plan_install(InstallOptions(places=places, changes={"model.name": f"{tmp_path}/x/../model"}), machine)
    assert plan.settings.config.model.name == str(tmp_path / "model")


def test_refusals_before_anything_is_done(machine: FakeMachine, places: Places) -> None:
    with pytest.raises(ServiceError, match=r"no account 'bob'.*\n.*sysadminctl"):
        installed(machine, places, user="bob")
    with pytest.raises(ServiceError, match="must not run as root"):
        installed(machine, places, user="root")
    machine.root = False
    with pytest.raises(ServiceError, match=r"sudo .*vecinfer service install"):
        installed(machine, places)
    machine.is_macos = False
    with pytest.raises(ServiceError, match="needs macOS"):
        installed(machine, places)
    with pytest.raises(ServiceError, match="needs macOS"):
        uninstall(places, machine, print, purge=True)
    assert machine.commands == [] and not places.prefix.exists()


def test_environment_that_the_account_cannot_read(machine: FakeMachine, places: Places) -> None:
    machine.failures["/usr/bin/sudo"] = [Outcome(1, "Permission denied")]
    with pytest.raises(ServiceError, match=r"cannot run /opt/venv/bin/python: Permission denied\n.*Documents"):
        installed(machine, places)
    assert not places.prefix.exists()


def test_plutil_has_a_say(machine: FakeMachine, places: Places) -> None:
    machine.failures["/usr/bin/plutil"] = [Outcome(1, "Unexpected character")]
    with pytest.raises(ServiceError, match="Unexpected character"):
        installed(machine, places)
    assert machine.loaded == set()


def test_port_in_use_is_explained_and_nothing_started(machine: FakeMachine, places: Places) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"in use.*\n.*lsof -nP -iTCP:{port}"):
            installed(machine, places, changes={"http.port": port})
    assert machine.loaded == set()


@pytest.mark.parametrize(
    ("code", "said"), [(5, "wrong owner or mode"), (125, "run with sudo"), (119, "disabled"), (77, "launchctl\\(1\\)")]
)
def test_bootstrap_errors_are_explained(machine: FakeMachine, places: Places, code: int, said: str) -> None:
    machine.failures["bootstrap"] = [Outcome(code, f"Bootstrap failed: {code}: text")] * 4
    with pytest.raises(ServiceError, match=rf"ended with {code}: .*{said}(.|\n)*Bootstrap failed: {code}"):
        installed(machine, places)


def test_bootstrap_waits_out_an_old_job(machine: FakeMachine, places: Places) -> None:
    machine.failures["bootstrap"] = [Outcome(37, "Operation already in progress"), Outcome(5, "Input/output error")]
    installed(machine, places)
    assert machine.loaded == {SERVER_LABEL} and machine.slept_s >= 4


def test_job_that_never_ends_is_said(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    machine.unload_delay = 1000
    with pytest.raises(ServiceError, match="has not ended"):
        uninstall(places, machine, print, purge=False)
    assert places.plist(SERVER_LABEL).exists()


def test_server_that_does_not_come_up(machine: FakeMachine, places: Places) -> None:
    places.logs.mkdir(parents=True)
    places.startup_err.write_text("error: kv_cache.bits: must be 1-4\n")
    machine.answers = {}
    with pytest.raises(ServiceError) as caught:
        installed(machine, places)
    assert "launchd says running, last exit 0" in caught.value.message
    assert "  | error: kv_cache.bits: must be 1-4" in caught.value.message


def test_uninstall_keeps_data_and_is_harmless_twice(machine: FakeMachine, places: Places) -> None:
    installed(machine, places, wired_limit_mb=8192)
    said: list[str] = []
    uninstall(places, machine, said.append, purge=False)
    assert machine.loaded == set() and not list(places.daemon_folder.iterdir())
    assert places.key.exists() and places.config.exists()
    assert "until the next boot" in said[1]
    machine.commands.clear()
    uninstall(places, machine, said.append, purge=False)
    assert "bootout" not in machine.verbs()


def test_purge_removes_ours_and_nothing_else(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    (places.data / "model.safetensors").write_bytes(b"x")
    (places.prefix / "notes.txt").write_text("not ours")
    uninstall(places, machine, print, purge=True)
    assert [path.name for path in places.prefix.iterdir()] == ["notes.txt"]
    (places.prefix / "notes.txt").unlink()
    uninstall(places, machine, print, purge=True)
    assert not places.prefix.exists()


def test_status_of_a_ready_server(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    status = service_status(places, machine)
    assert status.exit_code == 0
    assert status.lines()[0] == "launchd   running, process 4242, started 2 times since boot, last exit: 0"
    assert status.lines()[1].endswith(": ready")


def test_status_while_calibrating_stopped_and_absent(machine: FakeMachine, places: Places) -> None:
    assert service_status(places, machine).exit_code == 3
    installed(machine, places)
    body = {"status": "calibrating", "progress": 0.4, "detail": "fitting layer 12"}
    machine.answers["/readyz"] = Answer(503, body)
    status = service_status(places, machine)
    assert status.exit_code == 1 and status.lines()[1].endswith("calibrating 40%: fitting layer 12")
    machine.loaded.clear()
    status = service_status(places, machine)
    assert status.exit_code == 3 and "not loaded" in status.lines()[0] and "does not answer" in status.lines()[1]


def test_status_with_a_broken_configuration(machine: FakeMachine, places: Places) -> None:
    installed(machine, places)
    places.config.write_text(yaml.safe_dump({"httpp": {}}))
    assert "httpp" in service_status(places, machine).lines()[1]


def test_print_is_read_leniently() -> None:
    state = parse_print(PRINT.format(label="x"))
    assert (state.state, state.pid, state.last_exit, state.runs) == ("running", 4242, "0", 2)
    state = parse_print("system/x = {\n\tstate = spawn scheduled\n\tlast exit code = 78: EX_CONFIG\n}")
    assert (state.state, state.pid, state.last_exit) == ("spawn scheduled", None, "78: EX_CONFIG")
    killed = parse_print("x = {\n\tlast terminating signal = Killed: 9\n}")
    assert killed.last_exit == "Killed: 9"
    for text in ("", "}}}", "a new form\nwithout = signs {", "pid = none"):
        assert parse_print(text).pid is None


def test_launchctl_is_never_asked_to_unload_what_is_not_loaded(machine: FakeMachine) -> None:
    assert Launchctl(machine).bootout("com.example.none") is False
    assert machine.verbs() == []
