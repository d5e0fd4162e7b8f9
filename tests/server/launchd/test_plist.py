"""The property lists: what they say, and that the rule checker catches what launchd would not."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server.errors import ServiceError
from server.launchd import rules
from server.launchd.places import DEFAULT_PREFIX, WIRED_LABEL, Places
from server.launchd.plist import ServerDaemon, WiredLimitDaemon, read_installed, render

EXAMPLE = Path(__file__).parents[3] / "deploy" / "com.vecinfer.server.plist"
PLACES = Places()


def example_daemon(**changes: Any) -> ServerDaemon:
    """The daemon that deploy/com.vecinfer.server.plist shows."""
    given: dict[str, Any] = {
        "python": Path("/opt/vecinfer/venv/bin/python"),
        "config": PLACES.config,
        "user": "_vecinfer",
        "home": PLACES.data,
        "data": PLACES.data,
        "out": PLACES.startup_out,
        "err": PLACES.startup_err,
    }
    return ServerDaemon(**{**given, **changes})


def broken(**changes: Any) -> list[str]:
    """The rules that the example breaks with some values changed; None removes one."""
    properties = example_daemon().properties() | changes
    text = plistlib.dumps({k: v for k, v in properties.items() if v is not None}).decode()
    return list(rules.violations(text))


def test_example_in_deploy_is_what_install_renders() -> None:
    assert EXAMPLE.read_text() == render(example_daemon())


def test_rendered_list_reads_back_with_types() -> None:
    properties = plistlib.loads(render(example_daemon()).encode())
    assert properties == example_daemon().properties()
    assert properties["KeepAlive"] is True and properties["RunAtLoad"] is True
    assert properties["Umask"] == 23  # launchd reads decimal: octal 027
    assert properties["ProcessType"] == "Interactive"
    assert properties["ExitTimeOut"] >= 30
    assert properties["SoftResourceLimits"] == {"NumberOfFiles": 4096}


def test_rendered_lists_obey_the_rules() -> None:
    for daemon in (example_daemon(), example_daemon(offline=True), WiredLimitDaemon(12_288)):
        assert list(rules.violations(render(daemon))) == []


def test_offline_is_an_option() -> None:
    assert "HF_HUB_OFFLINE" not in example_daemon().properties()["EnvironmentVariables"]
    assert example_daemon(offline=True).properties()["EnvironmentVariables"]["HF_HUB_OFFLINE"] == "1"


def test_wired_limit_runs_once_as_root() -> None:
    properties = WiredLimitDaemon(12_288).properties()
    assert properties["ProgramArguments"] == ["/usr/sbin/sysctl", "iogpu.wired_limit_mb=12288"]
    assert "KeepAlive" not in properties and "UserName" not in properties
    assert properties["Label"] == WIRED_LABEL


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WorkingDirectory": "data"}, "WorkingDirectory: 'data' is not an absolute path"),
        ({"StandardErrorPath": "~/err"}, "StandardErrorPath: '~/err' has ~"),
        ({"StandardOutPath": "/Users/$USER/out"}, "has ~ or $"),
        ({"WorkingDirectory": "/opt/../etc"}, "has .."),
        ({"ProgramArguments": ["python", "-m", "server.cli"]}, "ProgramArguments[0]: 'python' is not an absolute"),
        ({"ProgramArguments": ["/usr/bin/python3"]}, "is a stub"),
        ({"ProgramArguments": ["/p", "serve", "--config", "c.yaml"]}, "--config: 'c.yaml' is not an absolute"),
        ({"ProgramArguments": []}, "ProgramArguments: must be a list of strings"),
        ({"ProgramArguments": ["/p", 8080]}, "ProgramArguments: must be a list of strings"),
        ({"ProgramArguments": ["/p", "--api-key", "abc"]}, "looks like a secret"),
        ({"ProgramArguments": ["/p", "sk-abc"]}, "looks like a secret"),
        ({"EnvironmentVariables": {"VECINFER_API_KEY": "abc"}}, "VECINFER_API_KEY looks like a secret"),
        ({"EnvironmentVariables": {"X": "q7Zr1" * 9}}, "X looks like a secret"),
        ({"EnvironmentVariables": {"HOME": "~"}}, "HOME: '~' is not an absolute path"),
        ({"EnvironmentVariables": {"PATH": "/bin:bin"}}, "PATH: 'bin' is not an absolute path"),
        ({"EnvironmentVariables": {"N": 1}}, "values are strings"),
        ({"KeepAlive": 1}, "KeepAlive: is int, must be bool"),
        ({"ThrottleInterval": True}, "ThrottleInterval: is bool, must be int"),
        ({"ExitTimeOut": "30"}, "ExitTimeOut: is str, must be int"),
        ({"ExitTimeOut": 20}, "ExitTimeOut: below 30 s"),
        ({"Umask": "027"}, "Umask: is str, must be int"),
        ({"HardResourceLimits": {"NumberOfFiles": "many"}}, "limits are integers"),
        ({"ProcessType": "Background"}, "anything but Interactive is throttled"),
        ({"ProcessType": "interactive"}, "is none of"),
        ({"UserName": "root"}, "must not run as root"),
        ({"UserName": None}, "must not run as root"),
        ({"Keepalive": True}, "Keepalive: not a key"),
        ({"Label": None}, "Label: missing"),
        ({"StandardErrorPath": None}, "StandardErrorPath: missing"),
    ],
)
def test_broken_rules_are_named(changes: dict[str, Any], said: str) -> None:
    assert any(said in line for line in broken(**changes)), broken(**changes)


def test_a_key_file_is_no_secret() -> None:
    assert broken(ProgramArguments=["/p", "--api-key-file", "/etc/key"]) == []


def test_a_key_given_twice_is_found() -> None:
    text = render(example_daemon()).replace(
        "<key>Label</key>", "<key>UserName</key><string>root</string><key>Label</key>"
    )
    assert "UserName: given twice" in list(rules.violations(text))


@pytest.mark.parametrize("text", ["", "<plist>", "<plist><array/></plist>", "no xml & all"])
def test_no_property_list_at_all(text: str) -> None:
    with pytest.raises(ServiceError, match="breaks these rules"):
        rules.check(text)


def test_places_with_a_blank_survive_in_the_arguments() -> None:
    arguments = example_daemon().properties()["ProgramArguments"]
    assert arguments[-1] == str(DEFAULT_PREFIX / "config.yaml")


def test_installed_list_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.plist"
    assert read_installed(path) is None
    path.write_text(render(example_daemon()))
    found = read_installed(path)
    assert found is not None and found.config == PLACES.config and found.err == PLACES.startup_err


@pytest.mark.parametrize("content", [b"", b"<plist", plistlib.dumps({"Label": "x"}), plistlib.dumps([1])])
def test_foreign_list_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.plist"
    path.write_bytes(content)
    with pytest.raises(ServiceError, match="is not a property list of this server"):
        read_installed(path)


@pytest.mark.skipif(shutil.which("plistutil") is None, reason="not run: libplist's plistutil is not installed")
def test_a_second_parser_reads_it(tmp_path: Path) -> None:
    done = subprocess.run(["plistutil", "-i", str(EXAMPLE)], capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout
