"""How soon whoever scales hears of a request for a model that sleeps: pushed, beside polling, in the same run.

A real router of two processes, which holds requests for a model whose worker is down; the operator's signals; a gRPC
client that listens to ``StreamIsActive`` as KEDA does. Measured from the last byte of the request until the push is
here. The yardstick is the same request seen by polling alone: a second operator whose stream is never answered looks at
``GET /demand`` each second, and another client calls ``IsActive`` each second (KEDA's default is thirty; ours in
ScaledObjects is fifteen). The time of one ``GET /demand`` is there, too.

    python -m benchmarks.scaling_wake [--rounds 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from benchmarks.common import save
from benchmarks.live import ending, wait_for
from tests.support.cloud_servers import free_port
from tests.support.demand import TOKEN, token_file
from tests.support.scaled import Keda, signals_site

BODY = json.dumps({"model": "sleeper", "messages": [{"role": "user", "content": "x"}]}).encode()
POLL_S = 1.0


async def held(url: str) -> asyncio.StreamWriter:
    """A request that waits; closing the connection ends it."""
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(BODY)}\r\n\r\n".encode() + BODY)
    await writer.drain()
    return writer


@asynccontextmanager
async def unwatched(url: str) -> AsyncIterator[str]:
    """The router's administration without its stream."""

    async def pass_on(request: web.Request) -> web.Response:
        if request.path != "/demand":
            await asyncio.sleep(5)
            return web.Response(status=503)
        headers = {"authorization": request.headers["authorization"]}
        async with session.get(url + request.path, headers=headers) as answer:
            return web.Response(status=answer.status, body=await answer.read())

    app = web.Application()
    app.router.add_get("/{path:.*}", pass_on)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    async with aiohttp.ClientSession() as session:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def until(look: Callable[[], Awaitable[bool]], every_s: float) -> None:
    while True:
        if await look():
            return
        await asyncio.sleep(every_s)


async def pushed(router: str, keda: Keda, rounds: int) -> list[float]:
    stream, times = keda.pushes(), []
    while (await stream.read()).result:
        pass
    for _ in range(rounds):
        await asyncio.sleep(random.uniform(0.05, 0.25))
        writer = await held(router)
        began = time.perf_counter()
        while not (await stream.read()).result:
            pass
        times.append(time.perf_counter() - began)
        writer.close()
        while (await stream.read()).result:
            pass
    stream.cancel()
    return times


async def polled(router: str, keda: Keda, rounds: int) -> list[float]:
    async def idle() -> bool:
        return not await keda.active()

    times = []
    for _ in range(rounds):
        await until(idle, 0.05)
        await asyncio.sleep(random.uniform(0, POLL_S))
        writer = await held(router)
        began = time.perf_counter()
        await asyncio.sleep(random.uniform(0, POLL_S))  # its next look comes at any moment of the interval
        await until(keda.active, POLL_S)
        times.append(time.perf_counter() - began)
        writer.close()
    return times


async def looked(url: str, rounds: int) -> list[float]:
    times = []
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {TOKEN}"}) as session:
        for _ in range(rounds):
            began = time.perf_counter()
            async with session.get(f"{url}/demand") as answer:
                await answer.read()
            times.append(time.perf_counter() - began)
    return times


async def measure(work: Path, router: str, demand: str, rounds: int) -> dict[str, list[float]]:
    token = work / "token"
    token.write_text(TOKEN)
    found = {"look": await looked(demand, 10 * rounds)}
    for name in ("push", "poll"):
        async with unwatched(demand) as blind:
            url, poll_s = (demand, 5.0) if name == "push" else (blind, POLL_S)
            root = work / name
            root.mkdir()
            async with signals_site(root, [url], token_file=str(token), poll_s=poll_s) as site:
                site.serve("chat", "sleeper")
                async with asyncio.timeout(20):
                    while site.signals.unready:
                        await site.signals.changed(1.0)
                run = pushed if name == "push" else polled
                found[name] = await run(router, site.keda, rounds if name == "push" else max(5, rounds // 3))
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_s": statistics.median(ordered), "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="helios-bench-") as scratch:
        work, port = Path(scratch), free_port()
        environ = {
            **os.environ, "HELIOS_HOME": str(work / "home"), "HELIOS_ROUTER__PROCESSES": "2",
            "HELIOS_ROUTER__ADMISSION": json.dumps({"hold": True}), "HELIOS_ROUTER__ADMIN_PORT": str(port),
            "HELIOS_ROUTER__DEMAND_TOKENS": token_file(work / "tokens"),
        }  # fmt: skip
        log, dead = work / "router.log", free_port()
        command = [sys.executable, "-m", "helios", "router", "--port", "0", "--worker"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, f"sleeper=http://127.0.0.1:{dead}"], env=environ, stdout=output, stderr=output
            )
        with ending(process):
            url = wait_for(process, log, r"(?m)^http://127\.0\.0\.1:\d+$").group()
            time.sleep(3)  # the first checks
            found = asyncio.run(measure(work, url, f"http://127.0.0.1:{port}", args.rounds))
    figures = {name: spread(times) for name, times in found.items()}
    print(f"{'seconds':44}{'p50':>9}{'p99':>9}")
    for name, words in (
        ("push", "held request -> StreamIsActive"), ("poll", f"held request -> IsActive, polled each {POLL_S:g} s"),
        ("look", "GET /demand"),
    ):  # fmt: skip
        print(f"{words:44}{figures[name]['p50_s']:9.4f}{figures[name]['p99_s']:9.4f}")
    result = {"benchmark": "scaling_wake", "time": int(time.time()), "rounds": args.rounds, "median": figures}
    print(f"written to {save(result, args.json)}", file=sys.stderr)


if __name__ == "__main__":
    main()
