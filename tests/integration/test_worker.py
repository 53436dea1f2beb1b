"""`helios worker` as a process, with a fake vLLM that takes vLLM's own command line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helios.home import Home
from helios.http.client import HttpClient
from tests.support.cloud_servers import free_port
from tests.support.routing import StartRouter, start_router
from tests.support.worker import LATE, START_S, Stream, WorkerProcess, model_directory, request, running

__all__ = ["start_router"]

COMMIT = "c" * 40
Begin = Callable[..., WorkerProcess]


@pytest.fixture
def begin(helios_home: Home, tmp_path: Path, wait_for: Any) -> Iterator[Begin]:
    """``begin(*arguments, plan=[…], env={…}, ready=True)`` starts a worker."""
    with ExitStack() as stack:

        def start(
            *arguments: str, ready: bool = True, model: Path | str | None = None, **options: Any
        ) -> WorkerProcess:
            model = model or model_directory(tmp_path / "model")
            worker = stack.enter_context(running(helios_home, tmp_path / "fake", model, *arguments, **options))
            if ready:
                wait_for(worker.ready, timeout_s=START_S, what="the worker to be ready")
            return worker

        yield start


def samples(worker: WorkerProcess) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(worker.get("/metrics").body.decode()):
        for one in family.samples:
            found.setdefault(one.name, []).append((dict(one.labels), one.value))
    return found


def value(worker: WorkerProcess, name: str) -> float:
    ((_, found),) = samples(worker)[name]
    return found


# --- starting ---


def test_it_is_ready_after_the_warm_up_request_and_not_before(begin: Begin, wait_for: Any) -> None:
    worker = begin("--revision", COMMIT, ready=False, plan=[{"faults": [{"kind": "slow", "delay_s": 2.0}]}])
    wait_for(lambda: "warming up" in worker.why(), timeout_s=START_S, what="the warm-up")
    assert request(worker.url(), "GET", "/health").status == 200, "vLLM itself is well"
    assert worker.get("/readyz").status == 503
    assert worker.get("/healthz").status == 200, "nobody ends a container that starts"
    assert worker.out == [], "nothing is announced yet"
    wait_for(worker.ready, timeout_s=START_S, what="the worker to be ready")
    (asked,) = worker.control().journal("/v1/completions")
    assert asked["status"] == 200
    wait_for(lambda: worker.out, what="the URL")
    assert worker.out == [worker.url()]
    told = worker.start_of()
    assert told["argv"][1:4] == [str(worker.fake.parent / "model"), "--served-model-name", "org/name"]
    assert told["env"]["HF_HUB_OFFLINE"] == "1"
    assert told["env"]["VLLM_CACHE_ROOT"].startswith(str(worker.home.root))
    assert worker.control().violations() == []


def test_a_warm_up_that_fails_keeps_it_unready_and_says_why(begin: Begin, wait_for: Any) -> None:
    worker = begin(ready=False, plan=[{"faults": [{"kind": "status", "status": 500, "times": 3}]}])
    wait_for(lambda: "the warm-up request fails" in worker.why(), timeout_s=START_S, what="the reason")
    assert "a fault was ordered" in worker.why()
    assert worker.get("/healthz").status == 200
    wait_for(lambda: "The warm-up request failed" in worker.text(), what="the log")
    wait_for(worker.ready, timeout_s=START_S, what="the worker to be ready")
    assert samples(worker)["helios_worker_warm_ups_total"] == [
        ({"result": "failed", "model": "org/name", "role": "both"}, 3.0),
        ({"result": "answered", "model": "org/name", "role": "both"}, 1.0),
    ]


def test_a_warm_up_that_never_succeeds_ends_it_with_the_reason(begin: Begin) -> None:
    faults = [{"kind": "status", "status": 501, "times": None}]
    worker = begin("--start-timeout", "4", ready=False, plan=[{"faults": faults}])
    assert worker.wait() == 1
    assert "vLLM answers /health, but no request after 4 s: /v1/completions answered 501" in worker.text()
    assert "HELIOS_WORKER__WARM_UP=off" in worker.text()
    assert not worker.engine()


def test_three_early_deaths_end_it_with_the_end_of_the_log(begin: Begin) -> None:
    worker = begin(ready=False, plan=[{"ends": 1}])
    assert worker.wait() == 1
    assert "vllm can't be started (tries: 3): vLLM ended with status 1" in worker.text()
    assert "The first error in it: ValueError: no such dtype" in worker.text()
    assert worker.start_of(3)
    assert not worker.start_of(4)


def test_arguments_that_vllm_does_not_take_end_it_at_once(begin: Begin) -> None:
    worker = begin("--", "--no-such-option", ready=False)
    assert worker.wait() == 1
    assert "(tries: 1): vLLM ended with status 2" in worker.text()


def test_one_that_fails_once_at_its_start_is_tried_again(begin: Begin) -> None:
    worker = begin(plan=[{"ends": 1}, {}])
    assert value(worker, "helios_worker_restarts_total") == 1


def test_a_vllm_that_is_killed_comes_back_and_is_warmed_up_again(begin: Begin, wait_for: Any) -> None:
    worker = begin(plan=[{}, {"faults": [{"kind": "slow", "delay_s": 1.0}]}])
    assert request(worker.url(), "POST", "/v1/completions", {"model": "org/name", "prompt": "x"}).status == 200
    os.kill(worker.engine(), signal.SIGKILL)
    wait_for(lambda: not worker.ready(), what="the worker to be unready")
    assert worker.get("/healthz").status == 200
    wait_for(lambda: "warming up" in worker.why(), timeout_s=START_S, what="the second warm-up")
    wait_for(worker.ready, timeout_s=START_S, what="the worker to be ready again")
    assert len(worker.control(2).journal("/v1/completions")) == 1
    assert worker.url(2) == worker.url(1), "it keeps its port"
    assert value(worker, "helios_worker_restarts_total") == 1
    assert "vllm ended with status 137; it is started again in 1 s" in worker.text()


def test_a_key_that_vllm_wants_is_shown_to_it(begin: Begin) -> None:
    worker = begin("--", "--api-key", "secret")
    assert request(worker.url(), "GET", "/v1/models").status == 401


# --- what it is told ---


def test_a_cache_says_what_it_holds(begin: Begin, tmp_path: Path) -> None:
    snapshot = model_directory(tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT)
    worker = begin(model=tmp_path / "hub")
    assert worker.start_of()["argv"][1] == str(snapshot)
    assert samples(worker)["helios_worker_ready"] == [({"model": "org/name", "revision": COMMIT, "role": "both"}, 1.0)]


def test_a_decode_worker_is_told_its_place_by_the_pods_address(begin: Begin) -> None:
    pytest.importorskip("nixl")
    env = {
        "HELIOS_WORKER__ROLE": "decode",
        "HELIOS_WORKER__HOST": "0.0.0.0",
        "HELIOS_WORKER__ADVERTISE": "127.0.0.1",
        "HELIOS_WORKER__SIDE_CHANNEL_PORT": "5601",
        "HELIOS_WORKER__KV_EVENTS_PORT": "5558",
        "HELIOS_ROUTER__DISAGGREGATION": '{"lease_s": 40}',
    }
    worker = begin(env=env, plan=[{"role": "decode"}], ready=False)
    told = _wait_start(worker)
    argv, environ = told["argv"], told["env"]
    assert argv[argv.index("--host") + 1] == "0.0.0.0"
    assert (environ["VLLM_NIXL_SIDE_CHANNEL_HOST"], environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]) == ("127.0.0.1", "5601")
    transfer = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    assert transfer["kv_role"] == "kv_consumer"
    assert transfer["kv_connector_extra_config"] == {"kv_lease_duration": 40}
    events = json.loads(argv[argv.index("--kv-events-config") + 1])
    assert events["endpoint"] == "tcp://[::ffff:127.0.0.1]:5558"
    assert events["replay_endpoint"] == "tcp://[::ffff:127.0.0.1]:5657"


def _wait_start(worker: WorkerProcess) -> dict[str, Any]:
    end = time.monotonic() + START_S
    while not worker.start_of():
        assert time.monotonic() < end, worker.text()
        time.sleep(0.05)
    return worker.start_of()


@pytest.mark.parametrize(
    ("arguments", "env", "code", "message"),
    [
        (["--", "--port", "1"], {}, 2, "Use --vllm-port instead"),
        (["--", "--served_model_name=x"], {}, 2, "Use --name instead"),
        (["--host", "0.0.0.0", "--router", "http://r:8481"], {}, 2, "fieldPath: status.podIP"),
        (["--router", "https://r"], {}, 2, "no address of a router's administration"),
        (["--role", "sideways"], {}, 2, "is not one of"),
        ([], {"HELIOS_WORKER__DRAIN_S": "-1"}, 2, "`$.worker.drain_s`"),
        ([], {"HELIOS_WORKER__DRIAN_S": "1"}, 2, "did you mean 'drain_s'?"),
        (["--router-token-file", "/no/such/file"], {}, 2, "can't be read"),
        (["--revision", "main"], {}, 2, "is not a commit"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_starts(
    begin: Begin, arguments: list[str], env: dict[str, str], code: int, message: str
) -> None:
    worker = begin(*arguments, env=env, wait=False, ready=False)
    assert worker.wait() == code
    assert message in worker.text()
    assert not worker.start_of()


def test_no_model_no_name_and_a_taken_port_are_said(begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    worker = begin(model=tmp_path / "empty", wait=False, ready=False)
    assert worker.wait() == 1
    assert "neither a config.json" in worker.text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        worker = begin("--vllm-port", str(port), wait=False, ready=False)
        assert worker.wait() == 1
        assert f"127.0.0.1:{port} can't be used" in worker.text()
        assert "--vllm-port" in worker.text()


# --- metrics ---


def test_metrics_are_vllms_and_its_own_with_model_revision_and_role(begin: Begin) -> None:
    worker = begin("--revision", COMMIT)
    found = samples(worker)
    ours = {"model": "org/name", "revision": COMMIT, "role": "both"}
    assert all({**labels, **ours} == labels for rows in found.values() for labels, _ in rows)
    assert found["vllm:num_requests_running"] == [({"engine": "0", "model_name": "org/name", **ours}, 0.0)]
    assert found["helios_worker_engine_metrics"] == [(ours, 1.0)]
    assert found["helios_worker_start_seconds"][0][1] > 0
    phases = {labels["phase"]: seconds for labels, seconds in found["helios_worker_start_phase_seconds"]}
    assert set(phases) == {"importing torch and vLLM", "warming up"}


def test_a_vllm_that_does_not_give_its_metrics_costs_only_those(begin: Begin) -> None:
    worker = begin()
    worker.control().fault("stall", path="/metrics", times=None)
    began = time.monotonic()
    found = samples(worker)
    assert time.monotonic() - began < LATE / 2
    assert "vllm:num_requests_running" not in found
    assert found["helios_worker_engine_metrics"][0][1] == 0
    assert found["helios_worker_scrape_failures_total"][0][1] == 1


def test_while_vllm_starts_again_there_are_its_own_metrics(begin: Begin, wait_for: Any) -> None:
    worker = begin(plan=[{}, {"faults": [{"kind": "slow", "delay_s": 1.0}]}])
    os.kill(worker.engine(), signal.SIGKILL)
    wait_for(lambda: not worker.ready(), what="the worker to be unready")
    assert value(worker, "helios_worker_ready") == 0
    assert value(worker, "helios_worker_live") == 1


# --- health of a vLLM that runs ---


def test_a_vllm_that_is_not_well_makes_it_unready_and_in_the_end_not_live(begin: Begin, wait_for: Any) -> None:
    worker = begin(env={"HELIOS_WORKER__HANG_S": "4"})
    worker.control().set_healthy(False)
    wait_for(lambda: not worker.ready(), what="the worker to be unready")
    assert worker.why() == "vLLM is not well: /health answers 503"
    wait_for(lambda: worker.get("/healthz").status == 503, timeout_s=LATE, what="the worker to be not live")
    assert "has not answered /health for 4 s" in worker.get("/healthz").body.decode()
    worker.control().set_healthy(True)
    wait_for(lambda: worker.ready() and worker.get("/healthz").status == 200, what="the worker to be well again")


# --- draining ---


def test_sigterm_waits_for_a_stream_and_exits_with_0(begin: Begin, wait_for: Any) -> None:
    worker = begin(plan=[{"token_s": 0.05}])
    stream = Stream(worker.url(), 60)
    assert stream.first.startswith(b"data: ")
    worker.signal()
    wait_for(lambda: not worker.ready(), what="the worker to be unready")
    wait_for(lambda: "requests under way: 1" in worker.why(), what="the request to be seen")
    assert worker.get("/healthz").status == 200
    answer = request(worker.url(), "POST", "/v1/completions", {"model": "org/name", "prompt": "x", "max_tokens": 1})
    assert answer.status == 200, "a router that has not heard of it yet is still answered"
    assert stream.end().rstrip().endswith(b"data: [DONE]")
    assert worker.wait() == 0
    assert not worker.engine()


def test_the_deadline_ends_what_is_still_under_way(begin: Begin) -> None:
    worker = begin("--drain-timeout", "2", plan=[{"token_s": 0.2, "deaf": True}], env={"HELIOS_WORKER__STOP_S": "0"})
    stream = Stream(worker.url(), 2000)
    began = time.monotonic()
    worker.signal()
    assert worker.wait() == 1
    assert time.monotonic() - began > 2
    assert b"[DONE]" not in stream.end()
    assert "requests are cut off" in worker.text()
    assert not worker.engine()


def test_a_second_signal_ends_it_at_once(begin: Begin, wait_for: Any) -> None:
    worker = begin(plan=[{"token_s": 0.2, "deaf": True}])
    stream = Stream(worker.url(), 2000)
    worker.signal(signal.SIGINT)
    wait_for(lambda: not worker.ready(), what="the worker to be unready")
    began = time.monotonic()
    worker.signal(signal.SIGINT)
    assert worker.wait() == 130
    assert time.monotonic() - began < 15, "long before the deadline, and a vLLM that is deaf is not waited for"
    assert b"[DONE]" not in stream.end()
    assert not worker.engine()


def test_a_start_ends_with_a_signal(begin: Begin, wait_for: Any) -> None:
    worker = begin(ready=False, plan=[{"faults": [{"kind": "stall", "times": None}]}])
    wait_for(lambda: "warming up" in worker.why(), timeout_s=START_S, what="the warm-up")
    worker.signal()
    assert worker.wait() == 0


def test_ctrl_c_drains_too(begin: Begin) -> None:
    worker = begin()
    worker.signal(signal.SIGINT)
    assert worker.wait() == 130


def test_a_pre_stop_hook_returns_when_it_has_drained(begin: Begin, helios: Any, wait_for: Any) -> None:
    worker = begin(plan=[{"token_s": 0.05}])
    stream = Stream(worker.url(), 60)
    port = worker.front.rpartition(":")[2]
    done = helios("worker", "drain", "--port", port, "--json")
    assert not stream.going_on
    assert json.loads(done.out)["drained"] is True
    assert stream.end().rstrip().endswith(b"data: [DONE]")
    assert worker.process.poll() is None, "the kubelet's SIGTERM comes after it"
    assert worker.engine()
    assert worker.why() == "draining: a preStop hook, or `helios worker drain`; done"
    worker.signal()
    assert worker.wait() == 0


def test_draining_over_http_is_for_this_machine_unless_it_is_said_otherwise(begin: Begin) -> None:
    address = _other_address()
    worker = begin("--host", "0.0.0.0")
    front = f"http://{address}:{worker.front.rpartition(':')[2]}"
    assert request(front, "GET", "/drain").status == 403
    assert worker.ready()
    assert worker.get("/drain", timeout_s=LATE).json()["drained"] is True
    worker.signal()
    assert worker.wait() == 0
    worker = begin("--host", "0.0.0.0", env={"HELIOS_WORKER__REMOTE_DRAIN": "true"})
    front = f"http://{address}:{worker.front.rpartition(':')[2]}"
    assert request(front, "GET", "/drain", timeout_s=LATE).json() == {
        "drained": True, "cut": 0, "why": "draining: a preStop hook, or `helios worker drain`; done",
    }  # fmt: skip


def _other_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no other address than loopback")
        return str(sock.getsockname()[0])


def test_nobody_to_drain_is_said(helios: Any) -> None:
    assert "no worker of this HELIOS_HOME" in helios("worker", "drain", "--port", "9", code=1).err


def test_a_vllm_that_dies_while_it_drains_is_not_started_again(begin: Begin, wait_for: Any) -> None:
    worker = begin(plan=[{"token_s": 0.2}])
    stream = Stream(worker.url(), 2000)
    worker.signal()
    wait_for(lambda: not worker.ready(), what="the worker to be unready")
    os.kill(worker.engine(), signal.SIGKILL)
    assert worker.wait() == 0
    stream.end()
    assert not worker.start_of(2)


# --- logs ---


@pytest.mark.parametrize(("form", "line"), [("text", "vllm | INFO fake vLLM serves"), ("json", '"logger": "vllm"')])
def test_vllms_log_is_shown_as_the_setting_says(begin: Begin, form: str, line: str) -> None:
    worker = begin(env={"HELIOS_LOG__FORMAT": form}, ready=False, wait=False)
    end = time.monotonic() + START_S
    while "fake vLLM serves" not in worker.text() and time.monotonic() < end:
        time.sleep(0.05)
    (found,) = [one for one in worker.err if "fake vLLM serves" in one]
    assert line in found
    if form == "json":
        assert all(json.loads(one) for one in worker.err)


# --- registration ---


def test_it_registers_after_the_warm_up_and_is_gone_before_it_drains(
    begin: Begin, start_router: StartRouter, helios_home: Home, tmp_path: Path, wait_for: Any
) -> None:
    (tmp_path / "registrars").write_text(hashlib.sha256(b"hls_registrar").hexdigest() + " worker\n")
    (tmp_path / "token").write_text("hls_registrar\n")
    admin = free_port()
    discovery = json.dumps({"registrars": str(tmp_path / "registrars")})
    router = start_router(discovery=discovery, admin_port=admin, wait_up=False)
    own = HttpClient(f"unix:{helios_home.run / f'router-{router.address[1]}.sock'}")

    def workers() -> list[dict[str, Any]]:
        return list(own.json("GET", "/workers")["workers"])

    env = {"HELIOS_WORKER__LEASE_S": "3", "HELIOS_WORKER__ID": "pod-1", "HELIOS_WORKER__SETTLE_S": "1"}
    plan = [{"token_s": 0.05, "faults": [{"kind": "slow", "delay_s": 1.5}]}, {"token_s": 0.05}]
    arguments = ["--router", f"http://127.0.0.1:{admin}", "--router-token-file", str(tmp_path / "token")]
    worker = begin("--revision", COMMIT, *arguments, env=env, plan=plan, ready=False)
    wait_for(lambda: "warming up" in worker.why(), timeout_s=START_S, what="the warm-up")
    assert workers() == [], "it takes no requests yet"
    wait_for(worker.ready, timeout_s=START_S, what="the worker to be ready")
    wait_for(workers, what="the registration")
    (one,) = workers()
    assert (one["id"], one["url"], one["models"]) == ("pod-1", worker.url(), ["org/name"])
    assert (one["role"], one["revision"]) == ("both", COMMIT)
    wait_for(lambda: router.up() == 1, what="the router to see it up")
    time.sleep(4.0)  # longer than a lease
    assert [one["id"] for one in workers()] == ["pod-1"], "it is renewed"

    os.kill(worker.engine(), signal.SIGKILL)
    wait_for(lambda: not workers(), what="it to be taken back")
    wait_for(workers, timeout_s=START_S, what="it to be registered again")
    wait_for(lambda: router.up() == 1, timeout_s=START_S, what="the router to see it up")

    stream = Stream(router.url, 60)
    assert stream.first.startswith(b"data: ")
    worker.signal()
    wait_for(lambda: all(one["draining"] for one in workers()), what="it to be taken back")
    assert stream.end().rstrip().endswith(b"data: [DONE]"), "what it had goes on to its end"
    assert worker.wait() == 0
    assert workers() == []
    own.close()


def test_a_router_that_is_away_or_refuses_keeps_nobody_from_working(begin: Begin, wait_for: Any) -> None:
    worker = begin("--router", f"http://127.0.0.1:{free_port()}", env={"HELIOS_WORKER__LEASE_S": "3"})
    wait_for(lambda: "a router can't be told of this worker" in worker.text(), what="the warning")
    assert value(worker, "helios_worker_registration_failures_total") >= 1
    assert worker.text().count("a router can't be told of this worker") == 1
    worker.signal()
    assert worker.wait() == 0
