"""The workers of a run, as who commands them sees them, and the two ways in which the router is told of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from helios.http.client import HttpClient
from tests.support.chaos.board import SLOTS, Board, Count, Mode

ROOT: Final = Path(__file__).resolve().parents[3]
MODEL: Final = "chaos"
WAIT_S: Final = 60.0
"""Longest wait for anything of a worker: the machine may be busy."""


class Teller(Protocol):
    """How the router hears which workers there are."""

    def tell(self, workers: Iterable[Member]) -> None:
        """These, and no others."""
        ...


@dataclass
class Member:
    """One worker; ``life`` counts its processes."""

    slot: int
    pid: int = 0
    port: int = 0
    life: int = 0
    alive: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Timeline:
    """When processes were killed, by ``time.monotonic``: what a failure may come from."""

    workers: dict[str, float] = field(default_factory=dict)
    """By ``SLOT.LIFE``, as answers name their worker."""
    routers: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    """When a worker was told to listen no more."""


class Fleet:
    """``root``: where the board and the journal lie. Everything ends with ``close``."""

    def __init__(self, root: Path) -> None:
        self.journal = root / "journal"
        self.journal.touch()
        self.board = Board(root / "board", create=True)
        self.members = [Member(slot) for slot in range(SLOTS)]
        self.timeline = Timeline()
        self._answers = threading.Condition()
        command = [sys.executable, "-m", "tests.support.chaos.nursery", str(root / "board"), str(self.journal)]
        self._nursery = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        for member in self.members:
            if member.alive:
                self.resume(member)
        self._nursery.stdin.close()
        try:
            self._nursery.wait(WAIT_S)
        finally:
            self._nursery.kill()
            self._nursery.wait()
            self._reader.join(WAIT_S)
            self._nursery.stdout.close()
            self.board.close()

    def start(self, members: Iterable[Member]) -> None:
        """Start them, again where they lived before, on the same ports; returns when they listen."""
        assert self._nursery.stdin is not None
        members = list(members)
        for member in members:
            member.life += 1
            member.pid = 0
            self.board.set_mode(member.slot, Mode.WELL)
            self._nursery.stdin.write(f"start {member.slot} {member.life}\n")
        with self._answers:
            if not self._answers.wait_for(lambda: all(member.pid for member in members), WAIT_S):
                raise RuntimeError(f"workers did not start within {WAIT_S:g} s")
        for member in members:
            member.alive = True

    def kill(self, member: Member) -> None:
        """SIGKILL, which excuses what is there."""
        self.timeline.workers[f"{member.slot}.{member.life}"] = time.monotonic()
        self.end(member)

    def end(self, member: Member) -> None:
        """The same for one that has nothing to do any more, which excuses nothing."""
        member.alive = False
        os.kill(member.pid, signal.SIGKILL)

    def stop(self, member: Member) -> None:
        """SIGSTOP: connections are made, and nothing is read."""
        os.kill(member.pid, signal.SIGSTOP)

    def resume(self, member: Member) -> None:
        with suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGCONT)

    def behave(self, member: Member, mode: Mode) -> None:
        if mode is Mode.REFUSES:
            self.timeline.refusals.append(time.monotonic())
        self.board.set_mode(member.slot, mode)

    def count(self, count: Count) -> int:
        """The sum over those that live."""
        return sum(self.board.get(member.slot, count) for member in self.members if member.alive)

    def _read(self) -> None:
        assert self._nursery.stdout is not None
        for line in self._nursery.stdout:
            slot, pid, port = map(int, line.split())
            with self._answers:
                self.members[slot].pid, self.members[slot].port = pid, port
                self._answers.notify_all()


class FileTeller:
    """``router.discovery.file``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tell(self, workers: Iterable[Member]) -> None:
        text = "".join(f'[[workers]]\nmodel = "{MODEL}"\nurl = "{one.url}"\n' for one in workers)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.path)


class RegistrationTeller:
    """``PUT`` and ``DELETE /workers/{id}`` of the administration, on its socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._told: dict[str, Member] = {}

    def tell(self, workers: Iterable[Member]) -> None:
        wanted = {f"w{one.slot}": one for one in workers}
        client = HttpClient(f"unix:{self._socket}", timeout_s=30)
        try:
            for name, one in wanted.items():
                if name not in self._told:
                    body = {"url": one.url, "models": [MODEL], "lease_s": 300.0}
                    client.json("PUT", f"/workers/{name}", body=body)
            for name in self._told.keys() - wanted.keys():
                client.bytes("DELETE", f"/workers/{name}")
        finally:
            client.close()
        self._told = wanted
