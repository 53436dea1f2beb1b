"""Filling: which blobs are fetched whole, in which order, and when their files are closed.

A blob is filled from its first READ, from the moment a weight file is opened, or because it was queued (the other
weight files of an opened one). Ranks: blobs being read, the one read last first; open ones; closed ones; queued ones.
Whether there is room for a blob, and what goes for it, the room says (room.py); what it refuses is read without being
filled, until there is room.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from helios.errors import Conflict, HeliosError, IntegrityError, NoSpace, Unavailable
from helios.metrics import MountMetrics
from heliosfs.fetch.blob import Blob
from heliosfs.fetch.breaker import LONGEST_PAUSE_S, Breaker
from heliosfs.fetch.chunks import Rank
from heliosfs.fetch.engine import Engine
from heliosfs.fetch.room import Room
from heliosfs.fetch.source import BlobRef
from heliosfs.tiers.policy import Verdict

log = logging.getLogger("heliosfs.fetch")

READING: Final = 0
OPEN: Final = 1
CLOSED: Final = 2
QUEUED: Final = 3

BLOCK: Final = 4096
CHUNK_ENTRY: Final = 64
"""Most bytes that a chunk takes in a blob's journal."""

MAX_QUEUE: Final = 4096
"""Queued blobs; more are not remembered."""

MAX_CLOSED: Final = 16
"""Blobs that are filled though nobody has them open; more wait in the queue, without files or tables in memory."""

MAX_GROUPS: Final = 64
"""Models of which is remembered what is not filled: a model that does not fit pushes nothing out."""

STALL_S: Final = 300.0
REFUSED_S: Final = 30.0
"""A fill that somebody waits for fails when not a byte came for this long, in seconds; sooner when it is the disk."""

POLL_S: Final = 0.05
"""How often it is looked how far such a fill is, in seconds."""

BACKLOG: Final = 16
"""With fewer chunks than this left to start, the next queued blob is made ready."""


class Filler:
    """Decides what an engine fetches in the background. All methods run on the trio loop."""

    def __init__(
        self,
        engine: Engine,
        room: Room,
        metrics: MountMetrics,
        *,
        blob_of: Callable[[BlobRef], Blob],
        prepare: Callable[[Blob], Awaitable[None]],
        released: Callable[[Blob], None],
    ) -> None:
        self._engine, self._room = engine, room
        self._blob_of, self._prepare, self._released = blob_of, prepare, released
        self._numbers = itertools.count()
        self._latest: Blob | None = None
        self._filling: dict[Blob, Rank] = {}
        self._refused: set[Blob] = set()
        self._lacking: OrderedDict[str, dict[str, int]] = OrderedDict()
        """By model: the blobs, with their sizes, that there was no room for."""
        self._told: set[Blob] = set()
        """Refused blobs that the log has named."""
        self._queue: OrderedDict[tuple[str, int, str], BlobRef] = OrderedDict()
        self._starting = False
        self.opening = 0
        """Opened blobs that are not ready yet: what is queued waits for them."""
        self._pause = Breaker()
        self._stopped = False
        self._awaited: Counter[Blob] = Counter()
        """Fills that somebody waits for, and how many do."""
        metrics.fills.set_function(lambda: len(self._filling))

    @property
    def filling(self) -> int:
        """Blobs being filled."""
        return len(self._filling)

    def blobs(self) -> list[Blob]:
        """The blobs being filled, those that come first first."""
        return sorted(self._filling, key=lambda blob: self._filling[blob])

    @property
    def queued(self) -> int:
        """Blobs that wait for their turn."""
        return len(self._queue)

    def enqueue(self, wants: Iterable[BlobRef]) -> None:
        """Fill these blobs, in this order, after everything that is open."""
        for want in wants:
            if want.size and len(self._queue) < MAX_QUEUE:
                self._queue.setdefault(want.claim, want)

    def drop(self, wants: Iterable[BlobRef]) -> None:
        """Take these out of the queue."""
        for want in wants:
            self._queue.pop(want.claim, None)

    def read(self, blob: Blob) -> None:
        """A READ of the blob: it comes first now."""
        if self._latest is not blob:
            self._latest = blob
            self._rank(blob, READING, -next(self._numbers))

    def opened(self, blob: Blob) -> None:
        """A blob to be filled was opened."""
        if self._filling.get(blob, (QUEUED, 0))[0] > OPEN:
            self._rank(blob, OPEN, next(self._numbers))

    def closed(self, blob: Blob) -> None:
        """The last handle of the blob went. Its fill goes on, but after what is open."""
        if self._latest is blob:
            self._latest = None
        if blob not in self._filling:
            self._give_up(blob)
            return
        self._rank(blob, CLOSED, next(self._numbers))
        unused = [other for other in self._filling if not other.handles]
        if len(unused) > MAX_CLOSED:
            self.stop(unused[0])
            self.enqueue([unused[0].want])
            self._released(unused[0])

    def stop(self, blob: Blob) -> None:
        """The blob is whole, or is not to be filled any more."""
        if self._latest is blob:
            self._latest = None
        if self._filling.pop(blob, None) is not None and blob.planned:
            self._engine.planner.fill(blob.key, None)
        self._give_up(blob)

    def refuse(self, blob: Blob) -> None:
        """Where the blob lies nothing can be written now: it is filled again when there is room somewhere."""
        if blob in self._filling:
            self.stop(blob)
            if blob.handles:
                self._refused.add(blob)

    def keeps(self, blob: Blob) -> bool:
        """Whether the blob must stay open for being filled."""
        return blob in self._filling

    def _rank(self, blob: Blob, kind: int, number: int) -> None:
        """Fill the blob with this rank, if there is room for it."""
        if not blob.planned:
            return
        if blob not in self._filling and (self._stopped or not self._fits(blob)):
            self._refused.add(blob)
            return
        self._refused.discard(blob)
        self._filling[blob] = (kind, number)
        self._engine.planner.fill(blob.key, (kind, number))

    def _fits(self, blob: Blob) -> bool:
        """Whether the blob may be filled now. What has to go for it begins to; ``look`` asks again."""
        if not blob.proved:
            return False
        want, group, need = blob.want, group_of(blob.want), self._needs(blob)
        lacking = self._lacking.setdefault(group, {})
        self._lacking.move_to_end(group)
        if len(self._lacking) > MAX_GROUPS:
            self._lacking.popitem(last=False)
        lacking.pop(want.sha256, None)
        queued = (w for w in self._queue.values() if w.commit == want.commit and w.repo == want.repo)
        siblings = lacking | {w.sha256: w.size for w in queued}
        rest = sum(self._room.missing(sha256, size) for sha256, size in siblings.items() if sha256 != want.sha256)
        verdict = self._room.ask(blob.local, need, group, need + rest).verdict
        if verdict is not Verdict.GRANTED:
            lacking[want.sha256] = want.size
        if verdict in (Verdict.TOO_LARGE, Verdict.NOT_WORTH) and blob not in self._told:
            self._told.add(blob)
            log.warning(
                "the cache has no room for a whole file; it is read without being filled",
                extra={"file": want.path, "model": str(want.repo), "size": want.size, "reason": verdict.value},
            )
        return verdict is Verdict.GRANTED

    def _needs(self, blob: Blob) -> int:
        """Bytes of disk that filling the blob takes, with its journal and the filesystem's own share."""
        if blob.local.sealed:
            return 0
        assert blob.recipe is not None
        missing = self._engine.planner.missing_bytes(blob.key)
        journal = CHUNK_ENTRY * (len(blob.recipe) + 4)
        return -(-missing // BLOCK) * BLOCK + -(-journal // BLOCK) * BLOCK + missing // 1000

    def _give_up(self, blob: Blob) -> None:
        self._refused.discard(blob)
        self._told.discard(blob)
        if blob.proved:  # else the room is another one's
            self._room.end(blob.want.sha256)

    def look(self) -> None:
        """Called about once a second: what was refused may fit now; what only waits for the impossible is let go."""
        for blob in list(self._refused):
            self._rank(blob, OPEN, next(self._numbers))
        for blob in list(self._filling):
            if not blob.handles and blob.planned and self._engine.planner.stuck(blob.key):
                self.stop(blob)
                self._released(blob)

    def advance(self, nursery: trio.Nursery, now: float) -> None:
        """The engine has little left to start: make the next queued blob ready."""
        if (
            self._queue
            and not self._stopped
            and not self._starting
            and not self.opening
            and self._pause.ready(now)
            and self._engine.planner.backlog(BACKLOG) < BACKLOG
        ):
            self._starting = True
            _, want = self._queue.popitem(last=False)
            nursery.start_soon(self._start_next, want, now)

    async def _start_next(self, want: BlobRef, now: float) -> None:
        try:
            await self._start(want)
            self._pause.worked()
            if self._stopped:
                self._queue.setdefault(want.claim, want)
        except Unavailable:
            self._pause.failed(now)
            self._queue[want.claim] = want
        except HeliosError as error:
            log.warning("a file can't be prefetched", extra={"file": want.path, "reason": str(error)})
        finally:
            self._starting = False
        self._engine.pump()

    async def _start(self, want: BlobRef) -> None:
        blob = self._blob_of(want)
        blob.users += 1
        try:
            await self._prepare(blob)
            await self._admit(blob, next(self._numbers))
        finally:
            self._leave(blob)

    async def _admit(self, blob: Blob, number: int) -> None:
        """Fill the blob as soon as what must go for it has gone, if it is let in at all."""
        while blob not in self._filling:
            self._rank(blob, QUEUED, number)
            if blob not in self._refused or not self._room.waits(blob.want.sha256):
                break
            await self._room.moved()

    async def fill(self, want: BlobRef, note: Callable[[int], None]) -> None:
        """Fill a blob, as a queued one, and return when it is whole; ``note`` is told of its local bytes.

        Raises NoSpace where there is no room for it, Conflict while filling is stopped, IntegrityError when no source
        has it right, Unavailable when nothing came for ``STALL_S``, and what preparing it raises. Cancelled, it lets a
        blob go that nobody else wants.
        """
        blob, number = self._blob_of(want), next(self._numbers)  # the order is that of the calls
        blob.users += 1
        self._awaited[blob] += 1
        try:
            await self._prepare(blob)
            while not blob.whole:
                self._queue.pop(want.claim, None)
                await self._admit(blob, number)
                if self._filling.get(blob, (QUEUED, number)) > (QUEUED, number):  # it came by the queue first
                    self._rank(blob, QUEUED, number)
                self._engine.pump()
                if blob not in self._filling and blob.planned:
                    raise self._refusal(blob)
                await self._until_it_ends(blob, note)
        except trio.Cancelled:
            if not blob.handles and self._awaited[blob] == 1:
                self.stop(blob)
            raise
        finally:
            self._awaited[blob] -= 1
            if not self._awaited[blob]:
                del self._awaited[blob]
            self._leave(blob)

    def _leave(self, blob: Blob) -> None:
        """A task that wanted the blob filled is over, however it ended: what was refused is forgotten before the blob
        is closed."""
        blob.users -= 1
        if blob not in self._filling and not blob.handles:
            self._give_up(blob)
        self._released(blob)

    async def _until_it_ends(self, blob: Blob, note: Callable[[int], None]) -> None:
        """Wait while the blob is filled."""
        planner = self._engine.planner
        last, since = -1, trio.current_time()
        while blob in self._filling and blob.planned:
            now, local = trio.current_time(), planner.local_bytes(blob.key)
            if local != last:
                last, since = local, now
                note(local)
            elif planner.stuck(blob.key) and planner.held_for(blob.key, now) > LONGEST_PAUSE_S:
                raise IntegrityError(f"{blob.want.path}: no source has all of it right; the log says why")
            elif self._engine.disk.failures and now - since > REFUSED_S:
                raise Unavailable(f"{blob.want.path}: the cache's disk takes nothing; the log says why")
            elif now - since > STALL_S:
                raise Unavailable(f"{blob.want.path}: no source gave a byte for {STALL_S:g} s; the log says why")
            await trio.sleep(POLL_S)

    def _refusal(self, blob: Blob) -> HeliosError:
        want = blob.want
        if self._stopped:
            return Conflict("the mount is being drained: nothing more is fetched", hint="`helios drain --undo`")
        if not blob.proved:
            return Conflict(
                f"the file of {want.path} is in use under a manifest that gives it another recipe",
                hint="Once nobody reads that one, this one can be kept.",
            )
        reason = self._room.refusal(want.sha256) or "it is full"
        return NoSpace(f"the cache has no room for {want.path} ({want.size} bytes): {reason}")

    def halt(self) -> None:
        """Begin no fills any more and end those under way, until ``resume``. READs are answered as ever."""
        self._stopped = True
        for blob in list(self._filling):
            self.stop(blob)
            if blob.handles:
                self._refused.add(blob)
            self._released(blob)

    def resume(self) -> None:
        """The opposite of ``halt``: what is open is filled again."""
        self._stopped = False
        self.look()


def group_of(want: BlobRef) -> str:
    """The model that a blob is read for."""
    return f"{want.repo}@{want.commit}"
