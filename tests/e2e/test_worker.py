"""`helios worker` with real vLLM: from a Hub's cache to readiness, metrics, a drained stream and the end."""

import json
import re
import shutil
import signal
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helios.launch.tiny_model import tiny_llama
from tests.e2e.conftest import VLLM_START_S

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

NAME, COMMIT = "helios/tiny-llama", "c" * 40


def get(url):
    """Status and text of an answer."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(front):
    return [one for family in text_string_to_metric_families(get(f"{front}/metrics")[1]) for one in family.samples]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def test_a_pods_worker_from_its_volume_to_its_end(helios_home, start, wait_for, nothing_left, tmp_path):
    snapshot = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    shutil.copytree(tiny_llama(tmp_path / "models"), snapshot)
    port, api = free_port(), free_port()
    front = f"http://127.0.0.1:{port}"
    worker = start(
        helios_home, "worker", str(tmp_path / "hub"), "--port", port, "--vllm-port", api,
        HELIOS_WORKER__SETTLE_S="0.5", HELIOS_WORKER__KV_EVENTS_PORT=free_port(), HELIOS_WORKER__KV_REPLAY_PORT="0",
    )  # fmt: skip
    worker.wait_for('"starting vLLM"')
    assert get(f"{front}/readyz")[0] == 503
    assert get(f"{front}/healthz") == (200, "ok\n")
    worker.wait_for('"message": "ready"', 2 * VLLM_START_S)
    assert get(f"{front}/readyz") == (200, "ok\n")
    wait_for(lambda: worker.out == [f"http://127.0.0.1:{api}"], what="its URL on standard output")

    found = samples(front)
    ours = {"model": NAME, "revision": COMMIT, "role": "both"}
    assert all({**one.labels, **ours} == one.labels for one in found)
    by_name = {one.name: one for one in found}
    assert by_name["vllm:num_requests_running"].labels["model_name"] == NAME
    answered = sum(one.value for one in found if one.name == "vllm:request_success_total")
    assert answered == 1, "the warm-up request"
    phases = {one.labels["phase"] for one in found if one.name == "helios_worker_start_phase_seconds"}
    assert {"importing torch and vLLM", "loading weights", "warming up"} <= phases

    body = {"model": NAME, "prompt": "the sea", "max_tokens": 900, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{api}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        assert response.readline().startswith(b"data: ")
        rest = []
        reader = threading.Thread(target=lambda: rest.append(response.read()))
        reader.start()
        assert json.loads(get(f"http://127.0.0.1:{api}/load")[1]) == {"server_load": 1}, "vLLM counts it"
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: get(f"{front}/readyz")[0] == 503, what="the worker to be unready")
        reader.join(300)
    assert rest[0].rstrip().endswith(b"data: [DONE]"), "it was waited for"
    assert worker.wait(120) == 0
    # A vLLM that is told to end may say that its engine is dead, if that was faster than what listens to it.
    lines = worker.text().splitlines()
    (end,) = (at for at, line in enumerate(lines) if '"stopping vLLM"' in line)
    lines = lines[:end] + [line for line in lines[end:] if '"logger": "vllm"' not in line]
    assert [line for line in lines if re.search(r"Traceback|\"level\": \"error\"", line)] == []
    nothing_left(helios_home)
