"""Another registry, through its native API: names, records, and the bytes of chunks that are not here."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from helios.config import PeerSettings
from helios.errors import Forbidden, HeliosError, IntegrityError, NotFound, Unavailable
from helios.http.client import HttpClient, error_of
from helios.http.places import sent_by
from helios.names import RepoId
from helios.registry_answers import Commit, Notice, Repo
from helios.registry_client import RegistryClient
from helios.tokens import Token, TokenFile, no_token
from heliosfs.store.bulk import MAX_MANIFEST
from heliosfs.store.chunks import opened
from heliosfs.store.manifest import Manifest
from heliosfs.store.placement import PlacedBlob, Placement, Segment
from heliosfs.store.recipe import MAX_RECIPE, Recipe

SLACK: Final = 1 << 20
"""And bytes that a recipe may have beside that."""
MAX_PLACEMENT: Final = 64 << 20
"""Longest placement that is taken, in bytes."""
CHUNK_PLACE: Final = 8 << 10
"""Most bytes of a placement for one chunk: an object's signed address, and a run."""
SMALLEST: Final = 4096
"""Least average length of a chunk, in bytes: recipes of shorter ones would cost more than the file."""
PIECE: Final = 8 << 20
"""Most bytes asked for at a time."""
AHEAD: Final = 4
"""Pieces in flight for each file: together with ``PIECE`` the memory that it takes; twice that for encoded ones."""
TRIES: Final = 4
PAUSE_S: Final = 0.5
"""Pause before the second try of a piece; each further one is twice as long."""
PIECE_S: Final = 60.0
"""Longest wait for a piece, in seconds."""


class Peer:
    """One registry. Threads may share it; close it at the end."""

    def __init__(self, url: str, *, timeout_s: float = 30.0, token: Token = no_token) -> None:
        self.url = url.rstrip("/")
        self._http = HttpClient(self.url, timeout_s=timeout_s, token=token)
        self._client = RegistryClient(self._http)
        self._lock = threading.Lock()
        self._others: dict[str, HttpClient] = {}

    @classmethod
    def of(cls, settings: PeerSettings) -> Peer:
        """As the configuration says. Raises UsageError for a file of a token that can't be used."""
        return cls(settings.url, token=TokenFile(Path(settings.token_file)) if settings.token_file else no_token)

    def close(self) -> None:
        with self._lock:
            others, self._others = self._others, {}
        for client in (self._http, *others.values()):
            client.close()

    def repos(self) -> list[Repo]:
        return self._client.repos()

    def notices(self, repo: RepoId) -> list[Notice]:
        return self._client.notices(repo)

    def history(self, repo: RepoId, rev: str, limit: int) -> list[Commit]:
        """Commit records from a revision back, newest first."""
        return self._client.commits(repo, rev, limit)

    def manifest(self, repo: RepoId, commit: Commit) -> Manifest:
        """What a commit holds, checked against the digest that its record names."""
        return self.manifest_of(repo, commit.commit, commit.manifest)

    def manifest_of(self, repo: RepoId, commit: str, digest: str) -> Manifest:
        """What a commit holds, which is known by its digest. Raises IntegrityError for anything else."""
        params = {"repo": str(repo), "commit": commit}
        return Manifest.decode(self._bytes("/api/v1/manifest", params, MAX_MANIFEST), digest)

    def recipe(self, repo: RepoId, blob: str, digest: str, size: int) -> Recipe:
        """A blob's recipe, checked against the manifest's digest, name and size."""
        limit = min(size // SMALLEST * 36 + SLACK, MAX_RECIPE)
        record = self._bytes("/api/v1/recipe", {"repo": str(repo), "blob": blob}, limit)
        recipe = Recipe.decode(record, digest)
        if (recipe.blob, recipe.size) != (blob, size):
            raise IntegrityError(f"{self.url} gives a recipe of another blob ({recipe.blob}) for {blob}")
        return recipe

    def placed(self, repo: RepoId, recipe: Recipe) -> PlacedBlob:
        """Where the peer has a blob's chunks now, checked against the recipe."""
        params = {"repo": str(repo), "blob": recipe.blob}
        limit = min(CHUNK_PLACE * (len(recipe) + 8), MAX_PLACEMENT)
        return PlacedBlob(recipe, Placement.decode(self._bytes("/api/v1/placements", params, limit)))

    def read(self, placed: PlacedBlob, chunks: range) -> bytearray:
        """Consecutive chunks, back to back. They are decoded where they are encoded, but not compared with their
        hashes. Raises IntegrityError for what can't be decoded."""
        recipe = placed.recipe
        start = recipe.span(chunks.start)[0]
        out = bytearray(recipe.span(chunks.stop - 1)[1] - start)
        view = memoryview(out)
        for segment in placed.segments(chunks):
            low = recipe.span(segment.first)[0] - start
            if segment.plain:
                self._read(segment, view[low : low + segment.length])
                continue
            encoded = memoryview(bytearray(segment.length))  # shorter than the chunks
            self._read(segment, encoded)
            done = 0
            for index in range(segment.first, segment.first + segment.count):
                at = placed.locate(index)
                view[low : low + at.length] = opened(at, encoded[done : done + at.encoded_length])
                done += at.encoded_length
                low += at.length
        return out

    def _read(self, segment: Segment, buffer: memoryview) -> None:
        """Fill the buffer with a segment's bytes as they are stored."""
        client, path = self._at(segment.object.url)
        headers = {"range": f"bytes={segment.offset}-{segment.offset + segment.length - 1}"}
        with client.request("GET", path, headers=headers, timeout_s=PIECE_S) as response:
            if response.status >= 400:
                raise error_of(response.status, response.read(1 << 16), f"{self.url}: an object")
            if response.status != 206:
                raise Unavailable(f"{self.url}: asked for a range of an object, it answers {response.status}")
            response.read_into(buffer)

    def _bytes(self, path: str, params: dict[str, str], limit: int) -> bytes:
        """An answer of at most ``limit`` bytes."""
        with self._http.request("GET", path, params=params) as response:
            if response.status >= 400:
                raise error_of(response.status, response.read(1 << 16), f"{self.url}: {path}")
            return response.read(limit)

    def _at(self, url: str) -> tuple[HttpClient, str]:
        """Who has an object: the peer itself, or the store that its address names."""
        parts = urlsplit(url)
        if not parts.scheme:
            return self._http, url
        base = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            client = self._others.get(base)
            if client is None:
                client = self._others[base] = HttpClient(base, admits=sent_by(self.url))
        return client, url[len(base) :] or "/"


@dataclass(frozen=True, slots=True)
class _Piece:
    first: int
    count: int
    length: int


class PeerSource:
    """Chunks of a blob from a peer, one after another: a ``Source``. A few pieces are on their way at a time.

    Close it at the end: it waits for what is on its way.
    """

    def __init__(
        self, peer: Peer, repo: RepoId, recipe: Recipe, chunks: list[int], stopped: Callable[[], bool]
    ) -> None:
        self._peer, self._repo, self._recipe, self._stopped = peer, repo, recipe, stopped
        self._placed: PlacedBlob | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="peer")
        self._pieces = _pieces(recipe, chunks)
        self._flying: deque[Future[bytearray]] = deque()
        self._now = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._now:
            while len(self._flying) < AHEAD and (piece := next(self._pieces, None)) is not None:
                self._flying.append(self._threads.submit(self._fetch, piece))
            if not self._flying:
                return 0
            self._now = memoryview(self._flying.popleft().result())
        count = min(len(buffer), len(self._now))
        buffer[:count] = self._now[:count]
        self._now = self._now[count:]
        return count

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _fetch(self, piece: _Piece) -> bytearray:
        pause = PAUSE_S
        placed = self._where(None)
        for attempt in range(1, TRIES + 1):
            if self._stopped():
                break
            try:
                return self._peer.read(placed, range(piece.first, piece.first + piece.count))
            except (NotFound, Forbidden):  # moved, or an address that has expired
                if attempt == TRIES:
                    raise
                placed = self._where(placed)
            except HeliosError:
                if attempt == TRIES:
                    raise
                time.sleep(pause)
                pause *= 2
        raise Unavailable("the transfer was stopped")

    def _where(self, stale: PlacedBlob | None) -> PlacedBlob:
        with self._lock:
            if self._placed is None or self._placed is stale:
                self._placed = self._peer.placed(self._repo, self._recipe)
            return self._placed


def _pieces(recipe: Recipe, chunks: list[int]) -> Iterator[_Piece]:
    """The chunks in runs of consecutive ones, each at most ``PIECE`` bytes (one chunk at least)."""
    first, count, length = 0, 0, 0
    for index in chunks:
        start, end = recipe.span(index)
        if count and (index != first + count or length + end - start > PIECE):
            yield _Piece(first, count, length)
            count = 0
        if not count:
            first, length = index, 0
        count += 1
        length += end - start
    if count:
        yield _Piece(first, count, length)
