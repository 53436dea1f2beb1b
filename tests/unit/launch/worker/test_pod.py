"""The pod in docs/worker.md against the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from helios.cli.worker import worker
from helios.config import Config, ServedSettings, load
from helios.errors import UsageError
from helios.launch.grace import grace_s
from helios.launch.worker.front import Front
from tests.support.manifests import command_line
from tests.support.manifests import settings as configured

PAGE = (Path(__file__).parents[4] / "docs" / "worker.md").read_text()


def pod():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    return yaml.safe_load(text)


def container():
    (one,) = pod()["spec"]["containers"]
    return one


def test_its_arguments_are_those_of_the_command():
    command, given = command_line(container())
    assert command == "worker"
    assert given["model"] == container()["volumeMounts"][0]["mountPath"]
    assert given["vllm_arguments"] == ("--max-model-len", "8192")
    assert container()["lifecycle"]["preStop"]["exec"]["command"][1:] == ["worker", "drain"]
    assert "drain" in worker.commands


def test_its_settings_are_known():
    settings = configured(container()).worker
    assert settings.advertise == settings.id == "10.0.0.7"
    assert settings.router_token_file.startswith(container()["volumeMounts"][2]["mountPath"])


def test_several_routers_are_a_list():
    found = load({"HELIOS_HOME": "/nowhere", "HELIOS_WORKER__ROUTERS": "http://a:8481, http://b:8481"})
    assert found.worker.routers == ["http://a:8481", "http://b:8481"]
    with pytest.raises(UsageError, match="user name or a password"):
        load({"HELIOS_HOME": "/nowhere", "HELIOS_WORKER__ROUTERS": "http://me:secret@a:8481"})


def test_its_ports_are_the_defaults():
    settings = Config().worker
    assert {one["name"]: one["containerPort"] for one in container()["ports"]} == {
        "http": settings.vllm_port,
        "front": settings.port,
        "side-channel": settings.side_channel_port,
        "kv-events": settings.kv_events_port,
        "kv-replay": settings.kv_replay_port,
    }
    for probe, handler in (("readinessProbe", Front._readyz), ("livenessProbe", Front._healthz)):
        assert container()[probe]["httpGet"] == {"path": f"/{handler.__name__[1:]}", "port": "front"}


def test_its_grace_period_covers_a_drain_and_the_end_of_vllm():
    settings = ServedSettings()
    assert pod()["spec"]["terminationGracePeriodSeconds"] >= grace_s(settings.drain_s, settings.stop_s)


def test_every_setting_and_every_metric_is_on_the_page():
    rows = " ".join(re.findall(r"^\| (`[^|]*) \|", PAGE.split("## Settings")[1], re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(ServedSettings.__struct_fields__)
    source = (Path(__file__).parents[4] / "helios" / "metrics.py").read_text()
    table = PAGE.split("## Metrics")[1].split("## Process 1")[0].replace("`, `_", "`, `helios_worker_")
    for name in re.findall(r'"(helios_worker_\w+)"', source):
        assert name in table


def test_defaults_on_the_page_are_the_programs():
    for row in re.findall(r"^\| (`\w.*?) \| (.*?) \|", PAGE.split("## Settings")[1], re.MULTILINE):
        names, defaults = re.findall(r"`(\w+)`", row[0]), [part.strip("` ") for part in row[1].split(",")]
        for name, default in zip(names, defaults, strict=False):
            real = getattr(ServedSettings(), name)
            if re.fullmatch(r"[\d.]+|on|off|both|false", default):
                assert str(real).lower().removesuffix(".0") == default, name
