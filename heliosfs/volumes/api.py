"""The volumes' part of the control API (docs/control-api.md)."""

from __future__ import annotations

from typing import Any

import msgspec

from helios.errors import InvalidInput
from helios.names import RepoId
from heliosfs.routing import Page, Request, Route, json_page
from heliosfs.tree.source import Source
from heliosfs.volumes.record import MAIN, VolumeRecord
from heliosfs.volumes.service import Volumes

PATH = "/api/v1/volumes"


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a volume is to hold: ``repo`` is canonical text (``models/org/name``), ``model`` a Hub id (``org/name``).

    With ``commit`` it is this commit, whatever ``revision`` names now; the volume's cache shows it under that name.
    ``priority`` is the class of its blobs in the cache.
    """

    repo: str | None = None
    model: str | None = None
    revision: str = MAIN
    commit: str | None = None
    priority: str | None = None

    def repository(self) -> RepoId:
        """Raises InvalidInput."""
        if self.repo is not None and self.model is None:
            return RepoId.from_canonical(self.repo)
        if self.model is not None and self.repo is None:
            return RepoId.parse(self.model)
        raise InvalidInput('say what the volume holds: either "repo" (models/org/name) or "model" (org/name)')


def routes(volumes: Volumes, source: Source) -> list[Route]:
    """``source`` is where revisions are looked up."""

    async def create(request: Request) -> Page:
        wanted = request.json(Wanted)
        volume, repo = request.values["id"], wanted.repository()
        record, new = await volumes.create(
            volume, repo, wanted.revision, source, commit=wanted.commit, priority=wanted.priority
        )
        return json_page(_shown(record), 201 if new else 200)

    async def show(request: Request) -> Page:
        return json_page(_shown(volumes.get(request.values["id"])))

    async def listing(request: Request) -> Page:
        return json_page({"volumes": [_shown(record) for _, record in sorted(volumes.known().value.items())]})

    async def usage(request: Request) -> Page:
        return json_page(msgspec.to_builtins(await volumes.usage(request.values["id"])))

    async def delete(request: Request) -> Page:
        return json_page({"deleted": await volumes.delete(request.values["id"])})

    one = f"{PATH}/{{id}}"
    return [
        Route("GET", PATH, listing),
        Route("GET", one, show),
        Route("GET", f"{one}/usage", usage),
        Route("PUT", one, create),
        Route("DELETE", one, delete),
    ]


def _shown(record: VolumeRecord) -> dict[str, Any]:
    return msgspec.to_builtins(record)  # type: ignore[no-any-return]
