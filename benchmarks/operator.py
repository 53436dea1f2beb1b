"""The operator beside a bare client: objects reconciled from nothing, what steady state costs, and memory over churn.

The fake API server of the tests runs in a process of its own, and has Greetings (tests/support/sample_operator.py),
each of which owns a ConfigMap and a Deployment: four writes. The operator is a process of its own, too. The yardstick
is the official client that sends the same writes to the same server, as many at a time as the operator has workers,
and does nothing else. Then every object is changed again and again, with memory read after each round; between the
rounds, with a resync each second, nothing may be written.

    python -m benchmarks.operator [--objects 100] [--rounds 10] [--json FILE]

Targets: 100 objects in under 10 s; no write in steady state; at most 5 MB more from the third round to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, memory_of, save

SECONDS, GROWTH, SETTLED = 10.0, 5e6, 3
WORKERS = 8
STEADY_S = 5.0


async def serve(file: Path) -> None:
    """The API server, told what to do by lines on stdin; each is answered by one of JSON."""
    from tests.support.operators import Site
    from tests.support.sample_operator import greeting

    site = Site(file.parent)
    site.file = file
    await site.open()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("{}", flush=True)
    while line := await reader.readline():
        asked = json.loads(line)
        for number in range(asked.get("make", 0)):
            site.admin("greetings", "create", greeting(f"g{number}", "begin"))
        if "text" in asked:
            for one in site.server.all("greetings"):
                site.admin("greetings", "update", {**one, "spec": {**one["spec"], "text": asked["text"]}})
        if asked.get("clear"):
            for plural in ("greetings", "configmaps", "deployments"):
                for one in site.server.all(plural):
                    site.server.delete(plural, one["metadata"]["name"])
            site.server.compact()
        if len(site.server.cluster.store.log) > 20_000:
            site.server.compact()
        print(json.dumps({"wrong": len(site.wrong()), "writes": site.server.writes.total()}), flush=True)


def operate(file: Path) -> None:
    """The operator's process."""
    from helios.config import OperatorSettings
    from orchestrator.operator import Work, run
    from tests.support.sample_operator import Greeter

    settings = OperatorSettings(kubeconfig=str(file), workers=WORKERS, resync_s=1.0)
    run(settings, lambda metrics: contextlib.nullcontext(Work([Greeter()])), lambda url: print("running", flush=True))


async def bare(file: Path, objects: int) -> float:
    """Seconds for the same writes by the client alone."""
    from helios.cluster import cluster_client
    from helios.kube.kinds import CONFIG_MAP, DEPLOYMENT
    from orchestrator.actions import Ref
    from tests.support.api_scenarios import Api
    from tests.support.sample_operator import FINALIZER, GREETING, config_map, deployment

    async with cluster_client(kubeconfig=str(file)) as (client, _):
        api, waiting = Api(client), list(range(objects))
        listed = (await api("GET", GREETING.path("ns")))["items"]
        uids = {one["metadata"]["name"]: one["metadata"]["uid"] for one in listed}

        async def work() -> None:
            while waiting:
                name = f"g{waiting.pop()}"
                ref = Ref(GREETING, "ns", name, uids[name])
                status = {"apiVersion": GREETING.api_version, "kind": "Greeting", "metadata": {"name": name}}
                await api.merge(GREETING, "ns", name, {"metadata": {"finalizers": [FINALIZER]}})
                await api.apply(CONFIG_MAP, "ns", config_map(ref, "begin"), "m")
                await api.apply(DEPLOYMENT, "ns", deployment(ref, "begin"), "m")
                await api.apply(GREETING, "ns", status | {"status": {"replicas": 1}}, "m", sub="status")

        begin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(work())
        return time.perf_counter() - begin


class Server:
    """The API server's process."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    async def ask(self, **what: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(what).encode() + b"\n")
        found: dict[str, Any] = json.loads(await self._child.stdout.readline())
        return found

    async def converged(self) -> float:
        """Seconds until everything is as it should be."""
        begin = time.perf_counter()
        async with asyncio.timeout(300):
            while True:
                if not (await self.ask())["wrong"]:
                    return time.perf_counter() - begin
                await asyncio.sleep(0.02)


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    one = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.operator", *arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert one.stdout is not None
        assert await one.stdout.readline(), "it did not start"
        yield one
    finally:
        one.terminate()
        await one.wait()


async def measure(objects: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "kubeconfig"
        async with child("--serve", str(file)) as serving:
            server = Server(serving)
            await server.ask(make=objects)
            yardstick_s = await bare(file, objects)
            await server.ask(clear=True)
            await server.ask(make=objects)
            before = (await server.ask())["writes"]
            begin = time.perf_counter()
            async with child("--operate", str(file)) as operator:
                await server.converged()
                from_nothing_s = time.perf_counter() - begin
                writes = (await server.ask())["writes"] - before
                changed_s, memory, steady = [], [], 0
                for number in range(rounds):
                    await server.ask(text=f"round {number}")
                    changed_s.append(await server.converged())
                    await asyncio.sleep(0.5)
                    quiet = (await server.ask())["writes"]
                    await asyncio.sleep(STEADY_S if number in (0, rounds - 1) else 1.0)
                    steady += (await server.ask())["writes"] - quiet
                    memory.append(memory_of(operator.pid))
                    print(f"round {number}: {changed_s[-1]:.2f} s, {memory[-1] / 1e6:.1f} MB")
    return {
        "benchmark": "operator", "time": time.strftime("%Y%m%dT%H%M%S"), "objects": objects, "writes": writes,
        "from_nothing_s": from_nothing_s, "yardstick_s": yardstick_s, "changed_s": changed_s, "steady_writes": steady,
        "memory": memory, "grown": memory[-1] - memory[min(SETTLED, rounds) - 1],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--objects", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--operate", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(serve(given.serve))
        return 0
    if given.operate is not None:
        operate(given.operate)
        return 0
    result = asyncio.run(measure(given.objects, given.rounds))
    rows = [
        ("from nothing, the process' start included", f"{result['from_nothing_s']:.2f} s", f"{SECONDS:g} s"),
        ("the same writes by the client alone", f"{result['yardstick_s']:.2f} s", ""),
        ("all objects changed (median)", f"{sorted(result['changed_s'])[given.rounds // 2]:.2f} s", ""),
        ("writes from nothing", str(result["writes"]), ""),
        ("writes in steady state", str(result["steady_writes"]), "0"),
        ("memory, last", f"{result['memory'][-1] / 1e6:.1f} MB", ""),
        ("memory, grown since the third round", f"{result['grown'] / 1e6:.1f} MB", f"{GROWTH / 1e6:g} MB"),
    ]
    for name, figure, target in rows:
        print(f"{name:45} {figure:>10}  {target}")
    print(save(result, given.json))
    good = result["from_nothing_s"] < SECONDS * given.objects / 100 and result["grown"] <= GROWTH
    return 0 if good and not result["steady_writes"] else 1


if __name__ == "__main__":
    sys.exit(main())
