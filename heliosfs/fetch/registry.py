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

from helios.errors import DeadlineExceeded, HeliosError, IntegrityError, NotFound, Unavailable
from helios.http.client import HttpClient, Response, error_of
from helios.names import RepoId
from heliosfs.fetch.source import BlobRef, Deliver
from heliosfs.store.placement import PlacedBlob, Placement, Segment
from heliosfs.store.recipe import Recipe

MAX_PLACEMENTS: Final = 256
"""Placements kept; the least recently used goes. One of a 100 GB blob with a pack per chunk holds some 10 MB."""

MAX_HOSTS: Final = 8
"""Hosts of absolute (presigned) URLs whose connections are kept."""

MAX_RECORD: Final = 1 << 28
"""Longest recipe or placement accepted, in bytes."""

MAX_CHUNK_PLACE: Final = 8 << 10
"""Most bytes of a placement for one chunk: an object's presigned address, and a run."""

PASSING: Final = frozenset({408, 425, 429})
"""Answers below 500 that the same request may get over. A new placement may cure the others: deleted, moved, a
signature that expired, an address that never was one."""

MAX_ERROR: Final = 1 << 20
"""Longest error answer of an object store that is read, in bytes."""


@dataclass(slots=True)
class _Slot:
    """The placement of one blob; the lock makes it a single flight."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    placed: PlacedBlob | None = None
    until: float = 0.0
    fetched: float = 0.0


class RegistrySource:
    """Reads from the registry at ``url`` (``http://…`` or ``unix:/path``). Threads share it.

    ``revive`` is called when it can't be reached, and may start it again; then it is asked once more.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connections: int,
        clock: Callable[[], float] = time.monotonic,
        revive: Callable[[], None] | None = None,
    ) -> None:
        self._timeout_s, self._connections, self._clock, self._revive = timeout_s, connections, clock, revive
        self._client = HttpClient(url, timeout_s=timeout_s, max_idle=connections)
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._hosts: OrderedDict[str, HttpClient] = OrderedDict()
        self._latency_s = math.inf
        self._name = url if url.startswith("unix:") else urlsplit(url).netloc.rpartition("@")[2]

    @property
    def name(self) -> str:
        return self._name

    @property
    def latency_s(self) -> float:
        return 0.0 if math.isinf(self._latency_s) else self._latency_s

    def recipe(self, want: BlobRef, timeout_s: float) -> bytes:
        return self._get("/api/v1/recipe", want, timeout_s, MAX_RECORD)

    def fetch(
        self, want: BlobRef, recipe: Recipe, chunks: range, buffer: memoryview, deliver: Deliver, timeout_s: float
    ) -> None:
        for segment in self._placed(want, recipe, timeout_s).segments(chunks):
            try:
                self._fetch_segment(recipe, segment, buffer, deliver, timeout_s)
            except Unavailable:
                if not segment.object.url.startswith("/"):
                    self._doubt(want.sha256)
                raise

    def refresh(self, want: BlobRef, recipe: Recipe, timeout_s: float) -> None:
        asked = self._clock()
        slot = self._slot(want.sha256)
        with slot.lock:
            if slot.fetched < asked:  # another thread may have asked while this one waited
                self._ask(slot, want, recipe, timeout_s)

    def close(self) -> None:
        self._client.close()
        with self._lock:
            hosts, self._hosts = self._hosts, OrderedDict()
        for client in hosts.values():
            client.close()

    def _placed(self, want: BlobRef, recipe: Recipe, timeout_s: float) -> PlacedBlob:
        slot = self._slot(want.sha256)
        with slot.lock:
            if slot.placed is None or slot.placed.recipe is not recipe or self._clock() >= slot.until:
                self._ask(slot, want, recipe, timeout_s)
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

    def _ask(self, slot: _Slot, want: BlobRef, recipe: Recipe, timeout_s: float) -> None:
        now = self._clock()
        limit = min(MAX_RECORD, MAX_CHUNK_PLACE * (len(recipe) + 8))
        placement = Placement.decode(self._get("/api/v1/placements", want, timeout_s, limit))
        slot.placed = PlacedBlob(recipe, placement)
        slot.fetched, slot.until = now, now + placement.lease_s

    def _get(self, path: str, want: BlobRef, timeout_s: float, limit: int) -> bytes:
        """The answer about a blob, through the first of its repositories that still has it."""
        for repo in (want.repo, *want.also):
            try:
                return self._get_through(repo, path, want.sha256, timeout_s, limit)
            except NotFound as error:
                failure = error
        raise failure

    def _get_through(self, repo: RepoId, path: str, sha256: str, timeout_s: float, limit: int) -> bytes:
        params = {"repo": str(repo), "blob": sha256}
        with self._send(self._client, path, timeout_s, params=params) as response:
            data = response.read(limit)
        if response.status >= 400:
            error = error_of(response.status, data, f"{self.name}: {path}")
            raise _not_final(error) if response.status >= 500 or response.status == 429 else error
        return data

    def _fetch_segment(
        self, recipe: Recipe, segment: Segment, buffer: memoryview, deliver: Deliver, timeout_s: float
    ) -> None:
        client, path = self._route(segment.object.url)
        span = f"bytes={segment.offset}-{segment.offset + segment.length - 1}"
        with self._send(client, path, timeout_s, headers={"range": span}) as response:
            self._check(response, segment)
            for index in range(segment.first, segment.first + segment.count):
                start, end = recipe.span(index)
                view = buffer[: end - start]
                response.extend(timeout_s)
                _read(response, view)
                deliver(index, view)

    def _send(
        self,
        client: HttpClient,
        path: str,
        timeout_s: float,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        asked = self._clock()
        try:
            response = client.request("GET", path, params=params, headers=headers, timeout_s=timeout_s)
        except DeadlineExceeded:
            raise
        except Unavailable:
            if self._revive is None or client is not self._client:
                raise
            self._revive()
            response = client.request("GET", path, params=params, headers=headers, timeout_s=timeout_s)
        self._latency_s = min(self._latency_s, self._clock() - asked)
        return response

    def _check(self, response: Response, segment: Segment) -> None:
        where = f"{self.name}: object {segment.object.key}"
        if 400 <= response.status < 500 and response.status not in PASSING:
            raise NotFound(f"{where}: status {response.status}")
        if response.status >= 400:
            raise _not_final(error_of(response.status, response.read(MAX_ERROR), where))
        if response.status != 206 or response.headers.get("content-length") != str(segment.length):
            raise Unavailable(
                f"{where}: asked for {segment.length} bytes, it answers {response.status} with "
                f"{response.headers.get('content-length')}",
                hint="Whatever stands between must pass Range requests through.",
            )
        said = response.headers.get("content-range")
        last = segment.offset + segment.length - 1
        if said is not None and not said.startswith(f"bytes {segment.offset}-{last}/"):
            raise Unavailable(f"{where}: asked for bytes {segment.offset}-{last}, it answers with {said[:80]!r}")

    def _route(self, url: str) -> tuple[HttpClient, str]:
        """The client and the path for an object's URL."""
        if url.startswith("/"):
            return self._client, url
        parts = urlsplit(url)
        host = f"{parts.scheme}://{parts.netloc}"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with self._lock:
            client = self._hosts.get(host)
            if client is None:
                client = self._hosts[host] = HttpClient(host, timeout_s=self._timeout_s, max_idle=self._connections)
            self._hosts.move_to_end(host)
            dropped = self._hosts.popitem(last=False)[1] if len(self._hosts) > MAX_HOSTS else None
        if dropped is not None:
            dropped.close()
        return client, path


def _read(response: Response, view: memoryview) -> None:
    """Fill the view; an answer that ends early is a broken connection, not a wrong byte."""
    try:
        response.read_into(view)
    except IntegrityError as error:
        raise Unavailable(str(error)) from None


def _not_final(error: HeliosError) -> HeliosError:
    """A server that answers 5xx, or 429, may do better later, whatever it calls its trouble."""
    return error if isinstance(error, Unavailable) else Unavailable(error.message, hint=error.hint)
