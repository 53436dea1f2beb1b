"""The long run: ``python -m tests.support.chaos --minutes 5 --leavers 10000 --seed 1``.

Cycles of every fault in an order of the seed's, of a fleet that grows to 32 workers and shrinks to one, and of clients
that leave, all under load; after each everything has to be back at zero, and from the third on memory stays as it is.
Then the router's own processes are killed and replaced.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from helios.home import Home
from tests.support.chaos.leaks import resident
from tests.support.chaos.scenario import Scenario, scenario
from tests.support.command import Command
from tests.support.routing import RouterStarter

PROCESSES: Final = 2
CLIENTS: Final = 24
POLICY: Final = '{"name": "prefix-cache", "entries": 2048}'
"""The default one, with a memory of prompts that is soon full."""
WARM: Final = 2
"""Cycles until memory is what it will be."""
GROWTH: Final = 8 << 20
"""Bytes by which a data process may grow after that: what Python's and malloc's pools take for themselves..."""
OBJECTS: Final = 300
"""...and Python objects."""
LAST: Final = 4
"""Times that the router's own processes are killed and replaced."""


class Soak:
    def __init__(self, chaos: Scenario, minutes: float, leavers: int) -> None:
        self._chaos, self._end, self._leavers = chaos, time.monotonic() + minutes * 60, leavers
        self.problems: list[str] = []
        self._steady: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        chaos, cycles = self._chaos, 0
        chaos.ready(4)
        while cycles <= WARM or time.monotonic() < self._end or chaos.done["clients that left"] < self._leavers:
            cycles += 1
            self._cycle()
            self._look(f"cycle {cycles}")
            if cycles == WARM:
                self._steady = self._memory()
        for pid, (size, objects) in self._memory().items():
            size_before, objects_before = self._steady[pid]
            print(
                f"process {pid}: {size_before / 2**20:.1f} MiB and {objects_before} objects after {WARM} cycles, "
                f"{size / 2**20:.1f} and {objects} after {cycles}"
            )
            if size > size_before + GROWTH or objects > objects_before + OBJECTS:
                self.problems.append(f"process {pid} has grown")
        with chaos.load(CLIENTS) as load:
            for _ in range(LAST):
                for harm in (chaos.kill_router, chaos.kill_control, chaos.replace):
                    harm()
                    chaos.more(load, 50)
        self._look("the router's processes")

    def _cycle(self) -> None:
        chaos = self._chaos
        with chaos.load(CLIENTS) as load:
            for fault in chaos.shuffled():
                chaos.strike(fault)
                chaos.more(load, 50)
            chaos.mended()
            for count in (32, 1, 4):
                chaos.scale(count)
                chaos.more(load, 200)
        chaos.leave(2000, 200)

    def _look(self, what: str) -> None:
        verdict = self._chaos.verdict()
        left = self._chaos.left_over(60)
        self.problems += [f"{what}: left over: {one}" for one in left]
        memory = ", ".join(f"{size / 2**20:.1f} MiB, {objects} objects" for size, objects in self._memory().values())
        print(
            f"{what}: {verdict.right.total()} right, {verdict.allowed.total()} failed as they had to, "
            f"{len(verdict.lost)} lost; left over: {len(left)}; {memory}",
            flush=True,
        )

    def _memory(self) -> dict[int, tuple[int, int]]:
        """Of each data process, by its pid: bytes and objects."""
        return {pid: (resident(pid), one.objects) for pid, one in self._chaos.held().items()}

    def report(self) -> None:
        """Everything that was done, and what came of it."""
        verdict = self._chaos.verdict()
        self.problems += [f"lost: {one}" for one in verdict.lost] + [f"done twice: {one}" for one in verdict.twice]
        for title, counts in (
            ("done", self._chaos.done), ("answered right", verdict.right), ("failed as they had to", verdict.allowed),
        ):  # fmt: skip
            print(f"\n{title}")
            for name, count in sorted(counts.items()):
                print(f"  {count:>8}  {name}")
        metric = self._chaos.router.metric
        print("\nsent again by the router")
        for reason in ("not_sent", "stale_connection", "not_taken", "broke", "hung"):
            print(f"  {metric('helios_router_retries_total', reason=reason):>8.0f}  {reason}")
        print(f"\nlost: {len(verdict.lost)}, done twice: {len(verdict.twice)}, problems: {len(self.problems)}")
        for problem in self.problems[:50]:
            print(f"  {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--leavers", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"router: {arguments.minutes:g} minutes, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="helios-chaos-", ignore_cleanup_errors=True) as work:
        root = Path(work)
        start = RouterStarter(Command(root / "home"), Home(root / "home"))
        with scenario(start, root, arguments.seed, processes=PROCESSES, policy=POLICY, guarded=True) as chaos:
            soak = Soak(chaos, arguments.minutes, arguments.leavers)
            try:
                soak.run()
            finally:
                soak.report()
                code = chaos.router.stop()
            errors = [one for one in chaos.router.messages() if one["level"] in ("error", "critical")]
            for one in errors[:20]:
                print(f"  logged: {one}")
    return 1 if code or errors or soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
