"""``helios serve --on-demand`` with a real registry and router; what it starts are fake vLLMs instead of real ones."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helios.config import AdmissionSettings, Config, QueueSettings, RouterSettings
from helios.errors import InvalidInput
from helios.home import Home
from helios.launch import demand, vllm
from helios.launch.demand import Model
from helios.launch.processes import records
from helios.launch.progress import Progress
from helios.launch.serve import Wishes, on_demand
from helios.launch.serving import Serving
from helios.launch.signals import Stopped
from tests.support.hub_site import write
from tests.support.mirror_site import Site, own_site
from tests.support.routing import CHAT, RouterProcess, stream


class Fakes:
    """Starts fake vLLMs as ``Launcher`` starts real ones; ``refused`` can't be started."""

    def __init__(self, serving: Serving) -> None:
        self._serving, self._lock = serving, threading.Lock()
        self.started: list[str] = []
        self.refused: set[str] = set()

    @contextlib.contextmanager
    def launch(self, model: Model) -> Iterator[vllm.Vllm]:
        if model.name in self.refused:
            raise InvalidInput("no model for vLLM\nand a long log")
        with vllm.reserved_port() as port:
            command = [sys.executable, "-m", "tests.fakes.vllm", "--model", model.name, "--port", str(port)]
            with self._lock:
                self.started.append(model.pinned)
                child = self._serving.children.start(f"fake-{len(self.started)}", command)
            yield vllm.Vllm(child, f"http://127.0.0.1:{port}", model.name)

    def stop(self, worker: vllm.Vllm) -> None:
        self._serving.children.stop(worker.child)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with own_site(tmp_path / "site", 1000) as (_, open_):
        yield open_()


@contextlib.contextmanager
def serving_on_demand(
    home: Home, registry: str, every_s: float = 0.1, **wishes: Any
) -> Iterator[tuple[RouterProcess, Fakes]]:
    """``every_s``: how often what is due is done where nobody has asked for anything, in seconds."""
    queue = QueueSettings(comment_after_s=0.2)
    config = msgspec.structs.replace(
        Config(), router=RouterSettings(port=0, admission=AdmissionSettings(queue=queue))
    )  # fmt: skip
    done, asked = threading.Event(), threading.Event()
    wanted = Wishes(**{"most": 1, "idle_s": 0.0, "fetch": [], "arguments": [], "start_timeout_s": 60.0, **wishes})
    with Serving(home, config, Progress(io.StringIO())) as serving:
        fakes = Fakes(serving)
        with on_demand(serving, registry, fakes, wanted, asked) as (router, models):

            def steps() -> None:
                while not done.is_set():
                    asked.wait(every_s)
                    asked.clear()
                    models.step()

            thread = threading.Thread(target=steps)
            thread.start()
            try:
                yield RouterProcess(router.url, router.child.guard, router.child.log), fakes  # type: ignore[arg-type]
            finally:
                done.set()
                asked.set()
                thread.join()


def running(home: Home) -> list[str]:
    return [record.name for _, record in records(home) if record.name.startswith("fake")]


def test_a_model_is_started_by_its_first_request_and_gives_way_to_another(
    site: Site, helios_home: Home, tmp_path: Path, wait_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LEAST_S", 0.5)
    one, two = (
        site.helios("push", str(write(tmp_path / name, {"config.json": name.encode()})), f"org/{name}")
        for name in ("one", "two")
    )
    with serving_on_demand(helios_home, site.registry.url, idle_s=60.0) as (router, fakes):
        assert router.chat("org/none").status == 404
        body = {"model": "org/one", "max_tokens": 4, "stream": True, **CHAT}
        sock, answer = stream(router.address, "/v1/chat/completions", body)
        told = answer.read()
        sock.close()
        assert told.startswith(b": waking"), "it waited, and was told so"
        assert b"data: [DONE]" in told
        assert router.chat("org/one", timeout_s=60).status == 200
        assert router.chat(f"org/one@{one}").status == 200
        assert fakes.started == [f"org/one@{one}"]

        answered = router.chat("org/two", timeout_s=60)
        assert (answered.status, answered.json()["model"]) == (200, "org/two")
        assert fakes.started[1:] == [f"org/two@{two}"]
        assert running(helios_home) == ["fake-2"], "there is one place"
        assert router.chat("org/one", timeout_s=60).json()["model"] == "org/one", "and it comes again"
        assert fakes.started[2:] == [f"org/one@{one}"]
    assert running(helios_home) == []


def test_who_asks_does_not_wait_for_the_next_look(site: Site, helios_home: Home, tmp_path: Path) -> None:
    site.helios("push", str(write(tmp_path / "one", {"config.json": b"one"})), "org/one")
    with serving_on_demand(helios_home, site.registry.url, every_s=3600.0) as (router, _):
        assert router.chat("org/one", timeout_s=60).status == 200


def test_what_is_due_is_done_before_the_next_look(helios_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.launch.serving.WATCH_S", 3600.0)
    due, steps = threading.Event(), list[str]()

    def step() -> None:
        steps.append("step")
        if len(steps) == 2:
            raise Stopped(signal.SIGTERM)
        threading.Timer(0.1, due.set).start()

    with Serving(helios_home, Config(), Progress(io.StringIO())) as nothing, pytest.raises(Stopped):
        nothing.watch(step, due)


def test_what_nobody_uses_is_stopped_and_what_cannot_start_is_told(
    site: Site, helios_home: Home, tmp_path: Path, wait_for: Any
) -> None:
    for name in ("one", "bad"):
        site.helios("push", str(write(tmp_path / name, {"config.json": name.encode()})), f"org/{name}")
    with serving_on_demand(helios_home, site.registry.url, most=2, idle_s=1.0) as (router, fakes):
        fakes.refused = {"org/bad"}
        refused = router.chat("org/bad", timeout_s=60)
        assert refused.status == 503
        assert "no model for vLLM" in refused.json()["error"]["message"]
        assert "long log" not in refused.json()["error"]["message"]
        assert router.chat("org/one", timeout_s=60).status == 200
        wait_for(lambda: running(helios_home) == [], timeout_s=60)
        assert router.chat("org/one", timeout_s=60).status == 200
        assert len(fakes.started) == 2


def test_a_model_is_named_or_left_to_the_clients(helios: Any) -> None:
    assert "helios serve --on-demand" in helios("serve", code=2).err
    assert "Leave org/name out" in helios("serve", "org/name", "--on-demand", code=2).err
