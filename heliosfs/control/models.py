"""Which commits are here: what a commit's files are, and how much of it is whole on this node (docs/control-api.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec
import trio

from helios.names import RepoId
from heliosfs.routing import Page, Request, Route, json_page
from heliosfs.tiers.history import Use
from heliosfs.tiers.tiers import Tiers
from heliosfs.tree.shards import sets
from heliosfs.tree.snapshot import Snapshot

T = TypeVar("T")

MAX_SEEN: Final = 200
"""Commits whose files are counted."""
MAX_FILES: Final = 50_000
"""Their files that are remembered for it, in all; a commit of more is not counted."""

Key = tuple[RepoId, str]
"""A repository and a commit."""


class Commits(Protocol):
    """What is known here of commits (heliosfs/catalog.py)."""

    def commits(self, most: int) -> list[Key]: ...
    async def told(self, repo: RepoId, commit: str, summary: Callable[[Snapshot], T]) -> T | None: ...


@dataclass(frozen=True, slots=True)
class Files:
    """A commit's blobs: ``sizes`` in bytes, without empty ones; ``sets`` of weights that are loaded together."""

    sizes: Mapping[str, int]
    sets: tuple[frozenset[str], ...] = ()


class Seen:
    """The files of commits that were seen; looked up once each, and no registry is asked. Used on one loop."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self._files: dict[Key, Files] = {}

    async def files(self) -> dict[Key, Files]:
        """Of each commit as far as known; nothing of those that have too many."""
        keys = self._commits.commits(MAX_SEEN)
        self._files = {key: self._files[key] for key in keys if key in self._files}
        for key in keys:
            if key not in self._files and (found := await self._commits.told(*key, files_of)) is not None:
                room = MAX_FILES - sum(len(each.sizes) for each in self._files.values())
                self._files[key] = found if len(found.sizes) <= room else Files({})
        return dict(self._files)


def files_of(snapshot: Snapshot) -> Files:
    """A commit's files, for counting."""
    sizes = {entry.sha256: entry.size for entry in snapshot.files.values() if entry.size}
    together = (frozenset(snapshot.files[path].sha256 for path in each).intersection(sizes) for each in sets(snapshot))
    return Files(sizes, tuple(filter(None, together)))


class Model(msgspec.Struct, frozen=True):
    """How much of a commit is here, whole files alone; sizes in bytes.

    ``weights``: ``whole`` when every weight file is (of a commit without any, every file), ``part`` when one set is
    that is loaded together, else ``none``. ``idle_s``: seconds of the mount's running time since one of its files was
    opened; None: as far as is known, never.
    """

    repo: str
    commit: str
    files: int
    local_files: int
    bytes: int
    local: int
    weights: str
    idle_s: float | None


def model_of(key: Key, files: Files, here: frozenset[str], uses: Mapping[str, Use], now: float) -> Model:
    """``here``: the blobs that are whole on this node; ``uses``: of blobs, on the clock of ``now`` (seconds)."""
    local = here.intersection(files.sizes)  # not of the keys: that would look at all that is here
    whole = [each <= local for each in files.sets or (files.sizes.keys(),)]
    last = max((use.last for use in map(uses.get, local) if use is not None), default=None)
    return Model(
        repo=str(key[0]),
        commit=key[1],
        files=len(files.sizes),
        local_files=len(local),
        bytes=sum(files.sizes.values()),
        local=sum(map(files.sizes.__getitem__, local)),
        weights="whole" if local and all(whole) else "part" if local and any(whole) else "none",
        idle_s=None if last is None else round(max(0.0, now - last), 3),
    )


def routes(seen: Seen, cache: Tiers) -> list[Route]:
    """What tells of commits. Memory alone is asked, so it may be asked often."""

    def listing(found: Mapping[Key, Files], now: float) -> Page:
        here = frozenset[str]().union(*(tier.directory.whole() for tier in cache.all() if tier.directory is not None))
        near = [(key, files) for key, files in found.items() if not here.isdisjoint(files.sizes)]
        models = [model_of(key, files, here, cache.history.uses, now) for key, files in near]
        return json_page({"models": [msgspec.to_builtins(each) for each in models]})

    async def models(request: Request) -> Page:
        # Some 15 ms for 25,000 files; uses are looked up one by one, which the loop's changes to them don't disturb.
        return await trio.to_thread.run_sync(listing, await seen.files(), cache.now())

    return [Route("GET", "/api/v1/models", models)]
