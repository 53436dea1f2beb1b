"""The control API of what a mount does in the background (docs/control-api.md): warming, verifying, draining."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helios.errors import InvalidInput
from heliosfs.blobs import BlobStore
from heliosfs.care import Care
from heliosfs.control.activity import Activity
from heliosfs.control.drain import Drain
from heliosfs.control.jobs import Job, Jobs, Work
from heliosfs.control.remembered import Remembered
from heliosfs.control.verify import VerifyWork
from heliosfs.control.warm import WarmWork
from heliosfs.routing import Page, Request, Route, json_page
from heliosfs.tiers.api import Named
from heliosfs.tree.source import Source
from heliosfs.volumes.service import find

PATH: Final = "/api/v1"
MAX_PATTERNS: Final = 1000


class Warm(Named, msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to warm: ``patterns`` are paths and patterns of a commit's files, all where there are none."""

    patterns: list[str] = []


class Verify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to verify; nothing given: everything."""

    repo: str | None = None
    model: str | None = None
    revision: str | None = None


def routes(
    store: BlobStore, care: Care, jobs: Jobs, drain: Drain, remembered: Remembered, activity: Activity, source: Source
) -> list[Route]:
    """``source`` is where revisions are looked up."""

    def shown(job: Job) -> dict[str, Any]:
        return job.document(jobs.now())

    async def started(work: Work) -> Page:
        known = {job.id for job in jobs.all()}
        job = jobs.start(work)
        await remembered.save()
        return json_page(shown(job), 200 if job.id in known else 201)

    async def warm(request: Request) -> Page:
        wanted = request.json(Warm)
        if len(wanted.patterns) > MAX_PATTERNS:
            raise InvalidInput(f"{len(wanted.patterns)} patterns are more than {MAX_PATTERNS}")
        snapshot = await find(wanted.repository(), wanted.revision, source)
        return await started(WarmWork(store, snapshot, wanted.revision, wanted.patterns))

    async def verify(request: Request) -> Page:
        wanted = request.json(Verify)
        if wanted == Verify():
            return await started(VerifyWork(store, care, None))
        named = Named(wanted.repo, wanted.model, wanted.revision or "main")
        snapshot = await find(named.repository(), named.revision, source)
        return await started(VerifyWork(store, care, snapshot))

    async def drained(request: Request) -> Page:
        if request.method == "POST":
            await drain.begin()
        elif request.method == "DELETE":
            drain.undo()
        if request.method != "GET":
            await remembered.save()
        return json_page(drain.document())

    async def now(request: Request) -> Page:
        return json_page(await activity.document())

    def of_kind(kind: str) -> list[Route]:
        async def listing(request: Request) -> Page:
            return json_page({"jobs": [shown(job) for job in jobs.all(kind)]})

        async def show(request: Request) -> Page:
            return json_page(shown(jobs.get(kind, request.values["id"])))

        async def cancel(request: Request) -> Page:
            job = jobs.get(kind, request.values["id"])
            await jobs.cancel(job)
            return json_page(shown(job))

        return [
            Route("GET", f"{PATH}/{kind}", listing),
            Route("GET", f"{PATH}/{kind}/{{id}}", show),
            Route("DELETE", f"{PATH}/{kind}/{{id}}", cancel),
        ]

    return [
        Route("POST", f"{PATH}/warm", warm),
        Route("POST", f"{PATH}/verify", verify),
        *of_kind("warm"),
        *of_kind("verify"),
        *(Route(method, f"{PATH}/drain", drained) for method in ("GET", "POST", "DELETE")),
        Route("GET", f"{PATH}/activity", now),
    ]
