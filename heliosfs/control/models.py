"""Which commits are here: what a commit's files are, and how much of it is whole on this node (docs/control-api.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec

from helios.names import RepoId
from heliosfs.routing import Page, Request, Route, json_page
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
    together = (frozenset(snapshot.files[path].sha256 for path in each) for each in sets(snapshot))
    sizes = {entry.sha256: entry.size for entry in snapshot.files.values() if entry.size}
    return Files(sizes, tuple(together))


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


def model_of(key: Key, files: Files, here: Callable[[str], bool], last: Callable[[str], float | None]) -> Model:
    """``here`` says whether a blob is whole on this node, ``last`` how long ago it was opened, in seconds."""
    local = {sha256 for sha256 in files.sizes if here(sha256)}
    needed = files.sets or (frozenset(files.sizes),)
    whole = [each & files.sizes.keys() <= local for each in needed]
    idle = [ago for ago in map(last, files.sizes) if ago is not None]
    return Model(
        repo=str(key[0]),
        commit=key[1],
        files=len(files.sizes),
        local_files=len(local),
        bytes=sum(files.sizes.values()),
        local=sum(files.sizes[sha256] for sha256 in local),
        weights="whole" if local and all(whole) else "part" if local and any(whole) else "none",
        idle_s=round(min(idle), 3) if idle else None,
    )


def routes(seen: Seen, cache: Tiers) -> list[Route]:
    """What tells of commits. Memory alone is asked, so it may be asked often."""

    def last(sha256: str) -> float | None:
        use = cache.history.uses.get(sha256)
        return None if use is None else max(0.0, cache.now() - use.last)

    async def listing(request: Request) -> Page:
        files = await seen.files()
        directories = [tier.directory for tier in cache.all() if tier.directory is not None]

        def here(sha256: str) -> bool:
            return any(directory.is_whole(sha256) for directory in directories)

        models = [model_of(key, each, here, last) for key, each in files.items()]
        return json_page({"models": [msgspec.to_builtins(each) for each in models if each.local_files]})

    return [Route("GET", "/api/v1/models", listing)]
