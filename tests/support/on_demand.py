"""``helios serve --on-demand`` with a real registry and router; what it starts are fake vLLMs instead of real ones.

``python -m tests.support.on_demand HOME REGISTRY`` is a process of its own that a test may kill.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from helios.config import AdmissionSettings, Config, QueueSettings, RouterSettings
from helios.errors import HeliosError, InvalidInput
from helios.home import Home
from helios.launch import vllm
from helios.launch.needs import Need
from helios.launch.plan import Placement
from helios.launch.pools import MAIN, Pools
from helios.launch.processes import records
from helios.launch.progress import Progress
from helios.launch.resident import Model
from helios.launch.serve import Wishes, on_demand
from helios.launch.serving import Serving
from tests.fakes.vllm.client import Control
from tests.support.routing import RouterProcess

PLACE = Placement("both", "vllm")
GPU = "GPU 0"
PLAIN = (Need(PLACE, {MAIN: 5}),)
"""What a model takes on a CPU: all, with ``ONE``."""
SLEEPER = (Need(PLACE, {MAIN: 1, GPU: 8}, ({MAIN: 5, GPU: 1}, {MAIN: 1, GPU: 1})),)
"""What a model takes on a GPU that can hold one, with ``ONE_AWAKE``."""
ONE: Pools = {MAIN: 5}
ONE_AWAKE: Pools = {MAIN: 100, GPU: 10}


class Fakes:
    """Starts fake vLLMs as ``Launcher`` starts real ones; ``refused`` can't be started."""

    def __init__(self, serving: Serving, default: tuple[Need, ...], token_s: float) -> None:
        self._serving, self._default, self._token_s = serving, default, token_s
        self._lock = threading.Lock()
        self.started: list[str] = []
        self.refused: set[str] = set()
        self.needs: dict[str, tuple[Need, ...]] = {}
        """What other models take than the default."""
        self.violations: list[str] = []
        """What was asked of those that have ended and must not be."""
        self._logs: dict[str, Path] = {}

    def size(self, model: Model) -> tuple[Need, ...]:
        return self.needs.get(model.name, self._default)

    @contextlib.contextmanager
    def launch(self, model: Model, need: Need) -> Iterator[vllm.Vllm]:
        if model.name in self.refused:
            raise InvalidInput("no model for vLLM\nand a long log")
        with vllm.reserved_port() as port:
            command = [sys.executable, "-m", "tests.fakes.vllm", "--model", model.name, "--port", str(port)]
            command += ["--token-s", str(self._token_s), *(["--sleep-mode"] if need.asleep else [])]
            with self._lock:
                self.started.append(model.pinned)
                child = self._serving.children.start(f"fake-{len(self.started)}", command)
                self._logs[model.name] = child.log
            yield vllm.Vllm(child, f"http://127.0.0.1:{port}", model.name)

    def stop(self, worker: vllm.Vllm) -> None:
        if worker.child.poll() is None:
            with contextlib.suppress(HeliosError, ValueError):  # it dies, or has not begun
                self.violations += self.control(worker.model).violations()
        self._serving.children.stop(worker.child)

    def control(self, name: str) -> Control:
        """The one of a model that was started last; ValueError where it has not begun."""
        said = json.loads(self._logs[name].read_text().partition("\n")[0])
        return Control(said["url"], said["control"], name)

    def calls(self, name: str, path: str) -> int:
        """How often that one was called."""
        return len(self.control(name).journal(path))


@contextlib.contextmanager
def serving_on_demand(
    home: Home, registry: str, pools: Pools = ONE, default: tuple[Need, ...] = PLAIN, token_s: float = 0.0,
    every_s: float = 0.1, **wishes: Any,
) -> Iterator[tuple[RouterProcess, Fakes]]:  # fmt: skip
    """``every_s``: how often what is due is done where nothing has happened, in seconds."""
    queue = QueueSettings(comment_after_s=0.2)
    config = msgspec.structs.replace(
        Config(), router=RouterSettings(port=0, admission=AdmissionSettings(queue=queue))
    )  # fmt: skip
    done = threading.Event()
    defaults: Mapping[str, Any] = {
        "memory": 0, "gpu_memory": 0, "idle_s": 0.0, "warm_s": 0.0, "wait_s": 120.0, "fetch": [], "arguments": [],
        "start_timeout_s": 60.0,
    }  # fmt: skip
    wanted = Wishes(**{**defaults, **wishes})
    with Serving(home, config, Progress(io.StringIO())) as serving:
        fakes = Fakes(serving, default, token_s)
        with on_demand(serving, registry, fakes, pools, wanted) as (router, models):

            def steps() -> None:
                while not done.is_set():
                    models.due.wait(every_s)
                    models.due.clear()  # before the step: what is set from now on is for the next one
                    models.step()

            thread = threading.Thread(target=steps)
            thread.start()
            try:
                yield RouterProcess(router.url, router.child.guard, router.child.log), fakes  # type: ignore[arg-type]
            finally:
                done.set()
                models.due.set()
                thread.join()
    assert fakes.violations == []


def running(home: Home) -> list[str]:
    """The fakes that run."""
    return [record.name for _, record in records(home) if record.name.startswith("fake")]


def main() -> None:
    home, registry = sys.argv[1:]
    with serving_on_demand(Home(Path(home)), registry, ONE_AWAKE, SLEEPER) as (router, _):
        print(router.url, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
