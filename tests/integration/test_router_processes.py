"""A router of several processes: one is killed, all are replaced, or the supervisor dies, under many clients."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
LONG: dict[str, Any] = {"model": "tiny", **CHAT, "max_tokens": 900, "stream": True}
SHORT = json.dumps({"model": "tiny", "max_tokens": 2, **CHAT}).encode()
QUEUED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\n"


class Load:
    """Clients that ask on and on, each on its kept-alive connection, and note how each request went."""

    def __init__(self, router: RouterProcess, clients: int, model: str = "tiny") -> None:
        self._router, self._stopped = router, threading.Event()
        self._body = SHORT.replace(b"tiny", model.encode())
        self.outcomes: Counter[Any] = Counter()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Counter[Any]:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)
        return self.outcomes

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(*self._router.address, timeout=30)
        while not self._stopped.is_set():
            if self.outcomes.total() % 5 == 0:  # some come anew
                connection.close()
            try:
                connection.request("POST", "/v1/chat/completions", self._body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                self.outcomes[answer.status] += 1
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[type(error).__name__] += 1
                connection.close()
        connection.close()


@contextmanager
def streams(router: RouterProcess, count: int) -> Iterator[list[tuple[socket.socket, http.client.HTTPResponse]]]:
    """Long answers under way, on both processes."""
    found = []
    try:
        for _ in range(count):
            found.append(stream(router.address, "/v1/chat/completions", LONG))
        yield found
    finally:
        for sock, answer in found:
            answer.close()
            sock.close()


def taken_over(router: RouterProcess, old: set[int]) -> bool:
    """Whether there are new processes, and the old control process has ended."""
    control = set(router.pids("control"))
    return len(set(router.pids()) - old) == 2 and len(control) == 1 and not control & old


def requests(router: RouterProcess) -> float:
    return router.metric("helios_router_requests_total", status="200")


def test_a_killed_process_takes_only_its_own_along(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", token_s=0.02)
    quick = fake_vllm("quick")
    router = start_router(fake, quick, processes=2)
    for _ in range(10):
        assert router.chat(model="quick").status == 200
    before = requests(router)
    assert before == 10
    victim, other = router.pids()
    with streams(router, 12) as open_streams:
        wait_for(lambda: fake.metric("vllm:num_requests_running") == 12, what="streams at the worker")
        assert router.in_flight() == 12
        shares = {pid: connections_of(pid) for pid in (victim, other)}
        assert min(shares.values()) > 0  # both have some of them
        load = Load(router, 4, "quick")
        os.kill(victim, signal.SIGKILL)
        # The dead one's share is gone from the counts, and nobody else's.
        wait_for(lambda: fake.metric("vllm:num_requests_running") < 12, what="the worker to see its clients leave")
        left = int(fake.metric("vllm:num_requests_running"))
        assert 0 < left < 12
        wait_for(lambda: router.in_flight() >= left and busy(router, fake) == left, what="the count of what goes on")
        wait_for(lambda: len(router.pids()) == 2 and victim not in router.pids(), what="another process")
        alive = sum(goes_on(sock) for sock, _ in open_streams)
        assert alive == left
        outcomes = load.stop()
    wait_for(lambda: router.in_flight() == 0, what="counts of zero")
    lost = outcomes.total() - outcomes[200]
    assert lost <= 4  # at most what each of the clients had at the dead one
    assert requests(router) >= before  # what it had counted is still there
    spread(router, wait_for)


def busy(router: RouterProcess, fake: Control) -> int:
    return int(router.metric("helios_router_in_flight", worker=fake.url))


def goes_on(sock: socket.socket) -> bool:
    """Whether more of an answer comes, beyond what had come before."""
    try:
        return all(sock.recv(1 << 16) for _ in range(20))
    except OSError:
        return False


def connections_of(pid: int) -> int:
    """Sockets that a process has."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except OSError:
            continue
    return count - 3


def spread(router: RouterProcess, wait_for: Any) -> None:
    """New connections reach every process."""
    idle = {pid: connections_of(pid) for pid in router.pids()}
    socks: list[socket.socket] = []

    def all_have() -> bool:
        socks.append(socket.create_connection(router.address))
        return all(connections_of(pid) > count for pid, count in idle.items())

    try:
        wait_for(all_have, what="connections on every process")
    finally:
        for sock in socks:
            sock.close()


def test_connections_that_wait_while_a_process_dies_are_served(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, processes=1)
    (pid,) = router.pids()
    os.kill(pid, signal.SIGSTOP)  # it accepts nothing, so these wait in the queue
    socks = [socket.create_connection(router.address, timeout=20) for _ in range(20)]
    for sock in socks:
        sock.sendall(QUEUED + b"Content-Length: %d\r\n\r\n%b" % (len(SHORT), SHORT))
    os.kill(pid, signal.SIGKILL)
    for sock in socks:
        with sock:
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert router.pids() != [pid]


def test_new_processes_take_over_under_load_and_nothing_is_lost(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fake = fake_vllm("tiny", token_s=0.005)
    router = start_router(fake, processes=2)
    load = Load(router, 6)
    sock, answer = stream(router.address, "/v1/chat/completions", {**LONG, "max_tokens": 200})
    with sock, answer:
        for _ in range(2):
            old = set(router.pids() + router.pids("control"))
            enough = load.outcomes.total() + 30
            wait_for(lambda enough=enough: load.outcomes.total() > enough, what="requests")
            router.process.send_signal(signal.SIGHUP)
            wait_for(partial(taken_over, router, old), timeout_s=40, what="new processes")
        assert answer.read().endswith(b"data: [DONE]\n\n")  # it ends where it began
    assert set(load.stop()) == {200}
    wait_for(lambda: len(router.pids()) == 2, timeout_s=15, what="the old processes to end")
    assert router.in_flight() == 0
    assert router.up() == 1


def test_a_new_configuration_is_read_and_a_wrong_one_is_refused(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any, tmp_path: Path, expected_log_errors: Any
) -> None:
    expected_log_errors("the new configuration can't be used")
    one, two = fake_vllm("one"), fake_vllm("two")
    file = tmp_path / "router.toml"
    text = '[[router.workers]]\nmodel = "{0.model}"\nurl = "{0.url}"\n'
    file.write_text(text.format(one))
    router = start_router(args=("--config", str(file)))
    assert router.chat(model="one").status == 200
    file.write_text("[router]\nnonsense = 1\n")
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: any("can't be used" in m["message"] for m in router.messages()), what="the refusal")
    assert router.chat(model="one").status == 200
    file.write_text(text.format(two))
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: router.chat(model="two").status == 200, what="the new worker")
    wait_for(lambda: router.chat(model="one").status == 404, what="the old worker to be forgotten")


def test_without_its_supervisor_nothing_is_left(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", token_s=0.02)
    router = start_router(fake, processes=2, drain_s=0.5)
    pids = router.pids() + router.pids("control")
    assert len(pids) == 3
    with streams(router, 2):
        router.process.kill()
        router.process.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the processes to end")


def test_a_dead_control_process_is_replaced_and_its_word_holds(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    one, two = fake_vllm("tiny"), fake_vllm("tiny")
    router = start_router(one, two, processes=2)
    (control,) = router.pids("control")
    two.refuse()
    wait_for(lambda: router.up() == 1, what="down")
    os.kill(control, signal.SIGKILL)
    assert [router.chat().status for _ in range(10)] == [200] * 10
    wait_for(lambda: router.pids("control") not in ([], [control]), what="another control process")
    assert router.up() == 1
    two.accept()
    wait_for(lambda: router.up() == 2, what="up")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_drain(how: signal.Signals, fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    fake = fake_vllm("tiny", token_s=0.01)
    router = start_router(fake, processes=2)
    pids = router.pids() + router.pids("control")
    found = [stream(router.address, "/v1/chat/completions", {**LONG, "max_tokens": 60}) for _ in range(6)]
    for pid in pids:  # as a terminal or systemd does, which signal every process
        os.kill(pid, how)
    router.process.send_signal(how)
    for sock, answer in found:
        with sock, answer:
            assert answer.read().endswith(b"data: [DONE]\n\n")
    assert router.process.wait(20) == (130 if how == signal.SIGINT else 0)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the processes to end")


def test_every_process_tells_the_sum_which_never_goes_back(
    fake_vllm: Start, start_router: StartRouter, wait_for: Any
) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, processes=2)
    shown = 0.0
    for number in range(40):
        assert router.chat().status == 200
        if number % 10 == 5:
            os.kill(router.pids()[0], signal.SIGKILL)
            wait_for(lambda: len(router.pids()) == 2, what="another process")
        now = requests(router)
        assert shown <= now <= number + 1
        shown = now
    assert shown >= 36  # each death takes at most what came since the last question
    assert {requests(router) for _ in range(10)} == {shown}  # whichever process is asked


def test_one_process_for_each_core(fake_vllm: Start, start_router: StartRouter) -> None:
    router = start_router(fake_vllm("tiny"), processes=0)
    assert len(router.pids()) == len(os.sched_getaffinity(0))
    assert router.chat().status == 200


def test_wrong_settings_of_processes_exit_2(helios: Any) -> None:
    for number in ("-1", "1000"):
        result = helios("router", "--worker", "m=http://127.0.0.1:9", env={"HELIOS_ROUTER__PROCESSES": number}, code=2)
        assert "router.processes must be between 0 and 256" in result.err
