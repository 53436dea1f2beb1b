"""Warming as a job of the mount: a commit's files, or some of them, are filled in the background."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import trio

from helios.errors import EntryNotFound, HeliosError, NoSpace, Unavailable
from heliosfs.blobs import BlobRef, BlobStore
from heliosfs.control.jobs import Wish
from heliosfs.tree.snapshot import Snapshot
from heliosfs.warming import Note, Tally, in_loading_order, select, warm

MAX_NAMED: Final = 1000
"""Files that one answer names."""

PAUSE_S: Final = 0.5
PATIENCE_S: Final = 60.0
"""A file that no source gives now is asked for again after a pause, doubled each time, for this long, in seconds."""

LOOKS: Final = 50
"""Files whose state is looked up before others get a turn."""


def wants_of(snapshot: Snapshot, paths: Iterable[str]) -> list[BlobRef]:
    """Files of a commit as the blob store asks for them."""
    found = ((path, snapshot.files[path]) for path in paths)
    return [BlobRef(snapshot.repo, snapshot.commit, path, e.sha256, e.size, e.recipe) for path, e in found]


class WarmWork:
    """``patterns``: paths and patterns of the files that are meant; all, where there are none.

    Raises EntryNotFound for one that names nothing. A file that there is no room for, or that can't be had, does not
    keep the others from coming.
    """

    kind: Final = "warm"

    def __init__(self, store: BlobStore, snapshot: Snapshot, revision: str, patterns: Sequence[str]) -> None:
        def missing(path: str) -> None:
            raise EntryNotFound(
                f"{snapshot.repo.id} at {snapshot.commit} has no file {path!r}",
                hint=f"`helios show {snapshot.repo.id}@{snapshot.commit}` lists them.",
            )

        chosen = select(snapshot.files, patterns, missing) if patterns else set(snapshot.files)
        self._store = store
        self._tally = Tally(wants_of(snapshot, in_loading_order(chosen)))
        self._patterns = sorted(set(patterns))
        self._snapshot, self._revision = snapshot, revision
        self._no_room: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._found = 0

    @property
    def wish(self) -> Wish:
        snapshot = self._snapshot
        return Wish("warm", str(snapshot.repo), snapshot.commit, self._revision, tuple(self._patterns))

    @property
    def about(self) -> Mapping[str, Any]:
        return {"repo": str(self._snapshot.repo), "commit": self._snapshot.commit, "patterns": self._patterns}

    def shown(self) -> Mapping[str, Any]:
        now = self._tally.now()
        return {
            "revision": self._revision,
            "files": now.files,
            "files_done": now.files_done,
            "bytes": now.bytes,
            "bytes_done": now.bytes_done,
            "found_bytes": self._found,
            "path": now.path,
            "no_room": dict(list(self._no_room.items())[:MAX_NAMED]),
            "errors": dict(list(self._errors.items())[:MAX_NAMED]),
        }

    @property
    def failed(self) -> bool:
        return bool(self._no_room or self._errors)

    async def run(self) -> None:
        store, tally = self._store, self._tally
        for number, want in enumerate(tally.files):
            self._found += store.status(want.sha256).local_bytes
            if not number % LOOKS:
                await trio.lowlevel.checkpoint()
        try:
            await warm(tally, self._fetch, store.prefetch)
        finally:
            store.drop_queued(tally.files)

    async def _fetch(self, want: BlobRef, note: Note) -> bool:
        if not want.size or self._store.status(want.sha256).complete:
            return True
        end, pause = trio.current_time() + PATIENCE_S, PAUSE_S
        while True:
            try:
                await self._store.fill(want, note)
                return True
            except NoSpace as error:
                self._no_room[want.path] = error.message
                return False
            except HeliosError as error:
                if not isinstance(error, Unavailable) or trio.current_time() + pause > end:
                    self._errors[want.path] = error.message
                    return False
            await trio.sleep(pause)
            pause *= 2
