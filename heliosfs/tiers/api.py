"""The local tiers' part of the control API (docs/control-api.md): what it holds, what goes, what is pinned."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import trio

from helios.errors import InvalidInput
from helios.names import RepoId, check_revision
from heliosfs.routing import Page, Request, Route, json_page
from heliosfs.tiers.keeping import Pin
from heliosfs.tiers.policy import Disk, Entry
from heliosfs.tiers.tier import Tier
from heliosfs.tiers.tiers import Tiers
from heliosfs.tree.source import Source
from heliosfs.volumes.record import MAIN
from heliosfs.volumes.service import find

PATH: Final = "/api/v1"
MAX_ENTRIES: Final = 1000
"""Blobs, pins or refusals that one answer names."""


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model: ``repo`` is canonical text (``models/org/name``), ``model`` a Hub id (``org/name``)."""

    repo: str | None = None
    model: str | None = None
    revision: str = MAIN

    def repository(self) -> RepoId:
        """Raises InvalidInput."""
        check_revision(self.revision)
        if self.repo is not None and self.model is None:
            return RepoId.from_canonical(self.repo)
        if self.model is not None and self.repo is None:
            return RepoId.parse(self.model)
        raise InvalidInput('say which model: either "repo" (models/org/name) or "model" (org/name)')


class Which(Named, frozen=True, forbid_unknown_fields=True):
    """A model, and the class that it is to have."""

    priority: str = "pinned"


def routes(cache: Tiers, source: Source) -> list[Route]:
    """``source`` is where revisions are looked up."""

    async def show(request: Request) -> Page:
        disks = await trio.to_thread.run_sync(lambda: {tier.name: tier.disk() for tier in cache.all()})
        return json_page(_shown(cache, disks))

    async def evict(request: Request) -> Page:
        which = request.json(Which)
        snapshot = await find(which.repository(), which.revision, source)
        found = await cache.evict({entry.sha256 for entry in snapshot.files.values()})
        kept = dict(sorted(found.kept.items())[:MAX_ENTRIES])
        return json_page({"commit": snapshot.commit, "removed": found.removed, "freed": found.freed, "kept": kept})

    async def pin(request: Request) -> Page:
        which = request.json(Which)
        repo = which.repository()
        snapshot = await find(repo, which.revision, source)
        blobs = {entry.sha256 for entry in snapshot.files.values()}
        return json_page(_pin(await cache.pins.pin(str(repo), which.revision, snapshot.commit, blobs, which.priority)))

    async def unpin(request: Request) -> Page:
        which = request.json(Which)
        gone = await cache.pins.unpin(str(which.repository()), which.revision)
        return json_page({"unpinned": [_pin(pin) for pin in gone]})

    return [
        Route("GET", f"{PATH}/cache", show),
        Route("POST", f"{PATH}/evict", evict),
        Route("POST", f"{PATH}/pin", pin),
        Route("POST", f"{PATH}/unpin", unpin),
    ]


def _shown(cache: Tiers, disks: dict[str, Disk | None]) -> dict[str, Any]:
    held = [(tier, sha256, entry) for tier in cache.all() for sha256, entry in tier.policy.entries.items()]
    largest = sorted(held, key=lambda item: (-item[2].size, item[1]))[:MAX_ENTRIES]
    return {
        "tiers": [_tier(tier, disks[tier.name]) for tier in cache.all()],
        "entries": [_entry(cache, *item) for item in largest],
        "pins": [_pin(pin) for pin in cache.pins.all()[:MAX_ENTRIES]],
    }


def _tier(tier: Tier, disk: Disk | None) -> dict[str, Any]:
    policy = tier.policy
    return {
        "tier": tier.name,
        "directory": str(tier.root),
        "state": tier.health.state.value,
        "reason": tier.health.reason or None,
        "limit": policy.bounds.limit,
        "min_free": policy.bounds.min_free,
        "used": policy.used,
        "reserved": policy.reserved,
        "blobs": len(policy.entries),
        "disk": None if disk is None else {"free": disk.free, "total": disk.total},
    }


def _entry(cache: Tiers, tier: Tier, sha256: str, entry: Entry) -> dict[str, Any]:
    use = cache.history.uses.get(sha256)
    return {
        "sha256": sha256,
        "tier": tier.name,
        "whole": entry.whole,
        "size": entry.size,
        "bytes": entry.cost,
        "class": tier.policy.priority(sha256).name.lower(),
        "hits": use.hits if use else 0,
        "idle_s": round(cache.now() - use.last, 3) if use else None,
        "in_use": tier.policy.holds(sha256) > 0,
    }


def _pin(pin: Pin) -> dict[str, Any]:
    shown = {"repo": pin.repo, "revision": pin.revision, "commit": pin.commit, "class": pin.priority}
    return shown | {"blobs": len(pin.blobs)}
