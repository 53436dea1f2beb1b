"""Damage that a reader found, repaired behind him: from other registries, from the upstream as the last resort.

A reader gets an error, never wrong bytes, and is told what happens now; whoever asks after him gets the right ones.
Each object is mended once at a time: the chunk that somebody wanted first, then whatever else is wrong in it, since
damage rarely comes alone. What could not be repaired is not tried again for a while, however often it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

from helios.config import PeerSettings
from helios.errors import HeliosError, Unavailable
from heliosfs.store.placement import PlacedBlob
from registry.catalog import Catalog
from registry.gc.repair import Repairer
from registry.gc.verify import Pace, Verifier
from registry.metadata import inventory, moving
from registry.pull.upstream import Upstream
from registry.stopping import stop_all
from registry.transfer.peer import Peer

log = logging.getLogger("helios.registry.gc")

AT_A_TIME: Final = 2
"""Objects that are mended; others wait. Each has up to 64 MiB of chunks in memory (``repair.BATCH``)."""
MOST: Final = 32
"""Objects that may wait or be mended, each with a thread; one more is mended when it is asked for again."""
REMEMBERED: Final = 1024
AGAIN_S: Final = 60.0
"""How long what could not be repaired is not tried again, in seconds."""
LONGEST_S: Final = 1800.0
"""Longest time for one object, in seconds; what was done stays done, and the next reader begins anew."""
CLOSE_S: Final = 3.0

BY_HAND: Final = "`helios store verify --repair` looks for it everywhere again; or restore the object from a copy"

Repairing = Callable[[threading.Event], AbstractContextManager[Repairer]]
"""Makes what repairs, until the event is set."""


@dataclass(eq=False)
class Mending:
    """Of one object. ``first`` says whether the chunk that was wanted is right now, or will not become so."""

    key: str
    stop: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    first: Future[None] = field(default_factory=Future)
    ended: float = 0.0
    problem: str = ""

    def told(self) -> str:
        """For whoever wanted a chunk: what happens, and what to do."""
        if not self.finished.is_set():
            return "other sources are being asked for it: try again in a moment"
        return f"no other source gave it ({self.problem}). {BY_HAND}" if self.problem else "try again"


class Mender:
    """Of one registry. Threads may share it; close it at shutdown."""

    def __init__(
        self, catalog: Catalog, repairing: Repairing, *, rate: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``rate`` in bytes a second (0: any): how fast the rest of an object is looked at."""
        self._catalog, self._repairing, self._rate, self._clock = catalog, repairing, rate, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Mending] = OrderedDict()
        self._turns = threading.BoundedSemaphore(AT_A_TIME)
        self._closed = False

    def mend(self, placed: PlacedBlob, index: int) -> Mending | None:
        """Have a chunk repaired that can't be read right here: the mending of its object that runs, one that failed a
        moment ago, or a new one. None where too many are under way. Does not wait."""
        at = placed.locate(index)
        with self._lock:
            found = self._known.get(at.object_key)
            if found is not None and (not found.finished.is_set() or self._failed_lately(found)):
                return found
            under_way = sum(not mending.finished.is_set() for mending in self._known.values())
            if self._closed or under_way >= MOST:
                return None
            mending = self._known[at.object_key] = Mending(at.object_key)
            self._known.move_to_end(at.object_key)
            for key in [key for key, other in self._known.items() if other.finished.is_set()]:
                if len(self._known) <= REMEMBERED:
                    break
                del self._known[key]
            digest = placed.recipe.id(index)
            threading.Thread(target=self._run, args=(mending, digest), name="mend", daemon=True).start()
            return mending

    def told(self, placed: PlacedBlob, index: int) -> str:
        """``mend``, and what to tell whoever wanted the chunk."""
        mending = self.mend(placed, index)
        return f"many objects are damaged. {BY_HAND}" if mending is None else mending.told()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop what is under way and wait for it, within bounds. What was done stays done."""
        with self._lock:
            self._closed = True
            left = [mending for mending in self._known.values() if not mending.finished.is_set()]
        for mending in stop_all(left, timeout_s):
            log.warning("a repair did not end in time", extra={"object": mending.key})

    def _failed_lately(self, mending: Mending) -> bool:
        return bool(mending.problem) and self._clock() - mending.ended < AGAIN_S

    def _run(self, mending: Mending, digest: bytes) -> None:
        timer = threading.Timer(LONGEST_S, mending.stop.set)
        timer.daemon = True
        timer.start()
        try:
            while not self._turns.acquire(timeout=0.2):
                if mending.stop.is_set():
                    raise Unavailable("it was stopped")
            try:
                self._mend(mending, digest)
            finally:
                self._turns.release()
        except HeliosError as error:
            mending.problem = error.message
        except Exception as error:
            mending.problem = repr(error)
            log.exception("a repair broke", extra={"object": mending.key})
        finally:
            timer.cancel()
            mending.ended = self._clock()
            mending.finished.set()
            if not mending.first.done():
                mending.first.set_result(None)

    def _mend(self, mending: Mending, digest: bytes) -> None:
        key = mending.key
        with self._catalog.database.read() as connection:
            stored = inventory.find_object(connection, key)
            held = [] if stored is None else moving.chunks_in(connection, stored.number)
        wanted = [chunk for chunk in held if chunk.id == digest]
        if stored is None or not wanted:
            return  # it has another place already
        with self._repairing(mending.stop) as repairer:
            repairer.repair(stored, wanted)
            if repairer.done.failed:
                mending.problem = repairer.done.problems[0].removeprefix(f"{key}: ")
            mending.first.set_result(None)
            if not mending.problem:
                pace = Pace(self._rate, mending.stop.is_set)
                Verifier(self._catalog).look(stored, pace, repairer.repair)
                if repairer.done.failed:
                    mending.problem = repairer.done.problems[0].removeprefix(f"{key}: ")
            log.warning(
                "damage was looked after", extra={"object": key, **repairer.done.result(), "problem": mending.problem}
            )


def repairing(catalog: Catalog, keep_s: float, peers: Sequence[PeerSettings], upstream: Upstream) -> Repairing:
    """Repairs as ``helios store verify --repair`` makes them; ``keep_s``: see ``registry.gc.copies.Copies``."""

    @contextlib.contextmanager
    def make(stop: threading.Event) -> Iterator[Repairer]:
        with contextlib.ExitStack() as stack:
            asked = [stack.enter_context(contextlib.closing(Peer.of(peer))) for peer in peers]
            yield Repairer(catalog, keep_s, asked, upstream, stop)

    return make
