#!/usr/bin/env python3
"""Many rounds on one HELIOS_HOME: publish, mount, read under load while parts are killed, verify every byte, unmount.

    make soak MINUTES=10        (or: .venv/bin/python scripts/soak.py --minutes 10 --seed 1)

Each round publishes a model that shares most chunks with the one before, reads all files with several readers at once,
kills the embedded registry, the mount's worker or what keeps the mount (SIGKILL) at a random moment, mounts again where
that is needed and reads again. A digest that differs, a reader that hangs, an error after a killed worker of a native
mount, or anything left running at the end fails the run. The seed is printed; the same seed does the same in the same
order.

    .venv/bin/python scripts/soak.py --kills 200

kills the worker of one native mount that often under eight readers and one that maps the files, with a cache too small
for them; no reader may see it, and READs that were under way must have come again.

    .venv/bin/python scripts/soak.py --crashes

kills a worker, cuts its power and has its disk refuse at every single step that it makes there, and lets many small
caches live through two days; tests that `make test` runs in part (test_crashes.py, test_churn.py, test_mount_churn.py).

    .venv/bin/python scripts/soak.py --models 200

tries so many sequences of steps on a real mount beside a model of it, in each mode; of up to 100 steps each in the
registry's stateful tests (collections in any order beside pushes, pulls and a mirror, on both databases; refs; quotas;
two processes that are one); and the models of the mount's cores over and over. `make test` tries 5 to a dozen short
ones, and the cores once.

    .venv/bin/python scripts/soak.py --registry 100

kills registries that often under clients of every kind (tests/support/kill_run.py): one on SQLite and a directory, then
one or both of two on PostgreSQL; a fourth as often one on S3, and one with a front store before S3 that acknowledges
before the cloud has anything, with a cloud that often refuses. What was acknowledged must be there, and nothing else.

    .venv/bin/python scripts/soak.py --router 5

has workers killed, hung, slowed, refusing, answering garbage and restarted behind a router of two processes for so many
minutes, under clients that know each answer beforehand, with a fleet of 1 to 32 of them; 10,000 clients leave inside
their streams, and the router's own processes are killed and replaced (tests/support/chaos/). No request may be lost
that could have been sent again, nothing may be left over, and memory stays as it is.

    .venv/bin/python scripts/soak.py --fuzz 500

has schemathesis make that many requests for each call of the registry's APIs, and as many sequences of calls that
follow from answers; `make test` makes a few. Once without an upstream, once in a tenant's part with one behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helios.config import Config
from helios.embedded import attach
from helios.errors import HeliosError
from helios.home import Home
from helios.http.client import HttpClient

ROOT = Path(__file__).resolve().parent.parent
HELIOS = Path(sys.executable).parent / "helios"
READERS = 4
FILE_MIB = 24
DEADLINE_S = 120.0

MOUNT_MODEL = "tests/integration/test_mount_model.py"
CORE_MODELS = [
    f"tests/unit/heliosfs/test_{name}.py"
    for name in ("io_modes", "planner", "policy", "moves", "tier_directory", "restore", "trials", "memory_pool")
]


class Soak:
    """One run on one home."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.env = {**os.environ, "HELIOS_HOME": str(home)}
        self.mountpoint = home / "mnt"
        self.model = home / "model"
        self.model.mkdir(parents=True)
        self.rounds = self.reads = self.resends = 0
        self.errors: Counter[str] = Counter()
        self.reasons: list[str] = []

    def helios(self, *args: str) -> str:
        done = subprocess.run(
            [HELIOS, *args], env=self.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"helios {' '.join(args)}: exit {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def change(self) -> dict[str, str]:
        """Write or change the model's files; returns their digests."""
        digests = {}
        for number in range(3):
            path = self.model / f"part-{number}.bin"
            if not path.exists():
                path.write_bytes(self.random.randbytes(FILE_MIB << 20))
            with path.open("r+b") as file:
                file.seek(self.random.randrange(FILE_MIB << 20) & ~0xFFF)
                file.write(self.random.randbytes(4096))
            digests[path.name] = sha256(path)
        return digests

    def read(self, commit: str, digests: dict[str, str], *, strict: bool) -> None:
        """Read every file with several readers; wrong bytes always fail, errors only when ``strict``."""
        directory = self.mountpoint / "soak" / "model" / commit
        jobs = list(digests.items()) * READERS
        self.random.shuffle(jobs)

        def one(job: tuple[str, str]) -> None:
            name, digest = job
            try:
                found = sha256(directory / name)
            except OSError as error:
                if strict:
                    raise
                self.reasons.append(str(error.strerror))
                return
            self.reads += 1
            if found != digest:
                raise RuntimeError(f"{name} of {commit} read as {found}, not {digest}")

        with ThreadPoolExecutor(READERS) as threads:
            for future in [threads.submit(one, job) for job in jobs]:
                future.result(timeout=DEADLINE_S)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.helios("status", "--json"))
        return document

    def kill_something(self) -> str:
        status = self.status()
        victims = {f"mount {m['pid']}": m["pid"] for m in status["mounts"]}
        victims |= {f"worker {m['worker']['pid']}": m["worker"]["pid"] for m in status["mounts"] if m["worker"]}
        if status["registry"]["pid"]:
            victims[f"registry {status['registry']['pid']}"] = status["registry"]["pid"]
        name = self.random.choice(sorted(victims))
        os.kill(victims[name], signal.SIGKILL)
        return name

    def mount_again(self) -> None:
        """Mount, unless the worker of a killed keeper has seen to it."""
        try:
            self.helios("mount", str(self.mountpoint))
        except RuntimeError as error:
            if "is mounted already" not in str(error):
                raise

    def storm(self, kills: int) -> None:
        """Kill the worker of one native mount again and again under readers that must not notice.

        The cache has room for one file of three, which is not linked from the store either, and the kernel forgets what
        was read: so most READs are under way, through the worker, when it dies, and come again from the kernel.
        """
        digests = self.change()
        self.env |= {"HELIOS_MOUNT__CACHE_LIMIT_GIB": "0.03", "HELIOS_MOUNT__POOL_MIB": "16"}
        with attach(Config(), Home(self.home), self.env) as registry:
            commit = self.helios("push", str(self.model), "soak/model")
            mount = ("mount", str(self.mountpoint), "--json", "--registry", registry.urls[0])
            state = json.loads(self.helios(*mount))
            if state["mode"] != "native":
                raise SystemExit(f"the mount is not native: {state['reason']}")
            self.kill_workers(kills, self.mountpoint / "soak" / "model" / commit, digests, state["socket"])
            self.helios("umount", str(self.mountpoint))
        print(f"{kills} kills, {self.resends} requests came again from the kernel")
        if not self.resends:
            raise RuntimeError("no request was under way when a worker died: the run has shown nothing")

    def kill_workers(self, kills: int, directory: Path, digests: dict[str, str], socket: str) -> None:
        over = threading.Event()

        def read(number: int) -> int:
            rounds = 0
            while not over.is_set():
                for name, digest in digests.items():
                    found = mapped_sha256(directory / name) if number == 0 else sha256(directory / name)
                    if found != digest:
                        raise RuntimeError(f"{name} read as {found}, not {digest}")
                    rounds += 1
            return rounds

        with ThreadPoolExecutor(9) as threads:
            reading = [threads.submit(read, number) for number in range(9)]
            try:
                for number in range(kills):
                    if number % 5:  # else the next one is killed while it starts, or just after
                        self.resends += resends(socket)
                    time.sleep(self.random.random())
                    with contextlib.suppress(ProcessLookupError):  # the next one is just starting
                        os.kill(self.worker(), signal.SIGKILL)
                    if number % 20 == 19:
                        print(f"{number + 1} kills", flush=True)
                    if failed := [each for each in reading if each.done()]:
                        failed[0].result()
            finally:
                over.set()
            self.reads = sum(future.result(timeout=DEADLINE_S) for future in reading)

    def worker(self) -> int:
        return int((self.home / "run" / "heliosfs-worker.pid").read_text())

    def round(self) -> str:
        """One round; returns what was killed."""
        digests = self.change()
        commit = self.helios("push", str(self.model), "soak/model")
        if self.random.random() < 0.3:
            shutil.rmtree(self.home / "cache", ignore_errors=True)  # a cold start
        self.helios("mount", str(self.mountpoint))
        with ThreadPoolExecutor(1) as background:
            reading = background.submit(self.read, commit, digests, strict=False)
            time.sleep(self.random.random() * 0.5)
            killed = self.kill_something()
            reading.result(timeout=DEADLINE_S)
        if killed.startswith("worker") and self.reasons:
            raise RuntimeError(f"readers saw a killed worker: {Counter(self.reasons)}")
        self.errors.update(f"{reason} after a killed {killed.split()[0]}" for reason in self.reasons)
        self.reasons.clear()
        if killed.startswith("mount"):
            self.mount_again()
        self.read(commit, digests, strict=True)
        self.helios("umount", str(self.mountpoint))
        self.rounds += 1
        return killed


def resends(socket: str) -> int:
    """How many requests of killed workers the present one got, once it answers."""
    end = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(HeliosError), contextlib.closing(HttpClient(f"unix:{socket}", timeout_s=10)) as client:
            client.bytes("GET", "/readyz")
            page = client.bytes("GET", "/metrics").decode()
            return int(float(re.search(r"^helios_mount_resends_total (\S+)$", page, re.M)[1]))
        if time.monotonic() > end:
            raise RuntimeError(f"no worker answers after {DEADLINE_S:.0f} s")
        time.sleep(0.05)


def sha256(path: Path) -> str:
    """Read past the page cache, as far as nobody else reads there just then."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


MAPPED = """
import hashlib, mmap, os, sys
with open(sys.argv[1], "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        print(hashlib.sha256(view).hexdigest())
"""


def mapped_sha256(path: Path) -> str:
    """By another process: a page that can't be read is a SIGBUS."""
    done = subprocess.run([sys.executable, "-ISc", MAPPED, path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{path.name} can't be read mapped: exit status {done.returncode}\n{done.stderr}")
    return done.stdout.strip()


def kill_registries(engine: str, kills: int, seed: int) -> int:
    command = [sys.executable, "-m", "tests.support.kill_run", "--engine", engine]
    command += ["--kills", str(kills), "--seed", str(seed)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def examine_models(examples: int, seed: int) -> int:
    """The mount against the model filesystem, the registry's stateful tests, then the cores', each time other steps."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "--durations", "10"]
    env = {**os.environ, "HELIOS_MODEL_EXAMPLES": str(examples), "HELIOS_MODEL_STEPS": "100"}
    registry = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/unit/registry").glob("test_*_model.py"))
    runs = [[f"--hypothesis-seed={seed}", MOUNT_MODEL], [f"--hypothesis-seed={seed}", *registry]]
    runs += [[f"--hypothesis-seed={seed + number}", *CORE_MODELS] for number in range(max(1, examples // 20))]
    return max(subprocess.run([*command, *run], cwd=ROOT, env=env, check=False).returncode for run in runs)


def torment_router(minutes: float, seed: int) -> int:
    command = [sys.executable, "-m", "tests.support.chaos", "--minutes", str(minutes), "--seed", str(seed)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES") or 10))
    parser.add_argument(
        "--kills", type=int, default=0, help="kill one worker this often under readers, and nothing else"
    )
    parser.add_argument("--crashes", action="store_true", help="every step on a disk, and nothing else")
    parser.add_argument("--models", type=int, metavar="EXAMPLES", help="stateful models, and nothing else")
    parser.add_argument("--registry", type=int, default=0, help="kill registries this often, and nothing else")
    parser.add_argument(
        "--router", type=float, metavar="MINUTES", help="faults of a router's workers for so long, and nothing else"
    )
    parser.add_argument("--fuzz", type=int, metavar="EXAMPLES", help="schemathesis, and nothing else")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    if arguments.fuzz:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "7200"]
        command.append("tests/integration/test_openapi.py")
        phases = "examples,coverage,fuzzing,stateful"
        env = {**os.environ, "HELIOS_FUZZ_EXAMPLES": str(arguments.fuzz), "HELIOS_FUZZ_PHASES": phases}
        return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    if arguments.crashes:
        tests = [f"tests/unit/heliosfs/test_{name}.py" for name in ("crashes", "churn")]
        tests.append("tests/integration/test_mount_churn.py")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations", "10", *tests]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "HELIOS_EVERY_CRASH": "1"}, check=False).returncode
    if arguments.models:
        return examine_models(arguments.models, arguments.seed)
    if arguments.router:
        return torment_router(arguments.router, arguments.seed)
    if arguments.registry:
        return max(
            kill_registries(engine, kills, arguments.seed)
            for engine, kills in (
                ("sqlite", arguments.registry),
                ("postgres", arguments.registry),
                ("s3", max(1, arguments.registry // 4)),
                ("front", max(1, arguments.registry // 4)),
            )
        )
    print(f"soak: {arguments.minutes:g} minutes, seed {arguments.seed}", flush=True)
    end = time.monotonic() + arguments.minutes * 60
    with tempfile.TemporaryDirectory(prefix="helios-soak-", ignore_cleanup_errors=True) as work:
        soak = Soak(Path(work) / "home", arguments.seed)
        try:
            if arguments.kills:
                soak.storm(arguments.kills)
            while not arguments.kills and time.monotonic() < end:
                killed = soak.round()
                if soak.rounds % 10 == 1:
                    print(f"round {soak.rounds}: killed {killed}; {soak.reads} files read right", flush=True)
        finally:
            subprocess.run([HELIOS, "umount", soak.mountpoint], env=soak.env, capture_output=True, check=False)
        left = [m for m in soak.status()["mounts"] if m["alive"]]
    print(f"soak: {soak.rounds} rounds, {soak.reads} files read right; failed reads: {dict(soak.errors) or 'none'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
