"""A router, its workers and its clients, and what is done to them in an order that the seed decides."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from router.admission.keys import create
from tests.support.chaos.board import Count, Mode
from tests.support.chaos.fleet import MODEL, FileTeller, Fleet, Member, RegistrationTeller, Teller
from tests.support.chaos.leaks import INSIDE, Held, held, left_over, most, settle
from tests.support.chaos.load import Asked, Load, leave
from tests.support.chaos.verdict import Journal, Verdict, judge
from tests.support.routing import RouterProcess

WAIT_S: Final = 60.0
SETTINGS: Final[dict[str, Any]] = {
    "health_interval_s": 0.5,
    "health_timeout_s": 2,
    "idle_timeout_s": 60,
    "first_byte_timeout_s": 20,
    "slow_start_s": 0,
    # Nobody's retry is refused because others had theirs: what that does is shown elsewhere.
    "retries": {"most": 4, "budget_ratio": 1, "budget_floor_per_s": 100},
    "hang": {"quiet_s": 0.8, "factor": 1, "timeout_s": 0.7, "every_s": 0.3},
    "breaker": {"open_s": 0.5, "max_open_s": 1},
    "outliers": {"interval_s": 1, "eject_s": 1, "max_eject_s": 2},
    "admission": {"queue": {"per_worker": 6, "comment_after_s": 0}},
}
"""Settings under which nothing but the faults themselves can fail a request."""
MODES: Final = {
    "slow": Mode.SLOW,
    "hangs": Mode.HANGS,
    "refuses": Mode.REFUSES,
    "says 503": Mode.NOT_TAKEN,
    "answers garbage": Mode.GARBAGE,
    "garbage inside": Mode.LATE_GARBAGE,
    "resets": Mode.RESETS,
}
FAULTS: Final = (*MODES, "killed", "stopped", "stopped, then killed")
HARMLESS: Final = ("slow", "hangs", "refuses", "says 503", "stopped")
"""Those that no client may notice: nothing is lost that was begun."""
FOUND_S: Final = {"hangs": 2.5}
"""What takes so long until it is found, in seconds; everything else shows at once."""


class Scenario:
    """``members[0]`` is never touched, so there is always somebody who can serve."""

    def __init__(
        self, router: RouterProcess, fleet: Fleet, teller: Teller, root: Path, seed: int, processes: int = 1,
        keys: Sequence[str] = ("",),
    ) -> None:  # fmt: skip
        self.router, self.fleet, self._teller, self._root = router, fleet, teller, root
        self._rng, self.seed, self._processes, self._keys = random.Random(seed), seed, processes, keys
        self._present: list[Member] = []
        self._not_taken: set[str] = set()
        self._leavers = itertools.count(seed * 1000)
        self.asked: list[Asked] = []
        """What the verdict is still to tell of."""
        self._verdict = Verdict()
        self.done: Counter[str] = Counter()
        self.begin: Held | None = None
        """What the router held before anybody asked it."""

    # --- workers ---

    def ready(self, workers: int) -> None:
        """So many workers, and all up; then what the router holds is what it may hold at the end."""
        self.scale(workers)
        self.begin = most(self.router, self._root)

    def scale(self, count: int) -> None:
        """Add or remove workers; one that is removed ends when the router has left it."""
        going, self._present = self._present[count:], self._present[:count]
        fresh = self.fleet.members[len(self._present) : count]
        if fresh:
            self.fleet.start(fresh)
            self._present += fresh
        self._teller.tell(self._present)
        self._wait(lambda: self.router.up() == count, f"{count} workers to be up")
        for member in going:
            self._wait(partial(self._left, member), "a worker that was removed to be left")
            self.fleet.end(member)
        self.done[f"scaled to {count}"] += 1

    def _left(self, member: Member) -> bool:
        return not self.router.metric("helios_router_in_flight", worker=member.url)

    def strike(self, fault: str, seconds: float = 0.3) -> None:
        """One worker has this fault for so long at least, and for some requests; it is well again afterwards."""
        member = self._rng.choice(self._present[1:])
        fleet, seconds = self.fleet, max(seconds, FOUND_S.get(fault, 0))
        if fault in MODES:
            if MODES[fault] is Mode.NOT_TAKEN:
                self._not_taken.add(f"{member.slot}.{member.life}")
            before = self._taken(member)
            fleet.behave(member, MODES[fault])
            time.sleep(seconds)
            if fault != "refuses":
                self._wait(lambda: self._taken(member) >= before + 3, f"requests at a worker that {fault}")
            fleet.behave(member, Mode.WELL)
        elif fault == "stopped":
            fleet.stop(member)
            time.sleep(seconds)
            fleet.resume(member)
        else:
            if fault != "killed":
                fleet.stop(member)
                time.sleep(seconds)
            fleet.kill(member)
            time.sleep(seconds)
            fleet.start([member])
        self.done[fault] += 1

    def _taken(self, member: Member) -> int:
        return self.fleet.board.get(member.slot, Count.TAKEN)

    def mended(self) -> None:
        """Wait until all workers serve again."""
        self._wait(lambda: self.router.up() == len(self._present), "all workers to be up")
        self._wait(lambda: not self.router.metric("helios_router_worker_hung"), "no worker to hang")

    def shuffled(self, faults: Sequence[str] = FAULTS) -> list[str]:
        """All of them, in an order of the seed's."""
        return self._rng.sample(faults, len(faults))

    # --- the router ---

    def kill_router(self) -> None:
        """SIGKILL to one of the router's data processes; another one takes its place."""
        pids = self.router.pids()
        victim = self._rng.choice(pids)
        self.fleet.timeline.routers.append(time.monotonic())
        os.kill(victim, signal.SIGKILL)
        self._wait(lambda: victim not in self.router.pids() and len(self.router.pids()) == len(pids), "another process")
        self.done["data process killed"] += 1

    def kill_control(self) -> None:
        """SIGKILL to the control process, which no request may notice."""
        (victim,) = self.router.pids("control")
        os.kill(victim, signal.SIGKILL)
        self._wait(lambda: self.router.pids("control") not in ([], [victim]), "another control process")
        self.done["control process killed"] += 1

    def replace(self) -> None:
        """SIGHUP: all processes are replaced, which no request may notice."""
        old = set(self.router.pids() + self.router.pids("control"))
        self.router.process.send_signal(signal.SIGHUP)
        self._wait(
            lambda: (
                not old & set(self.router.pids() + self.router.pids("control"))
                and len(self.router.pids()) == self._processes
            ),
            "the processes to be replaced",
        )
        self.done["all processes replaced"] += 1

    # --- clients ---

    @contextmanager
    def load(self, clients: int) -> Iterator[Load]:
        """Clients that ask meanwhile."""
        load = Load(self.router.address, clients, self._rng.randrange(1 << 31), keys=self._keys)
        try:
            yield load
        finally:
            self.asked += load.stop()

    def more(self, load: Load, requests: int) -> None:
        """Wait until so many more requests have ended."""
        enough = len(load.asked) + requests
        self._wait(lambda: len(load.asked) >= enough, f"{requests} requests")

    def leave(self, count: int, at_once: int) -> None:
        """Clients that go away inside their streams."""
        self.asked += leave(self.router.address, count, at_once, next(self._leavers), keys=self._keys)
        self.done["clients that left"] += count

    # --- the end ---

    def held(self) -> dict[int, Held]:
        """What each data process holds, by its pid."""
        return {pid: held(pid, self._root) for pid in self.router.pids()}

    def left_over(self, within_s: float = 20) -> list[str]:
        """What the router or its workers hold that they should not, once nobody asks any more."""
        assert self.begin is not None
        start = self.begin
        return settle(lambda: left_over(self.router, self.fleet, self._root, start, self._processes), within_s)

    def verdict(self) -> Verdict:
        """On all requests until now, of which none may be under way."""
        fleet = self.fleet
        judge(self.asked, Journal.read(fleet.journal), fleet.timeline, self._not_taken, self._verdict)
        self.asked.clear()
        os.truncate(fleet.journal, 0)
        return self._verdict

    def _wait(self, ready: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not ready():
            if time.monotonic() > end:
                raise RuntimeError(f"{what}: not within {WAIT_S:g} s")
            time.sleep(0.05)


@contextmanager
def scenario(
    start: Callable[..., RouterProcess], root: Path, seed: int, *, processes: int = 1, registration: bool = False,
    policy: str = "least-requests", guarded: bool = False,
) -> Iterator[Scenario]:  # fmt: skip
    """A scenario without workers yet. ``start`` is ``start_router``; workers come from a file, or by registration.

    ``guarded``: clients have keys of two tenants, with limits in requests and tokens, which nobody reaches.
    """
    file, fleet = root / "workers.toml", Fleet(root)
    file.touch()
    discovery = {"file": str(file), "file_poll_s": 0.1}
    wanted, keys = dict(SETTINGS), [""]
    if guarded:
        path, limits = root / "keys", {"requests_per_minute": 1e6, "tokens_per_minute": 1e9}
        keys = [create(path, tenant, time.time(), limits=limits)[1] for tenant in ("one", "two", "one")]
        tenants = {tenant: {"limits": limits} for tenant in ("one", "two")}
        models = {MODEL: limits}
        wanted["admission"] = {**SETTINGS["admission"], "keys": str(path), "tenants": tenants, "models": models}
    settings = {name: value if isinstance(value, int) else json.dumps(value) for name, value in wanted.items()}
    try:
        router = start(
            wait_up=False, processes=processes, args=("--policy", policy), discovery=json.dumps(discovery),
            environ=inside(root), **settings,
        )  # fmt: skip
        teller: Teller = FileTeller(file)
        if registration:
            home = Path(router.log).parent.parent
            teller = RegistrationTeller(home / "run" / f"router-{router.address[1]}.sock")
        yield Scenario(router, fleet, teller, root, seed, processes, keys)
    finally:
        fleet.close()


def inside(where: Path) -> dict[str, str]:
    """Environment of a router that says what it holds."""
    path = [str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "HELIOS_CHAOS_INSIDE": str(where)}
