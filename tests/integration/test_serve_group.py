"""``helios serve`` of a named model with a real router; what it starts are fake vLLMs instead of real ones."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from helios.config import Config, RouterSettings
from helios.errors import DeadlineExceeded, HeliosError, Unavailable
from helios.home import Home
from helios.launch import vllm
from helios.launch.plan import Placement, Wish
from helios.launch.processes import records
from helios.launch.progress import Progress
from helios.launch.serve import Group, serve_group
from helios.launch.serving import Serving
from helios.launch.signals import Stopped
from tests.support.routing import CHAT, RouterProcess

COMMIT = "c" * 40
PREFILL, DECODE = Placement("prefill", "vllm-prefill-1"), Placement("decode", "vllm-decode-1")

START_S = 180.0
"""Longest start of everything, or its end, on a busy machine, in seconds."""


class Stopping(Serving):
    """Stays until ``stop`` is set, as one that a signal stops."""

    stop = threading.Event()

    def watch(self, step: Callable[[], None] = lambda: None) -> Any:
        def look() -> None:
            if self.stop.is_set():
                raise Stopped(signal.SIGTERM)
            step()

        super().watch(look)


class Fakes:
    """Starts fake vLLMs as ``Workers`` starts real ones; ``commands``: what is started instead, first come, first."""

    def __init__(self, serving: Serving, placements: Sequence[Placement], stack: contextlib.ExitStack) -> None:
        self._serving = serving
        self.ports = {one.name: stack.enter_context(vllm.reserved_port()) for one in placements}
        self.options = [
            f"org/name=http://127.0.0.1:{self.ports[one.name]},revision={COMMIT},role={one.role}" for one in placements
        ]
        self.started: list[str] = []
        self.commands: list[list[str]] = []
        self.token_s = 0.0

    def start(self, placement: Placement) -> vllm.Vllm:
        port = self.ports[placement.name]
        self.started.append(placement.name)
        command = self.commands.pop(0) if self.commands else [
            "-m", "tests.fakes.vllm", "--model", "org/name", "--port", str(port), "--role", placement.role,
            "--token-s", str(self.token_s), "--max-model-len", "4096",
        ]  # fmt: skip
        child = self._serving.children.start(placement.name, [sys.executable, *command])
        return vllm.Vllm(child, f"http://127.0.0.1:{port}", "org/name")

    def stop(self, workers: Sequence[vllm.Vllm]) -> None:
        for worker in workers:
            worker.child.begin_stop()
        for worker in workers:
            self._serving.children.stop(worker.child)


class Run:
    """A run of ``serve_group`` in a thread of its own; ``error`` is how it ended."""

    def __init__(self, home: Home, placements: Sequence[Placement], start_timeout_s: float = 60.0) -> None:
        self.home, self.out = home, io.StringIO()
        self.error: BaseException | None = None
        self.router: RouterProcess
        self._stack = contextlib.ExitStack()
        config = msgspec.structs.replace(Config(), router=RouterSettings(port=0, drain_s=20.0))
        self._serving = Stopping(home, config, Progress(self.out))
        self._serving.stop = threading.Event()
        self._group = Group(Wish(), [], start_timeout_s, logs=False)
        self.fakes = Fakes(self._serving, placements, self._stack)
        self._placements = placements
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self._serving as serving:
                serve_group(serving, self.fakes, self._placements, self.fakes.options, "org/name@cccc", self._group)
        except BaseException as error:
            self.error = error

    def begin(self) -> None:
        self._thread.start()

    def url(self) -> str:
        found = re.search(r"answers at (http://\S+)/v1", self.out.getvalue())
        return found[1] if found else ""

    def stop(self) -> None:
        self._serving.stop.set()

    def wait(self) -> BaseException | None:
        self._thread.join(START_S)
        assert not self._thread.is_alive()
        self._stack.close()
        return self.error

    def pid(self, name: str) -> int:
        """The process of a fake that runs; 0: none does."""
        return next((one.process.pid for _, one in records(self.home) if one.name == name and one.process.alive()), 0)


@pytest.fixture
def runs(helios_home: Home, wait_for: Any) -> Iterator[Callable[..., Run]]:
    found: list[Run] = []

    def begin(
        *placements: Placement, up: bool = True, prepare: Callable[[Fakes], None] = lambda f: None, **options: Any
    ) -> Run:
        run = Run(helios_home, placements, **options)
        found.append(run)
        prepare(run.fakes)
        run.begin()
        if up:
            wait_for(lambda: run.url() or run.error, timeout_s=START_S, what="the router's URL")
            assert run.error is None
            guard = next(child for child in run._serving.children._children if child.name == "router")
            run.router = RouterProcess(run.url(), guard.guard, guard.log)  # type: ignore[arg-type]
        return run

    yield begin
    for run in found:
        run.stop()
        run.wait()


def long(word: str) -> dict[str, Any]:
    """A prompt that nobody has computed yet."""
    return {"messages": [{"role": "user", "content": (f"{word} " * 1000)[:2800]}], "ignore_eos": True}


def warm(run: Any, wait_for: Any) -> None:
    """Wait until the two have exchanged blocks."""
    wait_for(lambda: run.router.up() == 2, timeout_s=START_S, what="both workers")
    wait_for(lambda: run.router.metric("helios_router_warm_pairs") == 1, timeout_s=START_S, what="the pair to be warm")


def test_a_prompt_is_computed_by_one_worker_and_answered_by_another(runs: Any, wait_for: Any) -> None:
    run = runs(PREFILL, DECODE)
    warm(run, wait_for)
    assert run.router.chat("org/name", START_S, **long("one")).status == 200
    assert run.router.chat("org/name", START_S).status == 200
    assert run.router.metric("helios_router_prefills_total", result="remote") == 1
    run.stop()
    assert isinstance(run.wait(), Stopped)
    assert [record.name for _, record in records(run.home)] == []


def test_a_worker_that_ends_is_started_again_at_its_port_and_the_others_go_on(runs: Any, wait_for: Any) -> None:
    run = runs(PREFILL, DECODE)
    warm(run, wait_for)
    os.kill(run.pid("vllm-prefill-1"), signal.SIGKILL)
    asked = 0
    end = time.monotonic() + START_S
    while "vllm-prefill-1 answers again" not in run.out.getvalue():
        asked += 1
        assert run.router.chat("org/name", START_S, **long(f"word{asked}")).status == 200, "nobody notices"
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "vllm-prefill-1 ended with status 137; it is started again in 1 s" in run.out.getvalue()
    assert run.fakes.started == ["vllm-prefill-1", "vllm-decode-1", "vllm-prefill-1"]
    warm(run, wait_for)
    before = run.router.metric("helios_router_prefills_total", result="remote")
    assert run.router.chat("org/name", START_S, **long("again")).status == 200
    assert run.router.metric("helios_router_prefills_total", result="remote") == before + 1


def test_the_end_of_the_router_ends_everything(runs: Any) -> None:
    run = runs(PREFILL, DECODE)
    run.router.process.kill()
    error = run.wait()
    assert isinstance(error, Unavailable)
    assert "router ended with status" in str(error)
    assert [record.name for _, record in records(run.home) if record.process.alive()] == []


def test_a_worker_that_never_starts_ends_the_command_with_the_reason(runs: Any) -> None:
    dies = ["-c", "print('ValueError: no such dtype', flush=True); raise SystemExit(1)"]
    run = runs(DECODE, up=False, prepare=lambda fakes: fakes.commands.extend([dies] * 3))
    error = run.wait()
    assert isinstance(error, HeliosError)
    assert "vllm-decode-1 can't be started (tries: 3): vLLM ended with status 1" in error.message
    assert "ValueError: no such dtype" in error.message
    assert run.fakes.started == ["vllm-decode-1"] * 3


def test_one_that_fails_once_at_its_start_is_tried_again(runs: Any) -> None:
    run = runs(DECODE, prepare=lambda fakes: fakes.commands.append(["-c", "raise SystemExit(1)"]))
    assert run.fakes.started == ["vllm-decode-1"] * 2
    assert run.router.chat("org/name", START_S).status == 200


def test_wrong_arguments_are_not_tried_again_and_a_late_start_ends_the_command(runs: Any) -> None:
    run = runs(DECODE, up=False, prepare=lambda fakes: fakes.commands.append(["--no-such-option"]))
    assert "(tries: 1): vLLM ended with status 2" in str(run.wait())
    sleeps = ["-c", "import time; time.sleep(60)"]
    run = runs(DECODE, up=False, prepare=lambda fakes: fakes.commands.append(sleeps), start_timeout_s=1.0)
    assert isinstance(run.wait(), DeadlineExceeded)


def test_answers_under_way_end_before_the_workers_do(runs: Any, wait_for: Any) -> None:
    run = runs(DECODE, prepare=lambda fakes: setattr(fakes, "token_s", 0.1))
    host, port = run.router.address
    connection = http.client.HTTPConnection(host, port, timeout=START_S)
    body = {"model": "org/name", "max_tokens": 30, "stream": True, **CHAT}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    first = answer.readline()
    run.stop()
    wait_for(lambda: run.router.process.poll() is not None or refuses(run.router), what="no more are taken")
    assert run.pid("vllm-decode-1"), "the worker is there as long as the answer is not"
    rest = answer.read()
    connection.close()
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert isinstance(run.wait(), Stopped)
    assert not run.pid("vllm-decode-1")


def refuses(router: RouterProcess) -> bool:
    try:
        return router.request("GET", "/readyz").status == 503
    except OSError:
        return True


def test_wishes_that_can_not_be_are_refused_before_anything_starts(helios: Any, helios_home: Home) -> None:
    assert "prefill and decode workers need each other" in helios("serve", "a/b", "--prefill", "1", code=2).err
    assert "no list of GPUs" in helios("serve", "a/b", "--gpu", "x", code=2).err
    assert "a GPU is listed twice" in helios("serve", "a/b", "--gpu", "1,1", code=2).err
    assert "for a model that is named" in helios("serve", "--on-demand", "--decode", "1", code=2).err
    assert not helios_home.run.exists()
