"""Where models are: in memory, on the fast disk in front, in the store, or at the upstream only.

Nothing is changed by asking: an upstream is asked whether it has a revision that is not here, and what it says is not
kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec

from helios.config import RegistrySettings
from helios.errors import EntryNotFound, HeliosError, NotFound, RepoNotFound, RevisionNotFound
from helios.names import RepoId, check_revision
from helios.registry_answers import Fetch
from heliosfs.store.objects import ObjectStore
from registry.catalog import Catalog
from registry.levels.shared import SharedFetches
from registry.metadata import levels as tables
from registry.mirror.mirror import Mirror
from registry.mirror.policy import rule_for
from registry.pull.listing import Snapshot, choose, decode_listing


class Bytes(msgspec.Struct):
    """Bytes of objects: ``stored`` of all that are needed, ``front`` of those on the fast disk (None: there is none),
    ``waiting`` of those that only it has. ``memory``: whether the names are in memory."""

    stored: int = 0
    front: int | None = None
    waiting: int = 0
    memory: bool = False


class Place(msgspec.Struct):
    """Where a revision is. ``state``: ``here``, ``partial``, ``upstream``, ``nowhere``, or ``unknown`` where the
    upstream can't be asked; ``bytes`` of its files, ``held`` of those of them that are stored."""

    repo: str
    rev: str
    state: str
    commit: str | None = None
    bytes: int | None = None
    held: int = 0
    levels: Bytes | None = None
    reason: str | None = None
    fetch: Fetch | None = None


class Levels:
    """Of one registry. Blocking but for ``where``; threads may share it."""

    def __init__(
        self, settings: RegistrySettings, catalog: Catalog, store: ObjectStore, mirror: Mirror, fetches: SharedFetches
    ) -> None:
        self._settings, self._catalog, self._store, self._mirror = settings, catalog, store, mirror
        self._fetches = fetches

    async def where(self, repo: RepoId, rev: str, *, own_token: bool) -> Place:
        """Where a revision is; the upstream is asked, for some seconds, only where nothing is known here.

        ``own_token``: it is asked as the registry, not as anybody.
        """
        place = await asyncio.to_thread(self._known, repo, check_revision(rev))
        if place is None:
            place = await self._ask(repo, rev, own_token=own_token)
        self._tell(place, self._fetches.find(repo, rev))
        return place

    def fetch(self, repo: RepoId, rev: str) -> Place:
        """The same, and have it brought here if it is not; the upstream is asked in the background."""
        place = self._known(repo, check_revision(rev)) or Place(str(repo), rev, "unknown")
        if place.state != "here":
            if self._is_local(repo, rev):
                place.state, place.reason = "nowhere", _LOCAL
                return place
            fetch = self._fetches.start(repo, rev)
            # It may have ended in between, and then it is here.
            if fetch.state == "done":
                place = self._known(repo, rev) or place
            self._tell(place, fetch)
        return place

    def all(self) -> list[dict[str, Any]]:
        """Every repository that something is known of, sorted."""
        found: dict[str, Bytes] = {}
        with self._catalog.database.read() as connection:
            for name, key, size in tables.objects_by_repository(connection):
                self._add(found.setdefault(name, self._none()), key, size)
            unpublished = tables.unpublished(connection)
        out = []
        for info in self._catalog.repos():
            levels = found.get(str(info.repo)) or self._none()
            levels.memory = any(self._catalog.resolved_now(info.repo, ref) is not None for ref in info.refs)
            out.append(_row(str(info.repo), "here", None, info.bytes, levels))
        for name, commit, listing in unpublished:
            place = self._mirrored(RepoId.from_canonical(name), commit, decode_listing(listing))
            out.append(_row(name, place.state, commit, place.bytes, place.levels))
        return sorted(out, key=lambda row: (row["repo"], row["commit"] or ""))

    # --- one revision ---

    def _known(self, repo: RepoId, rev: str) -> Place | None:
        memory = self._catalog.resolved_now(repo, rev) is not None
        try:
            resolved = self._catalog.resolve(repo, rev)
        except (RepoNotFound, RevisionNotFound):
            commit = self._mirror.commit_of(repo, rev) or rev
            found = self._mirror.snapshot(repo, commit)
            if found is None:
                return None
            place = self._mirrored(repo, commit, found.snapshot)
            place.rev = rev
            return place
        files = {e.sha256: e.size for e in self._catalog.contents.manifest(repo, resolved.commit).files.values()}
        size = sum(files.values())
        levels = self._levels(repo, files)
        levels.memory = memory
        return Place(str(repo), rev, "here", resolved.commit, size, size, levels)

    def _mirrored(self, repo: RepoId, commit: str, snapshot: Snapshot) -> Place:
        """A commit of which the listing is known."""
        wanted, _ = choose(snapshot.files)
        held = {file.path: self._mirror.state.stored(repo, file) for file in wanted}
        levels = self._levels(repo, [sha256 for sha256 in held.values() if sha256])
        here = sum(file.size for file in wanted if held[file.path])
        state = "partial" if here else "upstream"
        return Place(str(repo), commit, state, commit, sum(file.size for file in wanted), here, levels)

    async def _ask(self, repo: RepoId, rev: str, *, own_token: bool) -> Place:
        place = Place(str(repo), rev, "unknown")
        if self._is_local(repo, rev):
            place.state, place.reason = "nowhere", _LOCAL
            return place
        try:
            snapshot = await self._mirror.look(repo, rev, own_token=own_token)
        except NotFound as error:
            place.state, place.reason = "nowhere", error.message
        except HeliosError as error:
            place.reason = error.message
        else:
            wanted, _ = choose(snapshot.files)
            place.state, place.commit = "upstream", snapshot.commit
            place.bytes = sum(file.size for file in wanted)
        return place

    def _is_local(self, repo: RepoId, rev: str) -> bool:
        return rule_for(self._settings.mirror_rules, repo, rev).policy == "local"

    def _tell(self, place: Place, fetch: Fetch | None) -> None:
        """What became of a fetch. That the upstream has no such revision is no failure: it is nowhere."""
        if fetch is None or (place.state == "here" and fetch.state != "running"):
            return
        if place.state in ("unknown", "nowhere") and fetch.error is not None and fetch.error.code in _NOWHERE:
            place.state, place.reason = "nowhere", fetch.error.message
        else:
            place.fetch = fetch

    # --- bytes ---

    def _levels(self, repo: RepoId, digests: Iterable[str]) -> Bytes:
        out = self._none()
        with self._catalog.database.read() as connection:
            domain = self._catalog.domain_of(repo)
            for key, size in tables.objects_of_blobs(connection, domain, set(digests)).items():
                self._add(out, key, size)
        return out

    def _none(self) -> Bytes:
        return Bytes(front=0 if self._settings.front else None)

    def _add(self, to: Bytes, key: str, size: int) -> None:
        to.stored += size
        if to.front is not None and self._store.near(key):
            to.front += size
        if self._store.waits(key):
            to.waiting += size


_NOWHERE = {kind.code for kind in (NotFound, RepoNotFound, RevisionNotFound, EntryNotFound)}
_LOCAL = "it is not here, and a rule says that the upstream is not asked for it (registry.mirror_rules)"


def _row(repo: str, state: str, commit: str | None, size: int | None, levels: Bytes | None) -> dict[str, Any]:
    return {"repo": repo, "state": state, "commit": commit, "bytes": size, "levels": levels}
