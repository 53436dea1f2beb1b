"""A registry as a source: its native API over the blocking client (docs/native-api.md)."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from helios.errors import (
    DeadlineExceeded,
    HeliosError,
    IntegrityError,
    NotFound,
    RepoNotFound,
    RevisionNotFound,
    Unavailable,
)
from helios.http.client import HttpClient, error_of
from helios.http.response import Response, Watch, read_together
from helios.names import RepoId
from heliosfs.fetch.source import BlobRef, Deliver
from heliosfs.store.content import CommitContent
from heliosfs.store.placement import PlacedBlob, Placement, Segment
from heliosfs.store.recipe import Recipe

MAX_PLACEMENTS: Final = 256
"""Placements kept; the least recently used goes. One of a 100 GB blob with a pack per chunk holds some 10 MB."""

MAX_HOSTS: Final = 8
"""Hosts of absolute (presigned) URLs whose connections are kept."""

MAX_RECORD: Final = 1 << 28
"""Longest recipe or placement accepted, in bytes."""

MAX_CONTENT: Final = 32 << 20
"""Longest answer for a whole commit accepted, in bytes."""

MAX_RECIPES: Final = 16 << 20
"""Bytes of recipes kept that were learnt ahead."""

SINGLE_S: Final = 300.0
"""A registry that does not know the call for a whole commit is asked again after so many seconds."""

PIECE: Final = 32 << 10
"""What is urgent is asked for in pieces of at least so many bytes, each on a connection of its own: two round trips."""

NEW_PIECES: Final = 32
"""Most pieces over connections that may be new. TCP starts with some 14 KB a round trip and doubles: 4 MiB take eight
round trips on one connection, three or four on 32."""

WARM_PIECES: Final = 4
"""Most pieces where connections carried a lot a moment ago."""

WARM_BYTES: Final = 64 << 20
WARM_S: Final = 10.0
"""Connections count as used for so many seconds after the source has sent that many bytes."""

DISTANT_S: Final = 0.003
"""With a shorter round trip, in seconds, pieces gain nothing."""

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
    placement: Placement | None = None
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
        self._recipes: OrderedDict[str, bytes] = OrderedDict()
        self._recipe_bytes = 0
        self._single_until = -math.inf
        self._sent = 0
        self._sent_at = -math.inf
        self._latency_s = math.inf
        self._name = url if url.startswith("unix:") else urlsplit(url).netloc.rpartition("@")[2]

    @property
    def name(self) -> str:
        return self._name

    @property
    def latency_s(self) -> float:
        return 0.0 if math.isinf(self._latency_s) else self._latency_s

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
        for segment in self._placed(want, recipe, timeout_s).segments(chunks):
            client, path = self._route(segment.object.url)
            pieces = self._pieces(client) if urgent else 1
            try:
                if pieces > 1 and segment.length >= 2 * PIECE:
                    self._fetch_pieces(client, path, recipe, segment, pieces, buffer, deliver, timeout_s, watch)
                else:
                    self._fetch_segment(client, path, recipe, segment, buffer, deliver, timeout_s, watch)
            except Unavailable:
                if not segment.object.url.startswith("/"):
                    self._doubt(want.sha256)
                raise
            self._sent_now(segment.length)

    def warm(self) -> None:
        self._client.warm(NEW_PIECES)

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
        for client in {id(found): found for found, _ in map(self._route, sorted(hosts)[:MAX_HOSTS])}.values():
            client.warm(NEW_PIECES)
        return lease_s if content.blobs else SINGLE_S

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

    def _ask(self, slot: _Slot, want: BlobRef, recipe: Recipe, timeout_s: float) -> None:
        now = self._clock()
        limit = min(MAX_RECORD, MAX_CHUNK_PLACE * (len(recipe) + 8))
        placement = Placement.decode(self._get("/api/v1/placements", want, timeout_s, limit))
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

    def _get(self, path: str, want: BlobRef, timeout_s: float, limit: int) -> bytes:
        """The answer about a blob, through the first of its repositories that still has it."""
        for repo in (want.repo, *want.also):
            try:
                return self._call(path, timeout_s, {"repo": str(repo), "blob": want.sha256}, limit)
            except NotFound as error:
                failure = error
        raise failure

    def _call(self, path: str, timeout_s: float, params: Mapping[str, str], limit: int) -> bytes:
        with self._send(self._client, path, timeout_s, params=params) as response:
            data = response.read(limit)
        if response.status >= 400:
            error = error_of(response.status, data, f"{self.name}: {path}")
            raise _not_final(error) if response.status >= 500 or response.status == 429 else error
        return data

    def _fetch_segment(
        self,
        client: HttpClient,
        path: str,
        recipe: Recipe,
        segment: Segment,
        buffer: memoryview,
        deliver: Deliver,
        timeout_s: float,
        watch: Watch,
    ) -> None:
        span = range(segment.offset, segment.offset + segment.length)
        headers = {"range": f"bytes={span.start}-{span.stop - 1}"}
        with self._send(client, path, timeout_s, headers=headers, watch=watch) as response:
            self._check(response, segment, span)
            for index in range(segment.first, segment.first + segment.count):
                start, end = recipe.span(index)
                view = buffer[: end - start]
                response.extend(timeout_s)
                _read(response, view)
                deliver(index, view)

    def _fetch_pieces(
        self,
        client: HttpClient,
        path: str,
        recipe: Recipe,
        segment: Segment,
        pieces: int,
        buffer: memoryview,
        deliver: Deliver,
        timeout_s: float,
        watch: Watch,
    ) -> None:
        """What the buffer takes at a time, over several connections at once; each chunk as soon as it is here."""
        first = recipe.span(segment.first)[0]
        for window in recipe.windows(range(segment.first, segment.first + segment.count)):
            start, index = recipe.span(window.start)[0], window.start
            size = recipe.span(window.stop - 1)[1] - start
            at = segment.offset + start - first
            step = max(PIECE, -(-size // pieces))
            spans = [range(at + low, at + min(low + step, size)) for low in range(0, size, step)]
            with ExitStack() as stack:
                answers = client.ranges(path, spans, timeout_s=timeout_s, watch=watch)
                for answer in answers:
                    stack.enter_context(answer)
                for answer, span in zip(answers, spans, strict=True):
                    self._check(answer, segment, span)
                views = [buffer[span.start - at : span.stop - at] for span in spans]
                for here in read_together(list(zip(answers, views, strict=True)), timeout_s):
                    while index < window.stop and recipe.ends[index] <= start + here:
                        low, high = recipe.span(index)
                        deliver(index, buffer[low - start : high - start])
                        index += 1

    def _pieces(self, client: HttpClient) -> int:
        """Over how many connections to ask for something urgent: open ones only."""
        if self.latency_s < DISTANT_S:
            return 1
        used = self._sent >= WARM_BYTES and self._clock() - self._sent_at < WARM_S
        return min(client.idle, WARM_PIECES if used else NEW_PIECES)

    def _sent_now(self, count: int) -> None:
        now = self._clock()
        with self._lock:
            self._sent = count + (self._sent if now - self._sent_at < WARM_S else 0)
            self._sent_at = now

    def _send(
        self,
        client: HttpClient,
        path: str,
        timeout_s: float,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        watch: Watch | None = None,
    ) -> Response:
        asked = self._clock()
        try:
            response = client.request("GET", path, params=params, headers=headers, timeout_s=timeout_s, watch=watch)
        except DeadlineExceeded:
            raise
        except Unavailable:
            if self._revive is None or client is not self._client:
                raise
            self._revive()
            response = client.request("GET", path, params=params, headers=headers, timeout_s=timeout_s, watch=watch)
        self._latency_s = min(self._latency_s, self._clock() - asked)
        return response

    def _check(self, response: Response, segment: Segment, span: range) -> None:
        where = f"{self.name}: object {segment.object.key}"
        if 400 <= response.status < 500 and response.status not in PASSING:
            raise NotFound(f"{where}: status {response.status}")
        if response.status >= 400:
            raise _not_final(error_of(response.status, response.read(MAX_ERROR), where))
        if response.status != 206 or response.headers.get("content-length") != str(len(span)):
            raise Unavailable(
                f"{where}: asked for {len(span)} bytes, it answers {response.status} with "
                f"{response.headers.get('content-length')}",
                hint="Whatever stands between must pass Range requests through.",
            )
        said, asked = response.headers.get("content-range"), f"bytes {span.start}-{span.stop - 1}"
        if said is not None and not said.startswith(f"{asked}/"):
            raise Unavailable(f"{where}: asked for {asked}, it answers with {said[:80]!r}")

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
