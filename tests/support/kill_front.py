"""A cloud that is not always in the mood, behind the front store of a registry that is killed (kill_run.py).

Between the two stands a proxy: for a while the cloud takes nothing, or not everything, or takes it without saying so.
So what was acknowledged waits in the front through kills, and what the front has no room for meets the same weather.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from helios.errors import Quarantined
from heliosfs.store.front.disk import MARKER
from heliosfs.store.front.waiting import NAME, parse
from heliosfs.store.objects import ObjectStore
from tests.support.cloud_proxy import CloudProxy, Seen
from tests.support.kill_work import Process, ask, client, tree_of

LIMIT_MIB: Final = 24
"""Less than what the clients publish: objects are evicted, brought back, and sometimes find no room."""
SLOT_S: Final = 1.5
"""How long the weather lasts, in seconds."""
REFUSING: Final = (0.0, 0.3, 0.6, 1.0, 1.0)
"""Shares of the uploads and removals that fail."""
DRAIN_S: Final = 120.0


@dataclass
class FrontSite:
    """``root`` is the front's directory, ``home`` the registry's."""

    root: Path
    home: Path
    proxy: CloudProxy
    seed: int
    open_cloud: Callable[[], ObjectStore]
    """What lasts, without the front."""

    def settings(self) -> dict[str, str]:
        return {"FRONT": str(self.root), "FRONT_LIMIT_GIB": str(LIMIT_MIB / 1024), "FRONT_WRITES": "back"}

    def unsettle(self) -> None:
        """Let the cloud fail as the seed says, until ``drain``."""
        self.proxy.calm()
        self.proxy.fault(self._refused, status=503, times=-1)
        self.proxy.fault(self._unanswered, lose_answer=True, times=-1)

    def _refused(self, seen: Seen) -> bool:
        share = random.Random(f"{self.seed} {int(time.monotonic() / SLOT_S)}").choice(REFUSING)
        return _changes(seen) and random.random() < share

    def _unanswered(self, seen: Seen) -> bool:
        return _changes(seen) and random.random() < 0.05

    def drain(self, process: Process) -> list[str]:
        """The weather is fine; wait until the cloud has everything. Returns what is wrong."""
        self.proxy.calm()
        end = time.monotonic() + DRAIN_S
        while (waiting := _metric(process, "helios_registry_front_waiting")) and time.monotonic() < end:
            time.sleep(0.1)
        problems = [f"{waiting:g} objects still wait for the cloud after {DRAIN_S:g} s"] if waiting else []
        if (used := _metric(process, "helios_registry_front_used_bytes")) > LIMIT_MIB << 20:
            problems.append(f"the front takes {used:g} bytes, more than {LIMIT_MIB} MiB")
        return problems

    def check(self) -> list[str]:
        """What is wrong with the directory of a registry that was stopped and owed nothing."""
        files = [path for path in self.root.rglob("*") if path.is_file()]
        objects = [path for path in files if not path.relative_to(self.root).parts[0].startswith(".")]
        staged = [path for path in files if ".staging" in path.parts and path.stat().st_size]
        problems = [f"left behind in the front: {staged[:5]}"] if staged else []
        if waiting := parse((self.root / NAME).read_bytes()):
            problems.append(f"the journal has {len(waiting)} objects that wait: {list(waiting.items())[:5]}")
        if (size := sum(path.stat().st_size for path in objects)) > LIMIT_MIB << 20:
            problems.append(f"{size} bytes lie in the front, more than {LIMIT_MIB} MiB")
        return problems

    def look(self) -> tuple[int, list[str]]:
        """How many objects wait according to the journal, as a kill left it, and what is wrong: whatever lies here
        is in the cloud, or the journal says that it has to go there."""
        path = self.root / NAME
        waiting = parse(path.read_bytes()) if path.exists() else {}
        here = {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}
        here = {key for key in here if not key.startswith(".")}
        with contextlib.closing(self.open_cloud()) as cloud:
            lost = here - waiting.keys() - {info.key for info in cloud.list("")}
        problems = [f"the journal forgets {sorted(lost)[:5]} ({len(lost)}), which the cloud lacks"] if lost else []
        return len(waiting), problems

    def wipe(self) -> None:
        """The disk is gone, with all that was on it."""
        assert (self.root / MARKER).exists()
        shutil.rmtree(self.root)
        (self.home / "registry" / "front.json").unlink()


def _changes(seen: Seen) -> bool:
    """An upload or a removal; the registry's claim on the store goes straight to the cloud, and a start needs it."""
    return seen.method in ("PUT", "POST", "DELETE") and "registry/owner" not in seen.path


def _metric(process: Process, name: str) -> float:
    _, body = ask(process, "GET", "/metrics")
    (line,) = [line for line in body.decode().splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def read_all(process: Process) -> tuple[int, list[str]]:
    """Download every file that a ref shows; how many were given out, and what is wrong."""
    count, problems = 0, []
    with client(process) as registry:
        shown = [(info.id, ref, commit) for info in registry.repos() for ref, commit in info.refs.items()]
        for repo, ref, commit in shown:
            for path, sha256 in sorted(tree_of(registry, repo, commit)):
                try:
                    _, body = ask(process, "GET", f"/{repo.id}/resolve/{commit}/{quote(path)}")
                except Quarantined:
                    continue  # nobody released it: as it was
                count += 1
                if hashlib.sha256(body).hexdigest() != sha256:
                    problems.append(f"{repo}@{ref} {path}: {len(body)} bytes that are not those of {sha256}")
    return count, problems
