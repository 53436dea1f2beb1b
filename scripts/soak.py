#!/usr/bin/env python3
"""Many rounds on one HELIOS_HOME: publish, mount, read under load while parts are killed, verify every byte, unmount.

    make soak MINUTES=10        (or: .venv/bin/python scripts/soak.py --minutes 10 --seed 1)

Each round publishes a model that shares most chunks with the one before, reads all files with several readers at once,
kills the embedded registry, the mount's worker or what keeps the mount (SIGKILL) at a random moment, mounts again where
that is needed and reads again. A digest that differs, a reader that hangs, an error after a killed worker of a native
mount, or anything left running at the end fails the run. The seed is printed; the same seed does the same in the same
order.

    .venv/bin/python scripts/soak.py --kills 200

kills the worker of one native mount that often under eight readers and one that maps the files; no reader may see it.

    .venv/bin/python scripts/soak.py --crashes

kills a worker, cuts its power and has its disk refuse at every single step that it makes there, and lets many small
caches live through two days; tests that `make test` runs in part (tests/unit/heliosfs/test_crashes.py, test_churn.py).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
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

ROOT = Path(__file__).resolve().parent.parent
HELIOS = Path(sys.executable).parent / "helios"
READERS = 4
FILE_MIB = 24
DEADLINE_S = 120.0


class Soak:
    """One run on one home."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.env = {**os.environ, "HELIOS_HOME": str(home)}
        self.mountpoint = home / "mnt"
        self.model = home / "model"
        self.model.mkdir(parents=True)
        self.rounds = self.reads = 0
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
        """Kill the worker of one native mount again and again under readers that must not notice."""
        digests = self.change()
        commit = self.helios("push", str(self.model), "soak/model")
        state = json.loads(self.helios("mount", str(self.mountpoint), "--json"))
        if state["mode"] != "native":
            raise SystemExit(f"the mount is not native: {state['reason']}")
        directory, over = self.mountpoint / "soak" / "model" / commit, threading.Event()

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
                    time.sleep(0.3 + self.random.random())
                    worker = int((self.home / "run" / "heliosfs-worker.pid").read_text())
                    with contextlib.suppress(ProcessLookupError):  # the next one is just starting
                        os.kill(worker, signal.SIGKILL)
                    if number % 20 == 19:
                        print(f"{number + 1} kills", flush=True)
            finally:
                over.set()
            self.reads = sum(future.result(timeout=DEADLINE_S) for future in reading)
        self.helios("umount", str(self.mountpoint))

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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mapped_sha256(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        return hashlib.sha256(view).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES") or 10))
    parser.add_argument(
        "--kills", type=int, default=0, help="kill one worker this often under readers, and nothing else"
    )
    parser.add_argument("--crashes", action="store_true", help="every step on a disk, and nothing else")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    if arguments.crashes:
        tests = [f"tests/unit/heliosfs/test_{name}.py" for name in ("crashes", "churn")]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations", "10", *tests]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "HELIOS_EVERY_CRASH": "1"}, check=False).returncode
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
