"""What the tree asks for: names, which age, and snapshots, which don't."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from helios.names import RepoId
from heliosfs.tree.snapshot import Snapshot

NAME_TTL_S: Final = 1.0
"""A name is answered from memory, kernel's included, for this long after the registry gave it, in seconds."""

UNKNOWN_TTL_S: Final = 5.0
"""A name that does not exist is remembered for this long, in seconds."""

FOREVER: Final = math.inf
"""Content under a commit never changes."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Known(Generic[T]):
    """Something the registry said at ``at``, in seconds of the monotonic clock."""

    value: T
    at: float

    @property
    def fresh_until(self) -> float:
        """Until when a name may be believed."""
        return self.at + NAME_TTL_S

    @property
    def absent_until(self) -> float:
        """Until when the absence of a name may be believed."""
        return self.at + UNKNOWN_TTL_S


@dataclass(frozen=True, slots=True)
class Repos:
    """The repositories there are, by kind and organisation (None: without one)."""

    by_org: Mapping[tuple[str, str | None], tuple[RepoId, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, repos: Iterable[RepoId]) -> Repos:
        grouped: dict[tuple[str, str | None], list[RepoId]] = {}
        for repo in repos:
            grouped.setdefault((repo.kind, repo.org), []).append(repo)
        return cls({key: tuple(sorted(group, key=str)) for key, group in grouped.items()})

    def orgs(self, kind: str) -> list[str]:
        """The organisations that hold a repository of this kind, sorted."""
        return sorted(org for k, org in self.by_org if k == kind and org is not None)

    def within(self, kind: str, org: str | None) -> tuple[RepoId, ...]:
        """The repositories of one organisation, sorted."""
        return self.by_org.get((kind, org), ())

    def all(self) -> list[RepoId]:
        """Every repository, sorted by kind, organisation and name."""
        return sorted((repo for group in self.by_org.values() for repo in group), key=str)


class Source(Protocol):
    """Where names and snapshots come from. No call asks an upstream Hub or fetches a file's content.

    What does not exist is None. When nobody can say, HeliosError is raised. ``fresh`` asks for what is true now: what a
    remembered answer lacks may have come since, so only a fresh one can say that a name does not exist.
    """

    async def repos(self, *, fresh: bool = False) -> Known[Repos]:
        """The repositories there are."""

    async def refs(self, repo: RepoId, *, fresh: bool = False) -> Known[Mapping[str, str] | None]:
        """A repository's refs and their commits, or None where there is no such repository."""

    async def commit_time(self, repo: RepoId, commit: str) -> Known[int | None]:
        """When a commit was made, in seconds since 1970, or None where the repository has no such commit."""

    async def snapshot(self, repo: RepoId, commit: str) -> Known[Snapshot | None]:
        """What a commit holds, or None where the repository has no such commit."""

    async def seen(self, repo: RepoId) -> Known[tuple[str, ...]]:
        """The repository's commits that refs name or that were looked up before, newest known first."""
