"""What the benchmarks with real vLLM share: a ``helios serve`` that ends with its block, streams with the time of each
token, sums of what a worker counts."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

POLL_S: Final = 0.25
STOP_S: Final = 120.0
START_S: Final = 3600.0
"""Longest start, in seconds."""
ANSWER_S: Final = 600.0
"""Longest wait for the next piece of an answer, in seconds."""
_DATA: Final = b"data: {"


def require_vllm() -> None:
    """Raise SystemExit where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise SystemExit("this needs vLLM: make setup")


@contextlib.contextmanager
def serving(environ: Mapping[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """``helios serve …``, whose output goes to a file; ended in the end."""
    command = [sys.executable, "-m", "helios", "serve", "--port", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    with ending(process):
        yield process


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The process ends with the block."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str, poll_s: float = POLL_S) -> re.Match[str]:
    """The pattern's first place in a log; raises RuntimeError when the process ends or the time is over."""
    deadline = time.monotonic() + START_S
    while True:
        text = log.read_text(errors="replace") if log.exists() else ""
        if found := re.search(pattern, text, re.MULTILINE):
            return found
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no {pattern!r} in time; {log} ends with:\n{text[-4000:]}")
        time.sleep(poll_s)


def run(environ: Mapping[str, str], *arguments: str) -> str:
    """``helios …``; its output."""
    command = [sys.executable, "-m", "helios", *arguments]
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer. ``sent`` and ``came``: when it was asked for, and when each piece of text came, by ``time.time``.
    ``tokens``: how many it has by the worker's count."""

    sent: float
    came: tuple[float, ...]
    tokens: int

    @property
    def first_s(self) -> float:
        """Time to the first piece of text, in seconds."""
        return self.came[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in itertools.pairwise(self.came)]


class Client:
    """One connection to a server of the OpenAI API, which it keeps."""

    def __init__(self, url: str, model: str) -> None:
        self._model = model
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_S)

    def close(self) -> None:
        self._connection.close()

    def stream(self, prompt: str, tokens: int) -> Streamed:
        """A streamed completion of exactly so many tokens. Raises RuntimeError for an answer that is none."""
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        sent = time.time()
        self._connection.request(
            "POST", "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        answer = self._connection.getresponse()
        came, made = [], 0
        with answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {answer.read(1000)!r}")
            for line in answer:
                now = time.time()
                if not line.startswith(_DATA):
                    continue
                chunk: dict[str, Any] = json.loads(line[len(_DATA) - 1 :])
                if chunk.get("choices") and chunk["choices"][0]["text"]:
                    came.append(now)
                if chunk.get("usage"):
                    made = chunk["usage"]["completion_tokens"]
        if not came:
            raise RuntimeError(f"an answer without text to a prompt of {len(prompt)} characters")
        return Streamed(sent, tuple(came), made)


def counted(url: str, label: str = "") -> dict[str, float]:
    """What a worker or router counts: the sum of each metric's series, by name; ``label``: of those that have it,
    written as ``name="value"``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^([a-z_:]+)(\{.*\})? (\S+)$", text, re.MULTILINE):
        if label in labels:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def part(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
