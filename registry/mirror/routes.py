"""``/api/v1/mirror``: which upstream refs are followed, and letting them move (docs/native-api.md)."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from helios.errors import InvalidInput
from helios.names import RepoId, check_ref, is_commit
from registry.api.support import Json, read_json
from registry.mirror.mirror import Mirror


class Approve(msgspec.Struct, forbid_unknown_fields=True):
    """``repo`` in its canonical form; ``commit`` is the one that waits."""

    repo: str
    ref: str
    commit: str


def routes(mirror: Mirror) -> list[BaseRoute]:
    async def listing(_request: Request) -> Response:
        found = await asyncio.to_thread(mirror.followed)
        refs = [
            {
                "repo": known.repository,
                "ref": known.ref,
                "commit": known.commit,
                "pending": known.pending,
                "checked": round(known.checked, 1),
                "policy": policy,
            }
            for known, policy in found
        ]
        return Json({"refs": refs})

    async def approve(request: Request) -> Response:
        wanted = await read_json(request, Approve)
        if not is_commit(wanted.commit):
            raise InvalidInput(f"{wanted.commit[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
        repo, ref = RepoId.from_canonical(wanted.repo), check_ref(wanted.ref)
        await asyncio.to_thread(mirror.approve, repo, ref, wanted.commit)
        return Json({"repo": str(repo), "ref": ref, "commit": wanted.commit})

    return [
        Route("/api/v1/mirror", listing, methods=["GET"]),
        Route("/api/v1/mirror/approve", approve, methods=["POST"]),
    ]
