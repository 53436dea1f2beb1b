"""Kubernetes manifests against the program: what a container is told has to be something that Helios knows."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from helios.cli.main import cli
from helios.config import Config, load
from heliosfs.fuse.attach import NAME
from heliosfs.keeper.__main__ import _parse
from heliosfs.keeper.wire import ENVIRON

Object = dict[str, Any]
PODS = ("DaemonSet", "Deployment", "StatefulSet")


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Name and template of each workload; a Pod is its own."""
    for each in objects:
        if each["kind"] in PODS:
            yield each["metadata"]["name"], each["spec"]["template"]
        elif each["kind"] == "Pod":
            yield each["metadata"]["name"], each


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: Object) -> dict[str, str]:
    """Its variables; what the cluster fills in is an address. Fails for one that is used before it is there."""
    known: dict[str, str] = {}
    for each in container.get("env", []):
        known[each["name"]] = expanded(each.get("value", "10.0.0.7"), known)
    return known


def expanded(text: str, known: Mapping[str, str]) -> str:
    """``$(NAME)`` as the kubelet fills it in."""

    def value(match: re.Match[str]) -> str:
        assert match[1] in known, f"{text} uses {match[1]}, which is not set before it"
        return known[match[1]]

    return re.sub(r"\$\((\w+)\)", value, text)


def settings(container: Object, file: str = "") -> Config:
    """The configuration that the container's process has, with the text of its helios.toml. Raises UsageError."""
    environ = environment(container)
    environ.pop("HELIOS_CONFIG", None)
    special = {name for name in environ if name.startswith("HELIOS_") and "__" not in name}
    assert special <= {"HELIOS_HOME", ENVIRON, NAME}, special
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "helios.toml").write_text(file)
        return load({**environ, "HELIOS_HOME": home})


def command_line(container: Object) -> tuple[str, Mapping[str, Any]]:
    """What is run, and the arguments as the program understands them. Fails where it would refuse them."""
    known = environment(container)
    words = [expanded(word, known) for word in [*container.get("command", []), *container.get("args", [])]]
    if words[0] == "helios":
        return _click(words[1:])
    assert words[:3] == ["python", "-P", "-m"], words
    if words[3] == "heliosfs.keeper":
        for word in words[4:]:  # argparse takes beginnings of options, too
            assert not word.startswith("--") or f'"{word}"' in inspect.getsource(_parse), word
        return words[3], vars(_parse(words[4:]))
    assert words[3] == "heliosfs", words
    (mountpoint,) = words[4:]
    return words[3], {"mountpoint": mountpoint}


def _click(words: list[str]) -> tuple[str, Mapping[str, Any]]:
    found: click.Command | None = cli
    name, rest = "", words
    while isinstance(found, click.Group) and rest and not rest[0].startswith("-"):
        following = found.get_command(click.Context(cli), rest[0])
        if following is None:
            break
        found, name, rest = following, f"{name} {rest[0]}".strip(), rest[1:]
    assert found is not None
    assert found is not cli, f"helios {words} is no command"
    if name == "worker":  # a model or one of its commands
        found = found.commands["run"]  # type: ignore[attr-defined]
    with found.make_context(name, rest) as context:
        return name, dict(context.params)
