"""The Hub's read calls: parse, look up in a thread, answer."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, urlsafe_b64encode
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from starlette.responses import JSONResponse, Response

from helios.errors import InvalidInput
from helios.http.server import FilePartsResponse
from helios.metrics import RegistryMetrics
from registry.addresses import Addresses
from registry.catalog import Catalog
from registry.counted import Counted
from registry.hub.answers import etag_of, file_headers, link_next, redirect, refusal
from registry.hub.asked import Asked, Handlers, flag, number
from registry.hub.conditions import decide
from registry.hub.lists import Wanted as WantedRepos
from registry.hub.lookup import Found, Lookup
from registry.hub.verified import VerifiedReader, Wanted
from registry.mirror.mirror import FOLLOWED, Mirror
from registry.xet.routes import XetService

PAGE: Final = 1000
"""Entries of a tree, and repositories of a list, in one answer: the default and the most."""
COMMITS_PAGE: Final = 50


class Reads:
    """Handlers of the calls that change nothing."""

    def __init__(
        self,
        catalog: Catalog,
        mirror: Mirror,
        reader: VerifiedReader,
        xet: XetService,
        metrics: RegistryMetrics,
        addresses: Addresses,
    ) -> None:
        self._lookup, self._mirror = Lookup(catalog, mirror, xet.layouts), mirror
        self._reader, self._metrics = reader, metrics
        self._xet, self._addresses = xet, addresses

    def handlers(self) -> Handlers:
        return {
            "info": {"GET": self.info},
            "tree": {"GET": self.tree},
            "paths-info": {"POST": self.paths_info},
            "refs": {"GET": self.refs},
            "commits": {"GET": self.commits},
            "resolve": {"GET": self.resolve},
            "xet-read-token": {"GET": self.xet_token},
            "safetensors-metadata": {"GET": self.safetensors},
            "lfs-files": {"GET": self.lfs_files},
            "auth-check": {"GET": self.auth_check},
            "list": {"GET": self.list},
            "whoami": {"GET": self.whoami},
        }

    async def before(self, asked: Asked) -> str | None:
        """Make what is asked for known, as far as the upstream has it; returns a warning for the client."""
        if asked.call.verb not in FOLLOWED:
            return None
        warning = await self._mirror.prepare(asked.readings, _for_upstream(asked))
        return None if warning is None else f"mirror; {warning}"

    async def info(self, asked: Asked) -> Response:
        blobs, security = flag(asked.query.get("blobs")), flag(asked.query.get("securityStatus"))
        expand = asked.all("expand")
        found = await asyncio.to_thread(
            self._lookup.info, asked.readings, blobs=blobs, security=security, expand=expand
        )
        return JSONResponse(found)

    async def tree(self, asked: Asked) -> Response:
        query = asked.query
        limit = number(query.get("limit"), "limit", PAGE, 1, PAGE)
        recursive, expand = flag(query.get("recursive")), flag(query.get("expand"))
        after = _uncursor(query.get("cursor"))
        found, items, following = await asyncio.to_thread(
            self._lookup.listing, asked.readings, recursive=recursive, expand=expand, after=after, limit=limit
        )
        headers = {"x-repo-commit": found.commit}
        if following is not None:
            # The commit stands for the ref, so that all pages show one snapshot even if the ref moves meanwhile.
            below = found.call.path.strip("/")
            path = _api_path(found, "tree", found.commit) + (f"/{quote(below)}" if below else "")
            kept = {"recursive": _word(recursive), "expand": _word(expand), "limit": limit}
            headers |= link_next(asked.request.scope, path, {**kept, "cursor": _cursor(following)})
        return JSONResponse(items, headers=headers)

    async def paths_info(self, asked: Asked) -> Response:
        paths, expand = _wanted_paths(await asked.body(), asked.request.headers.get("content-type", ""))
        return JSONResponse(await asyncio.to_thread(self._lookup.paths, asked.readings, paths, expand=expand))

    async def refs(self, asked: Asked) -> Response:
        include_prs = flag(asked.query.get("include_prs"))
        return JSONResponse(await asyncio.to_thread(self._lookup.refs, asked.readings, include_prs=include_prs))

    async def commits(self, asked: Asked) -> Response:
        limit = number(asked.query.get("limit"), "limit", COMMITS_PAGE, 1, COMMITS_PAGE)
        page = number(asked.query.get("p"), "p", 0, 0, 10_000)
        formatted = "formatted" in asked.all("expand")
        found, items, more = await asyncio.to_thread(
            self._lookup.commits, asked.readings, skip=page * limit, limit=limit, formatted=formatted
        )
        headers = {}
        if more:
            kept: dict[str, Any] = {"limit": limit, "p": page + 1} | ({"expand[]": "formatted"} if formatted else {})
            headers = link_next(asked.request.scope, _api_path(found, "commits", found.commit), kept)
        return JSONResponse(items, headers=headers)

    async def resolve(self, asked: Asked) -> Any:
        request = asked.request
        get = request.method == "GET"
        now = None if get else self._lookup.file_now(asked.readings)
        if now is None:
            now = await asyncio.to_thread(self._lookup.file, asked.readings, bytes_too=get)
        found, file = now
        size = file.entry.size
        headers = file_headers(found.call.path, file.entry, found.commit, found.call.revision or "")
        if file.xet is not None:
            headers += self._xet.links(request.scope, found.repo, found.commit, file.xet)
        # A HEAD asks about the whole file: only a GET has ranges (RFC 9110, 14.2).
        conditions = request.headers if get else {"if-none-match": request.headers.get("if-none-match", "")}
        answer = decide(conditions, etag_of(file.entry), size)
        headers += answer.headers(size)
        if answer.status in (304, 416):
            kept = {name: value for name, value in headers if name != "content-type"}
            return Response(status_code=answer.status, headers=kept)
        if not get:
            return Response(headers=dict([*headers, ("content-length", str(size))]))
        placed = file.placed
        if placed is None and found.mirrored is not None:
            flight, placed = await self._mirror.fetch(found.mirrored, found.call.path, _for_upstream(asked))
        wanted = Wanted(str(found.repo), found.commit, found.call.path)
        if placed is None:
            parts = self._mirror.stream(flight, answer.start, answer.stop, self._reader, wanted)
        elif (elsewhere := await asyncio.to_thread(self._addresses.of_blob, placed)) is not None:
            self._metrics.redirected.inc()
            return redirect(elsewhere, headers, file.entry)
        else:
            parts = self._reader.parts(placed, answer.start, answer.stop, wanted)
        response = FilePartsResponse(parts, answer.stop - answer.start, answer.status, headers)
        return Counted(response, self._metrics.sent_bytes)

    async def xet_token(self, asked: Asked) -> Response:
        found = await asyncio.to_thread(self._lookup.find, asked.readings)
        return self._xet.token(asked.request.scope, found.repo)

    async def safetensors(self, asked: Asked) -> Response:
        return JSONResponse(await asyncio.to_thread(self._lookup.safetensors, asked.readings))

    async def lfs_files(self, asked: Asked) -> Response:
        return JSONResponse(await asyncio.to_thread(self._lookup.lfs_files, asked.readings))

    async def auth_check(self, asked: Asked) -> Response:
        """200 for a repository that the caller may read or, with ``/write``, write."""
        await asyncio.to_thread(self._lookup.refs, asked.readings, include_prs=False)
        match asked.call.path:
            case "":
                pass
            case "write":
                asked.access.check_writable(asked.repo)
            case other:
                raise InvalidInput(f"auth-check/{other} is not a check: there is auth-check and auth-check/write")
        return JSONResponse({})

    async def list(self, asked: Asked) -> Response:
        limit = number(asked.query.get("limit"), "limit", PAGE, 1, PAGE)
        wanted = WantedRepos.read(asked.query, asked.all("filter"), asked.all("expand"))
        items, following = await asyncio.to_thread(
            self._lookup.repos, asked.call.kind, asked.access, wanted, after=_uncursor(asked.query.get("cursor")),
            limit=limit,
        )  # fmt: skip
        headers = {}
        if following is not None:
            kept = [(k, v) for k, v in asked.request.query_params.multi_items() if k != "cursor"]
            path = f"/api/{asked.call.kind}"
            headers = link_next(asked.request.scope, path, [*kept, ("cursor", _cursor(following))])
        return JSONResponse(items, headers=headers)

    async def whoami(self, asked: Asked) -> Response:
        tenant = asked.access.tenant
        if tenant is None:
            return refusal(401, "Invalid username or password.")
        token = {"displayName": asked.access.label or tenant, "role": "write" if asked.access.owns else "read"}
        return JSONResponse({
            "type": "user", "id": tenant, "name": tenant, "fullname": tenant, "isPro": False, "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        })  # fmt: skip


def _api_path(found: Found, verb: str, revision: str) -> str:
    return f"/api/{found.repo.kind}/{found.repo.id}/{verb}/{revision}"


def _word(flag: bool) -> str:
    return "true" if flag else "false"


def _cursor(after: str) -> str:
    return urlsafe_b64encode(after.encode()).decode()


def _uncursor(text: str | None) -> str:
    try:
        return b64decode(text or "", altchars="-_", validate=True).decode()
    except ValueError:
        raise InvalidInput("the cursor is not one that this registry gave") from None


def _wanted_paths(body: bytes, content_type: str) -> tuple[list[str], bool]:
    """Paths and ``expand`` from a form, as huggingface_hub sends it, or from JSON."""
    try:
        if content_type.partition(";")[0].strip().lower() == "application/json":
            data = json.loads(body)
            paths, expand = data["paths"], data.get("expand", False)
        else:
            fields = parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
            paths = [value for name, value in fields if name == "paths"]
            expand = flag(dict(fields).get("expand"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"the body of paths-info is neither a form nor JSON with 'paths': {error!r}") from None
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InvalidInput("'paths' must be a list of texts")
    return paths, expand is True


def _for_upstream(asked: Asked) -> str | None:
    """The caller's credentials, where they are for the upstream: a tenant's own tokens are nobody else's business."""
    return None if asked.access.label is not None else asked.request.headers.get("authorization")
