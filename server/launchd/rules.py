"""What a launchd property list of ours must obey. launchd itself ignores a key it does not know, and a wrong
type, in silence; `plutil -lint` looks at the XML alone."""

from __future__ import annotations

import plistlib
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

from server.errors import ServiceError

TYPES: dict[str, type] = {
    "Label": str,
    "UserName": str,
    "ProgramArguments": list,
    "WorkingDirectory": str,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": bool,
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "Umask": int,
    "SoftResourceLimits": dict,
    "HardResourceLimits": dict,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}
PATH_KEYS = ("WorkingDirectory", "StandardOutPath", "StandardErrorPath")
PROCESS_TYPES = ("Interactive", "Standard", "Adaptive", "Background")
SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
# Known prefixes of keys, or a long run without a path separator, a dot or a blank.
SECRET_VALUE = re.compile(r"^(sk-|hf_|ghp_|xox)|^[A-Za-z0-9_\-+=]{32,}$")


def check(text: str) -> None:
    """Refuse a property list that breaks a rule.

    Raises:
        ServiceError: naming every rule that is broken.
    """
    problems = list(violations(text))
    if problems:
        raise ServiceError("the property list breaks these rules:\n" + "\n".join(f"  {line}" for line in problems))


def violations(text: str) -> Iterator[str]:
    """Every broken rule, one line each."""
    try:
        properties = plistlib.loads(text.encode(), fmt=plistlib.FMT_XML)
    except (ExpatError, plistlib.InvalidFileException, ValueError) as error:
        yield f"not a property list in XML: {error}"
        return
    yield from _duplicates(text)
    if not isinstance(properties, dict):
        yield "the top level is not a dictionary"
        return
    yield from _keys_and_types(properties)
    yield from _program(properties)
    yield from _paths(properties)
    yield from _secrets(properties)
    yield from _life(properties)


def _duplicates(text: str) -> Iterator[str]:
    """Keys given twice, of which parsers silently keep one."""
    for table in ElementTree.fromstring(text.encode()).iter("dict"):
        names = [child.text or "" for child in table if child.tag == "key"]
        yield from (f"{name}: given twice" for name in sorted({n for n in names if names.count(n) > 1}))


def _keys_and_types(properties: dict[str, Any]) -> Iterator[str]:
    for key, value in properties.items():
        if key not in TYPES:
            yield f"{key}: not a key that launchd knows or that we use"
        elif type(value) is not TYPES[key]:
            yield f"{key}: is {type(value).__name__}, must be {TYPES[key].__name__}"
    for key in ("Label", "ProgramArguments", "RunAtLoad"):
        if key not in properties:
            yield f"{key}: missing"
    for key in ("SoftResourceLimits", "HardResourceLimits"):
        limits = properties.get(key, {})
        if isinstance(limits, dict) and any(type(value) is not int for value in limits.values()):
            yield f"{key}: limits are integers"
    environment = properties.get("EnvironmentVariables", {})
    if isinstance(environment, dict) and any(not isinstance(value, str) for value in environment.values()):
        yield "EnvironmentVariables: values are strings"
    if properties.get("ProcessType", PROCESS_TYPES[0]) not in PROCESS_TYPES:
        yield f"ProcessType: {properties['ProcessType']!r} is none of {', '.join(PROCESS_TYPES)}"


def _program(properties: dict[str, Any]) -> Iterator[str]:
    arguments = properties.get("ProgramArguments", [])
    if not isinstance(arguments, list) or not arguments or any(not isinstance(part, str) for part in arguments):
        yield "ProgramArguments: must be a list of strings, the program first"
        return
    yield from _path("ProgramArguments[0]", arguments[0])
    if arguments[0] == "/usr/bin/python3":
        yield "ProgramArguments[0]: /usr/bin/python3 is a stub that fails without Apple's command-line tools"
    for flag, value in pairwise(arguments):
        if flag == "--config":
            yield from _path("--config", value)


def _paths(properties: dict[str, Any]) -> Iterator[str]:
    for key in PATH_KEYS:
        if isinstance(properties.get(key), str):
            yield from _path(key, properties[key])
    for name, value in _environment(properties).items():
        if name in ("HOME", "PATH"):
            for part in value.split(":"):
                yield from _path(name, part)


def _path(where: str, path: str) -> Iterator[str]:
    """launchd expands nothing and starts in /."""
    if not path.startswith("/"):
        yield f"{where}: {path!r} is not an absolute path"
    if "~" in path or "$" in path:
        yield f"{where}: {path!r} has ~ or $, which launchd does not expand"
    if ".." in path.split("/"):
        yield f"{where}: {path!r} has .."


def _secrets(properties: dict[str, Any]) -> Iterator[str]:
    """`launchctl print` shows arguments and environment to every user."""
    for name, value in _environment(properties).items():
        if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
            yield f"EnvironmentVariables: {name} looks like a secret; keep it in a file"
    arguments = properties.get("ProgramArguments", [])
    for part in arguments if isinstance(arguments, list) else []:
        flag = str(part).partition("=")[0]
        named = flag.startswith("--") and SECRET_NAME.search(flag) and not flag.endswith("-file")
        if named or SECRET_VALUE.search(str(part)):
            yield f"ProgramArguments: {flag[:12]}... looks like a secret; keep it in a file"


def _environment(properties: dict[str, Any]) -> dict[str, str]:
    environment = properties.get("EnvironmentVariables", {})
    if not isinstance(environment, dict):
        return {}
    return {name: value for name, value in environment.items() if isinstance(value, str)}


def _life(properties: dict[str, Any]) -> Iterator[str]:
    """Rules for what runs for ever; a daemon without KeepAlive ends by itself."""
    if properties.get("KeepAlive") is not True:
        return
    if properties.get("UserName") in (None, "root"):
        yield "UserName: a server must not run as root"
    for key in ("ThrottleInterval", "ExitTimeOut", "HardResourceLimits", "SoftResourceLimits", *PATH_KEYS):
        if key not in properties:
            yield f"{key}: missing"
    if type(properties.get("ExitTimeOut")) is int and properties["ExitTimeOut"] < 30:
        yield "ExitTimeOut: below 30 s, launchd kills the server while it drains"
    if properties.get("ProcessType") != "Interactive":
        yield "ProcessType: anything but Interactive is throttled"
