"""The operator beside a bare client: models reconciled from nothing, what steady state costs, and memory over churn.

The fake API server of the tests runs in a process of its own, and has Models with an InferenceService each; a real
registry, another process, has their repositories. The operator is a process, too, as ``helios operator`` runs it. A
service is reconciled when its status says so of its commit and its Deployment, Services, budget and NetworkPolicy are
there (nobody makes pods of them). The yardstick is the official client that sends the very writes that the operator
has sent, as many at a time as it has workers, to the same server, and does nothing else. Then every service is changed
again and again, with memory read after each round; between the rounds, with a resync each three seconds, nothing
may be written.

    python -m benchmarks.operator [--objects 100] [--rounds 10] [--json FILE]

Targets: 100 models in under 10 s; no write in steady state; at most 5 MB more from the third round to the last.
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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import ROOT, memory_of, save

SECONDS, GROWTH, SETTLED = 10.0, 5e6, 3
WORKERS = 8
STEADY_S = 10.0
RESYNC_S = 3.0
BOOKMARK_S, COLLECT_S = 20.0, 1.0
"""Nearer to a real API server than what tests wait for."""
KINDS = ("models", "inferenceservices", "deployments", "services", "poddisruptionbudgets", "networkpolicies")


async def serve(file: Path) -> None:
    """The API server, told what to do by lines on stdin; each is answered by one of JSON."""
    from tests.support.whole_operator import MADE, Cluster

    here = Cluster(file.parent, bookmark_s=BOOKMARK_S, collect_s=COLLECT_S)
    await here.open()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("{}", flush=True)
    while line := await reader.readline():
        asked, server = json.loads(line), here.server
        if "make" in asked:
            server.calls = []
        for number in range(asked.get("make", 0)):
            here.model(f"m{number}", f"org/m{number}")
            here.service(f"s{number}", f"m{number}")
        if "text" in asked:
            for one in server.all("inferenceservices"):
                spec = {**one["spec"], "engine": {**one["spec"].get("engine", {}), "args": ["--seed", asked["text"]]}}
                here.apply("InferenceService", one["metadata"]["name"], spec)
        if "calls" in asked:
            _keep(asked["calls"], server.calls or [])
            server.calls = None
        if asked.get("clear"):
            for plural in ("inferenceservices", "models", *MADE):
                for one in server.all(plural):
                    server.delete(plural, one["metadata"]["name"], one["metadata"].get("namespace", ""))
            server.compact()
        if len(server.cluster.store.log) > 20_000:
            server.compact()
        missing = _missing(here, asked.get("expect", "")) if asked.get("look") else []
        uids = _uids(here) if asked.get("uids") else {}
        answer = {"wrong": len(missing), "writes": server.writes.total(), "uids": uids}
        print(json.dumps(answer), flush=True)


def _missing(here: Any, text: str) -> list[str]:
    """Services that are not as they should be."""
    kept = {plural: {one["metadata"]["name"]: one for one in here.server.all(plural)} for plural in KINDS}
    models = [
        name for name, one in kept["models"].items()
        if (one.get("status") or {}).get("observedGeneration") != one["metadata"]["generation"]
        or not one["status"].get("sizeBytes")
    ]  # fmt: skip
    return models + [name for name, one in kept["inferenceservices"].items() if not _good(one, kept, text)]


def _good(service: dict[str, Any], kept: dict[str, dict[str, Any]], text: str) -> bool:
    name, status = service["metadata"]["name"], service.get("status") or {}
    if status.get("observedGeneration") != service["metadata"]["generation"] or not status.get("commit"):
        return False
    worker = f"{name}-both-{status['commit'][:10]}"
    deployment = kept["deployments"].get(worker)
    there = worker in kept["services"] and name in kept["services"] and f"{name}-both" in kept["poddisruptionbudgets"]
    if deployment is None or not there or name not in kept["networkpolicies"]:
        return False
    return not text or text in json.dumps(deployment["spec"]["template"])


def _keep(file: str, calls: list[Any]) -> None:
    """Write down the writes among them."""
    found = [
        (one.verb, one.kind, one.namespace, one.name, one.subresource, one.body)
        for one in calls
        if one.write and one.kind not in ("Lease", "Event")
    ]
    Path(file).write_bytes(msgspec.json.encode(found))


def _uids(here: Any) -> dict[str, str]:
    found = [one for plural in ("models", "inferenceservices") for one in here.server.all(plural)]
    return {f"{one['kind']}/{one['metadata']['name']}": one["metadata"]["uid"] for one in found}


def operate(file: Path, registry: str) -> None:
    """The operator's process."""
    from helios.config import Config, OperatorSettings, RegistrySettings
    from orchestrator.assembly import whole
    from orchestrator.operator import run

    settings = OperatorSettings(kubeconfig=str(file), workers=WORKERS, resync_s=RESYNC_S)
    config = Config(operator=settings, registry=RegistrySettings(urls=[registry]))
    run(settings, lambda metrics: whole(config, metrics), lambda url: print("running", flush=True))


async def bare(file: Path, text: str, before: dict[str, str], after: dict[str, str]) -> tuple[float, float]:
    """Seconds, and seconds of a CPU, for the same writes by the client alone. ``text``: the calls; ``before``,
    ``after``: owners' uids."""
    from helios.cluster import cluster_client
    from helios.kube import kinds
    from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
    from tests.support.api_scenarios import Api

    known = {one.kind: one for one in vars(kinds).values() if isinstance(one, kinds.Kind)}
    known |= {one.kind: one for one in (INFERENCE_SERVICE, MODEL)}
    for name, uid in before.items():
        text = text.replace(uid, after[name])
    async with cluster_client(kubeconfig=str(file)) as (client, _):
        api, waiting = Api(client), list(reversed(json.loads(text)))

        async def work() -> None:
            while waiting:
                verb, kind, namespace, name, sub, body = waiting.pop()
                (body.get("metadata") or {}).pop("resourceVersion", None)
                if verb == "apply":
                    await api.apply(known[kind], namespace, body, "helios-operator", sub=sub)
                else:
                    await api.merge(known[kind], namespace, name, body)

        begin, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(work())
        return time.perf_counter() - begin, time.process_time() - cpu


def cpu_of(pid: int) -> float:
    """Seconds of a CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def registry_with(root: Path, objects: int) -> Iterator[str]:
    """A registry's process that has the models; its URL."""
    from helios.http.client import HttpClient
    from helios.registry_client import RegistryClient
    from tests.support.whole_operator import push

    environ = os.environ | {"HELIOS_HOME": str(root / "home"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "helios", "registry", "--port", "0", "--json"], env=environ, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url: str = json.loads(process.stdout.readline())["url"]
        with contextlib.closing(RegistryClient(HttpClient(url))) as client:
            for number in range(objects):
                push(client, root, f'{{"number": {number}}}', f"org/m{number}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


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

    async def converged(self, text: str = "") -> float:
        """Seconds until everything is as it should be."""
        begin = time.perf_counter()
        async with asyncio.timeout(300):
            while True:
                if not (await self.ask(look=True, **({"expect": text} if text else {})))["wrong"]:
                    return time.perf_counter() - begin
                await asyncio.sleep(0.1)


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
    with tempfile.TemporaryDirectory() as root, registry_with(Path(root), objects) as registry:
        file, calls = Path(root) / "kubeconfig", Path(root) / "calls"
        async with child("--serve", str(file)) as serving:
            server = Server(serving)
            await server.ask(make=objects)
            before = (await server.ask())["writes"]
            begin = time.perf_counter()
            async with child("--operate", str(file), "--registry", registry) as operator:
                started_s, started_cpu_s = time.perf_counter() - begin, cpu_of(operator.pid)
                await server.converged()
                from_nothing_s, cpu_s = time.perf_counter() - begin, cpu_of(operator.pid) - started_cpu_s
                await asyncio.sleep(2.0)
                writes = (await server.ask(calls=str(calls)))["writes"] - before
                changed_s, memory, steady = [], [], 0
                for number in range(rounds):
                    text = f"round-{number}"
                    await server.ask(text=text)
                    changed_s.append(await server.converged(text))
                    await asyncio.sleep(1.0)
                    quiet = (await server.ask())["writes"]
                    await asyncio.sleep(STEADY_S if number in (0, rounds - 1) else 1.0)
                    steady += (await server.ask())["writes"] - quiet
                    memory.append(memory_of(operator.pid))
                    print(f"round {number}: {changed_s[-1]:.2f} s, {memory[-1] / 1e6:.1f} MB")
            old = (await server.ask(uids=True))["uids"]
            await server.ask(clear=True)
            await server.ask(make=objects)
            new = (await server.ask(uids=True))["uids"]
            yardstick_s, yardstick_cpu_s = await bare(file, await asyncio.to_thread(calls.read_text), old, new)
    return {
        "benchmark": "operator", "time": time.strftime("%Y%m%dT%H%M%S"), "objects": objects, "writes": writes,
        "from_nothing_s": from_nothing_s, "started_s": started_s, "cpu_s": cpu_s, "yardstick_cpu_s": yardstick_cpu_s,
        "yardstick_s": yardstick_s, "changed_s": changed_s, "steady_writes": steady,
        "memory": memory, "grown": memory[-1] - memory[min(SETTLED, rounds) - 1],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--objects", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--operate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--registry", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(serve(given.serve))
        return 0
    if given.operate is not None:
        operate(given.operate, given.registry)
        return 0
    result = asyncio.run(measure(given.objects, given.rounds))
    rows = [
        ("from nothing, the process' start included", f"{result['from_nothing_s']:.2f} s", f"{SECONDS:g} s"),
        ("of that until it runs", f"{result['started_s']:.2f} s", ""),
        ("the same writes by the client alone", f"{result['yardstick_s']:.2f} s", ""),
        ("CPU from then on", f"{result['cpu_s']:.2f} s", ""),
        ("CPU of the client alone", f"{result['yardstick_cpu_s']:.2f} s", ""),
        ("all services changed (median)", f"{sorted(result['changed_s'])[given.rounds // 2]:.2f} s", ""),
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
