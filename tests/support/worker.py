"""`helios worker` as a process, with a fake vLLM that takes vLLM's own command line."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios.home import Home
from helios.launch.processes import records
from tests.fakes.vllm.client import Control
from tests.support.routing import CHAT, Response, address_of

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "fakes" / "vllm_program"
START_S = 120.0
"""Longest start on a busy machine, in seconds."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "max_position_embeddings": 4096,
}
LATE = 60.0


def model_directory(path: Path) -> Path:
    """A directory that looks like a model."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@dataclass
class WorkerProcess:
    """A worker that runs; ``fake`` is the directory through which its fake vLLM is told what to do."""

    home: Home
    process: subprocess.Popen[str]
    fake: Path
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    front: str = ""

    def get(self, path: str, timeout_s: float = 30.0, method: str = "GET") -> Response:
        """A request to the front."""
        return request(self.front, method, path, timeout_s=timeout_s)

    def ready(self) -> bool:
        return self.get("/readyz").status == 200

    def why(self) -> str:
        """Why it is not ready."""
        return self.get("/readyz").body.decode().strip()

    def start_of(self, number: int = 1) -> dict[str, Any]:
        """How the fake was started; empty: it was not yet."""
        path = self.fake / f"start-{number}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def control(self, number: int = 1) -> Control:
        told = self.start_of(number)
        return Control(told["url"], told["control"], "org/name")

    def url(self, number: int = 1) -> str:
        return str(self.start_of(number)["url"])

    def engine(self) -> int:
        """The pid of the fake that runs; 0: none does."""
        return next((record.process.pid for _, record in records(self.home) if record.process.alive()), 0)

    def wait(self, timeout_s: float = LATE) -> int:
        return self.process.wait(timeout_s)

    def signal(self, sig: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(sig)

    def text(self) -> str:
        return "\n".join(self.err)


def request(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    timeout_s: float = 30.0,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(*address_of(url), timeout=timeout_s)
    try:
        content = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        connection.request(method, path, content, {**kind, **(headers or {})})
        answer = connection.getresponse()
        found = [(name.lower(), value) for name, value in answer.getheaders()]
        return Response(answer.status, found, answer.read())
    finally:
        connection.close()


class Stream:
    """A streamed answer of the worker's vLLM, read in a thread of its own."""

    def __init__(self, url: str, tokens: int) -> None:
        self._connection = http.client.HTTPConnection(*address_of(url), timeout=LATE)
        body = {"model": "org/name", "max_tokens": tokens, "stream": True, **CHAT}
        content = json.dumps(body)
        self._connection.request("POST", "/v1/chat/completions", content, {"content-type": "application/json"})
        self._answer = self._connection.getresponse()
        self.first = self._answer.readline()
        self.rest = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.rest = self._answer.read()
        except (OSError, http.client.HTTPException):
            self.rest = b"broken"

    def end(self) -> bytes:
        """The rest of it, once it has ended."""
        self._thread.join(LATE)
        assert not self._thread.is_alive()
        self._connection.close()
        return self.rest

    @property
    def going_on(self) -> bool:
        return self._thread.is_alive()


@contextmanager
def running(
    home: Home, directory: Path, model: Path | str, *arguments: str, plan: list[dict[str, Any]] | None = None,
    env: Mapping[str, str] | None = None, wait: bool = True, command: list[str] | None = None,
) -> Iterator[WorkerProcess]:  # fmt: skip
    """Start one; leaving the context ends it. ``directory`` is for the fake; ``wait``: until its front answers."""
    directory.mkdir(parents=True, exist_ok=True)
    if plan is not None:
        (directory / "plan.json").write_text(json.dumps(plan))
    given = arguments if "--name" in arguments or "run" in arguments else ("--name", "org/name", *arguments)
    head = command or [sys.executable, "-m", "helios"]
    process = subprocess.Popen(
        [*head, "worker", str(model), "--port", "0", "--vllm-port", "0", *given],
        env={
            **os.environ,
            "HELIOS_HOME": str(home.root),
            "FAKE_VLLM": str(directory),
            "PYTHONPATH": f"{PROGRAM}{os.pathsep}{ROOT}",
            "HELIOS_WORKER__SETTLE_S": "0.2",
            "HELIOS_WORKER__KV_EVENTS_PORT": "0",
            **(env or {}),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    worker = WorkerProcess(home, process, directory)
    readers = [
        threading.Thread(target=_read, args=(pipe, lines))
        for pipe, lines in ((process.stdout, worker.out), (process.stderr, worker.err))
    ]
    for reader in readers:
        reader.start()
    try:
        if wait:
            _until(lambda: _front(worker), START_S, worker)
        yield worker
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)  # two of one kind may come as one
            try:
                process.wait(LATE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in readers:
            reader.join(LATE)


def _read(pipe: Any, lines: list[str]) -> None:
    with pipe:
        for line in pipe:
            lines.append(line.rstrip("\n"))


def _front(worker: WorkerProcess) -> bool:
    found = re.search(r'"front": "(http://[^"]+)"', worker.text())
    worker.front = found[1] if found else ""
    return bool(worker.front)


def _until(condition: Callable[[], bool], timeout_s: float, worker: WorkerProcess) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if worker.process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"the worker did not come up (status {worker.process.poll()}):\n{worker.text()}")
        time.sleep(0.05)
