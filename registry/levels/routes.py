"""``/api/v1/where``: at which level a model is, and having it brought here (docs/native-api.md); ``/api/v1/fetches``:
what this process fetches, for the registry's other processes."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput, NotFound
from helios.names import RepoId, check_revision
from registry.api.support import Json, access, administration, listed, parameter, read_json, readable, writable
from registry.levels.levels import Levels
from registry.levels.shared import PATH, FetchGrant, SharedFetches
from registry.xet.tokens import Signer

NO_STORE = {"cache-control": "no-store"}


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``repo`` in its canonical form, ``models/org/name``; ``rev`` a branch, tag or commit."""

    repo: str
    rev: str = "main"


def routes(levels: Levels) -> list[Route]:
    async def where(request: Request) -> Response:
        """Everything, or one revision. Changes nothing."""
        if "repo" not in request.query_params:
            if "rev" in request.query_params:
                raise InvalidInput(
                    "rev names a revision, and no repository is named", hint="Add repo=, or leave it out."
                )
            seen = await listed(request)
            found = await asyncio.to_thread(levels.all)
            return Json({"models": [row for row in found if seen.shows(row["repo"])]}, headers=NO_STORE)
        rev = check_revision(parameter(request, "rev") if "rev" in request.query_params else "main")
        repo = await readable(request, parameter(request, "repo"))
        # The registry's own token opens what not everybody may know of.
        own = access(request).trusted
        return Json(await levels.where(repo, rev, own_token=own), headers=NO_STORE)

    async def fetch(request: Request) -> Response:
        """One revision; what is not here is brought in the background: 202 and when to ask again."""
        # As a pull does: what comes with the registry's own token may be read by everybody then.
        administration(request, "fetching with the registry's token")
        wanted = await read_json(request, Wanted)
        repo, rev = writable(request, wanted.repo), check_revision(wanted.rev)
        place = await asyncio.to_thread(levels.fetch, repo, rev)
        coming = place.fetch is not None and place.fetch.state == "running"
        headers = dict(NO_STORE)
        if place.fetch is not None and place.fetch.retry_after_s is not None:
            headers["retry-after"] = str(place.fetch.retry_after_s)
        return Json(place, status_code=202 if coming else 200, headers=headers)

    return [
        Route("/api/v1/where", where, methods=["GET"]),
        Route("/api/v1/where", fetch, methods=["POST"]),
    ]


def fetch_routes(fetches: SharedFetches, signer: Signer) -> list[BaseRoute]:
    """For the other processes, whose requests must be signed with the key that processes share."""

    def wanted(request: Request) -> tuple[RepoId, str]:
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        grant = signer.check(text.strip() if scheme.lower() == "bearer" else None, FetchGrant)
        if (grant.repo, grant.rev) != (parameter(request, "repo"), parameter(request, "rev")):
            raise InvalidInput("the access token is for another revision")
        return RepoId.from_canonical(grant.repo), check_revision(grant.rev)

    async def look(request: Request) -> Response:
        found = await asyncio.to_thread(fetches.find_here, *wanted(request))
        if found is None:
            raise NotFound("this process does not fetch that revision")
        return Json(found, headers=NO_STORE)

    async def start(request: Request) -> Response:
        return Json(await asyncio.to_thread(fetches.start_here, *wanted(request)), headers=NO_STORE)

    return [Route(PATH, look, methods=["GET"]), Route(PATH, start, methods=["POST"])]
