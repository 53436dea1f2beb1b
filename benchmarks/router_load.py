"""Load on a proxy: in a closed loop (as fast as it answers; wrk for whole answers), and in an open one (at a rate).

Only the open loop says what users wait: a closed one sends less while the proxy is slow. There a request's time begins
when it was due, whether or not a connection was free. ``bodies`` are sent one after the other, again and again.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httptools

PATH: Final = "/v1/chat/completions"
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


def request_of(body: bytes, key: str = "key") -> bytes:
    """A chat request as clients send it."""
    return (
        b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nAccept: */*\r\nUser-Agent: bench/1\r\nContent-Length: %d\r\n\r\n"
        % (PATH.encode(), key.encode(), len(body))
    ) + body


PATIENCE_S: Final = 30
"""How late an answer may be, in seconds: on a slow machine litellm takes longer than the 2 that wrk would wait."""


@dataclass(frozen=True, slots=True)
class Hammered:
    """What wrk saw: requests in all and in a second; times in seconds."""

    requests: int
    rate: float
    p50_s: float
    p99_s: float


def script_of(bodies: Sequence[bytes], key: str) -> str:
    """For wrk, in Lua: its requests, made before the load begins. ``bodies`` are JSON in ASCII, without escapes."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "Accept": "*/*"}
    lines = ["local bodies = {", *(f"  {json.dumps(body.decode())}," for body in bodies), "}"]
    lines += [f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()]
    lines += [
        "local requests, turn = {}, 0",
        "function init(args)",
        '  for n, body in ipairs(bodies) do requests[n] = wrk.format("POST", nil, nil, body) end',
        "end",
        "function request()",
        "  turn = turn % #requests + 1",
        "  return requests[turn]",
        "end",
    ]
    return "\n".join(lines) + "\n"


def wrk(url: str, bodies: Sequence[bytes], key: str, connections: int, seconds: float, work: Path) -> Hammered:
    """Whole answers as fast as they come, from one thread of wrk. Raises RuntimeError when any is not 2xx."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: apt install wrk")
    script = work / "request.lua"
    script.write_text(script_of(bodies, key))
    command = [
        "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={PATIENCE_S}s", "--latency",
        "-s", str(script),
    ]  # fmt: skip
    done = subprocess.run([*command, url + PATH], capture_output=True, text=True, timeout=seconds + 60, check=True)
    return parsed(done.stdout)


def parsed(text: str) -> Hammered:
    """wrk's report. Raises RuntimeError when something failed or a figure is missing."""
    if wrong := re.search(r"Non-2xx.*|Socket errors: (?!connect 0, read 0, write 0, timeout 0).*", text):
        raise RuntimeError(wrong[0])
    times = {share: float(n) * _UNITS[unit] for share, n, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s|m)\b", text)}
    count, rate = re.search(r"(\d+) requests in", text), re.search(r"Requests/sec:\s+([\d.]+)", text)
    if count is None or rate is None or "50" not in times or "99" not in times:
        raise RuntimeError(f"wrk says nothing that is understood: {text}")
    if count[1] == "0":
        raise RuntimeError("nothing was answered: the proxy hangs, or gets no processor")
    return Hammered(int(count[1]), float(rate[1]), times["50"], times["99"])


class TooMany(RuntimeError):
    """A rate that cannot be held."""


class Client(asyncio.Protocol):
    """One connection; ``answered`` is told when an answer is whole."""

    def __init__(self, owner: Closed | Open) -> None:
        self.owner = owner
        self.began = 0.0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpResponseParser(self)

    def ask(self, began: float) -> None:
        self.began = began
        self.transport.write(next(self.owner.requests))

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() != 200:
            if not self.lost.done():
                self.lost.set_exception(RuntimeError(f"status {self.parser.get_status_code()}"))
            self.transport.abort()
            return
        self.owner.answered(self, time.perf_counter() - self.began)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class Closed:
    """Each connection asks again as soon as it is answered."""

    def __init__(self, requests: Sequence[bytes], seconds: float) -> None:
        self.requests, self.times = itertools.cycle(requests), list[float]()
        self.until = time.perf_counter() + seconds

    def answered(self, client: Client, took: float) -> None:
        self.times.append(took)
        now = time.perf_counter()
        if now < self.until:
            client.ask(now)
        else:
            client.transport.close()


class Open:
    """Requests come at random moments, ``rate`` a second on average; who finds no connection free waits for one."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self.requests, self.times = itertools.cycle(requests), list[float]()
        self.free: deque[Client] = deque()
        self.due: deque[float] = deque()

    def answered(self, client: Client, took: float) -> None:
        self.times.append(took)
        if self.due:
            client.ask(self.due.popleft())
        else:
            self.free.append(client)

    def comes(self, at: float) -> None:
        if self.free:
            self.free.pop().ask(at)
        else:
            self.due.append(at)


async def _connect(url: str, owner: Closed | Open, count: int) -> list[Client]:
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(lambda: Client(owner), host, int(port)))[1] for _ in range(count)]


async def closed(url: str, bodies: Sequence[bytes], connections: int, seconds: float, key: str = "key") -> list[float]:
    """Seconds each request took."""
    load = Closed([request_of(body, key) for body in bodies], seconds)
    clients = await _connect(url, load, connections)
    for client in clients:
        client.ask(time.perf_counter())
    await asyncio.gather(*(client.lost for client in clients))
    return load.times


async def at_rate(
    url: str, bodies: Sequence[bytes], rate: float, seconds: float, key: str = "key", connections: int = 256
) -> list[float]:
    """Seconds each request took from when it was due. Raises TooMany when some have no answer 10 s after the end."""
    load, rng = Open([request_of(body, key) for body in bodies]), random.Random(1)
    clients = await _connect(url, load, connections)
    load.free.extend(clients)
    at = time.perf_counter()
    until = at + seconds
    while at < until:
        at += rng.expovariate(rate)
        while (wait := at - time.perf_counter()) > 0:  # noqa: ASYNC110 - timers are too coarse
            await asyncio.sleep(wait - 0.002 if wait > 0.004 else 0)
        load.comes(at)
    end = time.perf_counter() + 10
    while len(load.free) < len(clients) and time.perf_counter() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if load.due or len(load.free) < len(clients):
        raise TooMany(f"{rate:.0f} requests a second are too many: {len(load.due)} still wait after 10 s")
    for client in clients:
        client.transport.close()
    return load.times
