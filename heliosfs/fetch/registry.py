"""A registry as a source: its native API over the blocking client (docs/native-api.md)."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from helios.errors import NotFound, RepoNotFound, RevisionNotFound, Unavailable
from helios.http.client import HttpClient, error_of
from helios.http.places import sent_by
from helios.http.response import Watch
from helios.names import RepoId
from helios.tokens import Token, no_token
from heliosfs.fetch.decoding import Decoding
from heliosfs.fetch.hosts import MAX_HOSTS, NEW_PIECES, PIECE, Hosts
from heliosfs.fetch.ranges import Ranges, not_final
from heliosfs.fetch.source import BlobRef, Deliver
from heliosfs.store.content import CommitContent
from heliosfs.store.placement import PlacedBlob, Placement
from heliosfs.store.recipe import Recipe

MAX_PLACEMENTS: Final = 256
"""Placements kept; the least recently used goes. One of a 100 GB blob with a pack per chunk holds some 10 MB."""

MAX_RECORD: Final = 1 << 28
"""Longest recipe or placement accepted, in bytes."""

MAX_CONTENT: Final = 32 << 20
"""Longest answer for a whole commit accepted, in bytes."""

MAX_RECIPES: Final = 16 << 20
"""Bytes of recipes kept that were learnt ahead."""

SINGLE_S: Final = 300.0
"""A registry that does not know the call for a whole commit is asked again after so many seconds."""

MAX_CHUNK_PLACE: Final = 8 << 10
"""Most bytes of a placement for one chunk: an object's presigned address, and a run."""


@dataclass(slots=True)
class _Slot:
    """The placement of one blob; the lock makes it a single flight."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    placement: Placement | None = None
    placed: PlacedBlob | None = None
    until: float = 0.0
    fetched: float = 0.0


class RegistrySource:
    """Reads from the registry at ``url`` (``http://…`` or ``unix:/path``). Threads share it.

    ``revive`` is called when it can't be reached, and may start it again; then it is asked once more. ``token`` is
    sent to it alone.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connections: int,
        clock: Callable[[], float] = time.monotonic,
        revive: Callable[[], None] | None = None,
        token: Token = no_token,
    ) -> None:
        self._clock = clock
        client = HttpClient(url, timeout_s=timeout_s, max_idle=connections, token=token)
        self._hosts = Hosts(
            client, timeout_s=timeout_s, connections=connections, admits=sent_by(url), clock=clock, revive=revive
        )
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._recipes: OrderedDict[str, bytes] = OrderedDict()
        self._recipe_bytes = 0
        self._single_until = -math.inf
        self._name = url if url.startswith("unix:") else urlsplit(url).netloc.rpartition("@")[2]
        self._ranges, self._decoding = Ranges(self._name, self._hosts), Decoding(self._name)

    @property
    def name(self) -> str:
        return self._name

    @property
    def latency_s(self) -> float:
        return self._hosts.latency_s

    def recipe(self, want: BlobRef, timeout_s: float) -> bytes:
        with self._lock:
            known = self._recipes.pop(want.recipe_digest, None)  # whoever asks keeps it
            if known is not None:
                self._recipe_bytes -= len(known)
                return known
        return self._get("/api/v1/recipe", want, timeout_s, MAX_RECORD)

    def fetch(
        self,
        want: BlobRef,
        recipe: Recipe,
        chunks: range,
        buffer: memoryview,
        deliver: Deliver,
        timeout_s: float,
        *,
        urgent: bool,
        watch: Watch,
    ) -> None:
        placed = self._placed(want, recipe, timeout_s)
        for segment in placed.segments(chunks):
            client, path = self._hosts.route(segment.object.url)
            pieces = self._hosts.pieces(client) if urgent else 1
            take = self._decoding.taking(placed, segment, deliver, timeout_s)
            try:
                if pieces > 1 and segment.length >= 2 * PIECE:
                    self._ranges.fetch_pieces(client, path, placed, segment, pieces, buffer, take, timeout_s, watch)
                else:
                    self._ranges.fetch(client, path, placed, segment, buffer, take, timeout_s, watch)
            except Unavailable:
                if not segment.object.url.startswith("/"):
                    self._doubt(want.sha256)
                raise
            self._hosts.sent(segment.length)

    def warm(self) -> None:
        self._hosts.own.warm(NEW_PIECES)

    def ahead(self, repo: RepoId, commit: str, timeout_s: float) -> float:
        self.warm()
        asked = self._clock()
        if asked < self._single_until:
            return self._single_until - asked
        try:
            params = {"repo": str(repo), "commit": commit}
            content = CommitContent.decode(self._call("/api/v1/content", timeout_s, params, MAX_CONTENT))
        except NotFound as error:
            if not isinstance(error, (RepoNotFound, RevisionNotFound)):  # an older registry has no such call
                self._single_until = asked + SINGLE_S
            return SINGLE_S
        lease_s = math.inf
        hosts = set()
        for each in content.blobs:
            placement = each.placement
            slot = self._slot(placement.blob)
            if slot.lock.acquire(blocking=False):  # else somebody is just asking
                try:
                    if slot.fetched <= asked:
                        slot.placement, slot.placed = placement, None
                        slot.fetched, slot.until = asked, asked + placement.lease_s
                finally:
                    slot.lock.release()
            self._keep_recipe(each.digest, each.recipe)
            lease_s = min(lease_s, placement.lease_s)
            hosts |= {at.url for at in placement.objects[:1] if not at.url.startswith("/")}
        for client in {id(found): found for found, _ in map(self._hosts.route, sorted(hosts)[:MAX_HOSTS])}.values():
            client.warm(NEW_PIECES)
        return lease_s if content.blobs else SINGLE_S

    def refresh(self, want: BlobRef, recipe: Recipe, timeout_s: float, wrong: int | None = None) -> None:
        asked = self._clock()
        slot = self._slot(want.sha256)
        with slot.lock:
            if slot.fetched < asked or wrong is not None:  # another thread may have asked while this one waited
                self._ask(slot, want, recipe, timeout_s, {} if wrong is None else {"doubt": str(wrong)})

    def close(self) -> None:
        self._hosts.close()

    def _placed(self, want: BlobRef, recipe: Recipe, timeout_s: float) -> PlacedBlob:
        slot = self._slot(want.sha256)
        with slot.lock:
            if slot.placement is None or self._clock() >= slot.until:
                self._ask(slot, want, recipe, timeout_s)
            elif slot.placed is None or slot.placed.recipe is not recipe:
                placement, slot.placement = slot.placement, None  # one that contradicts the recipe is asked for again
                slot.placed = PlacedBlob(recipe, placement)
                slot.placement = placement
            assert slot.placed is not None
            return slot.placed

    def _doubt(self, sha256: str) -> None:
        """Another host fails, which may be the wrong one by now: the next one to ask gets a new placement."""
        slot = self._slot(sha256)
        with slot.lock:
            slot.until = float("-inf")

    def _slot(self, sha256: str) -> _Slot:
        with self._lock:
            slot = self._slots.setdefault(sha256, _Slot())
            self._slots.move_to_end(sha256)
            while len(self._slots) > MAX_PLACEMENTS:
                self._slots.popitem(last=False)
            return slot

    def _ask(
        self, slot: _Slot, want: BlobRef, recipe: Recipe, timeout_s: float, more: Mapping[str, str] | None = None
    ) -> None:
        now = self._clock()
        limit = min(MAX_RECORD, MAX_CHUNK_PLACE * (len(recipe) + 8))
        placement = Placement.decode(self._get("/api/v1/placements", want, timeout_s, limit, more))
        slot.placed = PlacedBlob(recipe, placement)
        slot.placement, slot.fetched, slot.until = placement, now, now + placement.lease_s

    def _keep_recipe(self, digest: str, data: bytes) -> None:
        with self._lock:
            if digest not in self._recipes:
                self._recipes[digest] = data
                self._recipe_bytes += len(data)
            while self._recipe_bytes > MAX_RECIPES:
                _, old = self._recipes.popitem(last=False)
                self._recipe_bytes -= len(old)

    def _get(
        self, path: str, want: BlobRef, timeout_s: float, limit: int, more: Mapping[str, str] | None = None
    ) -> bytes:
        """The answer about a blob, through the first of its repositories that still has it."""
        for repo in (want.repo, *want.also):
            try:
                return self._call(path, timeout_s, {"repo": str(repo), "blob": want.sha256, **(more or {})}, limit)
            except NotFound as error:
                failure = error
        raise failure

    def _call(self, path: str, timeout_s: float, params: Mapping[str, str], limit: int) -> bytes:
        with self._hosts.send(self._hosts.own, path, timeout_s, params=params) as response:
            data = response.read(limit)
        if response.status >= 400:
            error = error_of(response.status, data, f"{self.name}: {path}")
            raise not_final(error) if response.status >= 500 or response.status == 429 else error
        return data
