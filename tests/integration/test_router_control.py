"""What the control process does for several others: they hear of it all, and it outlives the one that did it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helios.http.client import HttpClient
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
ROUNDS = 12
"""Requests on connections of their own, of which each of two processes gets some."""


def statuses(router: RouterProcess, model: str) -> set[int]:
    return {router.chat(model).status for _ in range(ROUNDS)}


def described(*workers: Any) -> str:
    return "".join(f'[[workers]]\nmodel = "{one.model}"\nurl = "{one.url}"\n' for one in workers)


def test_workers_cordons_and_leases_outlive_the_process_that_knew_them(
    start_router: StartRouter, helios_home: Any, fake_vllm: Any, wait_for: Any, tmp_path: Path
) -> None:
    one, two = fake_vllm("filed"), fake_vllm("registered")
    file = tmp_path / "workers.toml"
    file.write_text(described(one))
    discovery = json.dumps({"file": str(file), "file_poll_s": 0.05})
    router = start_router(discovery=discovery, processes=2, wait_up=False)
    client = HttpClient(f"unix:{helios_home.run / f'router-{router.address[1]}.sock'}")

    def shown() -> dict[str, tuple[bool, bool, str]]:
        found = client.json("GET", "/workers")["workers"]
        return {one["id"]: (one["cordoned"], one["lease_s"] is not None, one["health"]) for one in found}

    filed = one.url.removeprefix("http://")
    try:
        client.json("PUT", "/workers/w2", body={"url": two.url, "models": [two.model], "lease_s": 60.0})
        wait_for(lambda: router.up() == 2)
        assert statuses(router, one.model) == statuses(router, two.model) == {200}
        client.json("POST", f"/workers/{filed}/cordon")
        wait_for(lambda: statuses(router, one.model) == {503})
        expected = {filed: (True, False, "up"), "w2": (False, True, "up")}
        assert shown() == expected

        file.write_text("[[workers\n")  # it can't be read just when it is needed
        (control,) = router.pids("control")
        os.kill(control, signal.SIGKILL)
        wait_for(lambda: router.pids("control") not in ([], [control]), what="another control process")
        wait_for(lambda: shown() == expected, what="what the one before knew")
        assert (statuses(router, one.model), statuses(router, two.model)) == ({503}, {200})
        client.json("POST", f"/workers/{filed}/uncordon")
        wait_for(lambda: statuses(router, one.model) == {200})

        old = {*router.pids(), *router.pids("control")}
        file.write_text(described(one) + "weight = 2.0\n")
        router.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not old & {*router.pids(), *router.pids("control")}, what="all processes to be new")
        wait_for(lambda: set(shown()) == {filed, "w2"}, what="the administration of the new one")
        assert statuses(router, one.model) == statuses(router, two.model) == {200}
        client.json("DELETE", "/workers/w2")
        wait_for(lambda: statuses(router, two.model) == {503}, what="all processes to know that it left")
    finally:
        client.close()


def test_the_administration_answers_until_the_last_request_has_ended(
    start_router: StartRouter, helios_home: Any, fake_vllm: Any, wait_for: Any
) -> None:
    worker = fake_vllm(token_s=0.05)
    router = start_router(worker, processes=2)
    body = {"model": worker.model, "max_tokens": 40, "stream": True, "messages": [{"role": "user", "content": "x"}]}
    held, answer = stream(router.address, "/v1/chat/completions", body)
    path = helios_home.run / f"router-{router.address[1]}.sock"
    client = HttpClient(f"unix:{path}")
    try:
        assert client.json("GET", "/state")["status"] == "ready"
        router.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.json("GET", "/state")["status"] == "draining")
        assert [one["in_flight"] for one in client.json("GET", "/workers")["workers"]] == [1]
        assert answer.read().endswith(b"data: [DONE]\n\n")
    finally:
        held.close()
        client.close()
    assert router.process.wait(20) == 0
    assert not path.exists()


def test_a_source_that_the_new_configuration_has_not_takes_its_workers_along(
    start_router: StartRouter, fake_vllm: Any, wait_for: Any, tmp_path: Path
) -> None:
    one, two = fake_vllm("filed"), fake_vllm("configured")
    file, config = tmp_path / "workers.toml", tmp_path / "helios.toml"
    file.write_text(described(one))
    always = f'[[router.workers]]\nmodel = "{two.model}"\nurl = "{two.url}"\n'
    config.write_text(always + f'[router.discovery]\nfile = "{file}"\n')
    router = start_router(processes=2, wait_up=False, args=("--config", str(config)))
    wait_for(lambda: router.up() == 2)
    assert statuses(router, one.model) == {200}
    config.write_text(always)
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: 200 not in statuses(router, one.model), what="it to be gone")
    assert statuses(router, two.model) == {200}


def test_all_processes_say_what_the_registry_has_said_of_a_model(
    start_router: StartRouter, fake_vllm: Any, wait_for: Any, tmp_path: Path
) -> None:
    worker, config = fake_vllm(), tmp_path / "helios.toml"
    config.write_text('[registry]\nurls = ["http://127.0.0.1:9"]\n[router.discovery]\nresolve = true\n')
    router = start_router(worker, processes=2, args=("--config", str(config)))
    first = router.chat("org/none")
    assert (first.status, first.json()["error"]["code"]) == (503, "model_unavailable"), "it waited until that was known"

    def told() -> set[str]:
        return {router.chat("org/none").json()["error"]["message"] for _ in range(ROUNDS)}

    answer = "The model 'org/none' can't answer yet: the registry does not answer."
    wait_for(lambda: told() == {answer}, what="both processes to have heard")
    assert router.chat("not a/repository/at all").status == 404


def test_limits_are_those_of_all_processes_together(start_router: StartRouter, fake_vllm: Any, wait_for: Any) -> None:
    worker, other = fake_vllm(), fake_vllm("other")
    limit = {"requests_per_minute": 6}
    admission = json.dumps({"models": {worker.model: limit, other.model: limit}})
    router = start_router(worker, other, processes=2, admission=admission)
    began = time.monotonic()
    answers = [router.chat(worker.model) for _ in range(20)]

    def flowed_in() -> float:
        return (time.monotonic() - began) / 10

    passed = sum(one.status == 200 for one in answers)
    assert 6 <= passed <= 6 + flowed_in() + 1  # and one that both may have let through
    assert "6 requests" in next(one for one in answers if one.status == 429).json()["error"]["message"]
    body = json.dumps({"model": other.model, "max_tokens": 2, **CHAT}).encode()
    connection = router.connection()  # one process alone gives all that there is
    statuses = []
    for _ in range(6):
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    assert statuses == [200] * 6
    old = router.pids()
    for pid in old:  # who is new does not begin with full buckets
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(router.pids()) == 2 and not {*old} & {*router.pids()}, what="other processes")
    passed += sum(router.chat(worker.model).status == 200 for _ in range(12))
    assert passed <= 6 + flowed_in() + 1  # of new buckets there would be 6 more


def shown(router: RouterProcess, helios: Any, url: str) -> str:
    """The worker's line of ``helios router top``."""
    lines = helios("router", "top", "--once", "--port", str(router.address[1])).out.splitlines()
    return next(line for line in lines if line.startswith(url.removeprefix("http://")))


def test_a_worker_that_fails_is_found_out_once_for_all_processes(
    start_router: StartRouter, helios: Any, fake_vllm: Any, wait_for: Any
) -> None:
    bad, good = fake_vllm("tiny"), fake_vllm("tiny")
    bad.fault("status", status=503, times=None)
    breaker = {"failures": 4, "open_s": 60, "jitter": 0, "successes": 2}
    settings = {"breaker": json.dumps(breaker), "retries": json.dumps({"budget_floor_per_s": 10})}
    router = start_router(bad, good, processes=2, args=("--policy", "least-requests"), slow_start_s=0, **settings)
    assert [router.chat().status for _ in range(40)] == [200] * 40
    assert 4 <= len(bad.journal()) <= 5  # the one that didn't open it may not have heard when it is asked at once
    assert router.metric("helios_router_breaker_openings_total", worker=bad.url) == 1
    assert router.metric("helios_router_breaker_state", worker=bad.url) == 2
    assert "up breaker open " in shown(router, helios, bad.url)
    assert "up  " in shown(router, helios, good.url)
    old = router.pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(router.pids()) == 2 and not {*old} & {*router.pids()}, what="other processes")
    before = len(bad.journal())
    assert [router.chat().status for _ in range(10)] == [200] * 10
    assert len(bad.journal()) == before  # they begin with what was known
    bad.clear_faults()
    bad.refuse()
    wait_for(lambda: router.up() == 1, what="it to be down")
    bad.accept()  # and up again: it is probed at once, and is closed in all processes when that goes well
    wait_for(lambda: router.chat().status == 200 and not router.metric("helios_router_breaker_state"), what="closed")
    wait_for(lambda: "up breaker" not in shown(router, helios, bad.url), what="it to be shown")


def test_a_process_that_dies_while_it_probes_lets_another_one(
    start_router: StartRouter, fake_vllm: Any, wait_for: Any
) -> None:
    bad, good = fake_vllm("tiny"), fake_vllm("tiny")
    bad.fault("status", status=503, times=3)
    breaker = {"failures": 3, "open_s": 0.2, "jitter": 0, "successes": 1, "probes": 1}
    settings = {"breaker": json.dumps(breaker), "retries": json.dumps({"budget_floor_per_s": 10})}
    policy = ("--policy", "least-requests")
    quiet = json.dumps({"enabled": False})
    router = start_router(bad, good, processes=2, args=policy, hang=quiet, outliers=quiet, **settings)
    while len(bad.journal()) < 3:
        assert router.chat().status == 200
    state = partial(router.metric, "helios_router_breaker_state", worker=bad.url)
    wait_for(lambda: state() == 1, what="its time to be over")
    bad.fault("hang", times=1)
    outcomes: list[str] = []

    def ask() -> None:
        try:
            outcomes.append(str(router.chat().status))
        except (OSError, http.client.HTTPException):
            outcomes.append("lost")

    asking: list[threading.Thread] = []

    def probed() -> bool:
        asking.append(threading.Thread(target=ask, daemon=True))
        asking[-1].start()
        return len(bad.journal()) == 4

    wait_for(probed, what="the probe")
    for _ in range(6):
        assert router.chat().status == 200
    assert len(bad.journal()) == 4  # nobody else probes meanwhile
    assert state() == 1
    for pid in router.pids():  # whichever has it
        if "lost" not in outcomes:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: len(router.pids()) == 2, what="another process")
    wait_for(lambda: "lost" in outcomes, what="the probe to be lost")
    wait_for(lambda: router.chat().status == 200 and not router.metric("helios_router_breaker_state"), what="closed")
    assert len(bad.journal()) > 4
    for thread in asking:
        thread.join(10)


class Busy(BaseHTTPRequestHandler):
    """A worker that is up and has, by its own word alone, a long queue."""

    def do_GET(self) -> None:
        text = b"vllm:num_requests_running 9\nvllm:num_requests_waiting 50\n" if self.path == "/metrics" else b"{}"
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_readings_of_workers_reach_every_process(start_router: StartRouter, fake_vllm: Any, wait_for: Any) -> None:
    idle = fake_vllm()
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        busy = f"{idle.model}=http://127.0.0.1:{server.server_port}"
        router = start_router(idle, busy, processes=2, scrape_interval_s=0.1, args=("--policy", "queue-depth"))
        wait_for(lambda: statuses(router, idle.model) == {200}, what="all to go to the one that is idle")
        assert statuses(router, idle.model) == {200}
        router.stop()
        server.shutdown()
