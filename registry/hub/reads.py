"""The Hub's read calls: parse, look up in a thread, answer."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, urlsafe_b64encode
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from starlette.responses import JSONResponse, Response

from helios.errors import InvalidInput
from helios.http.server import FilePartsResponse
from helios.metrics import RegistryMetrics
from registry.addresses import Addresses
from registry.catalog import Catalog
from registry.counted import Counted
from registry.hub.answers import etag_of, file_headers, link_next, redirect, refusal, warned
from registry.hub.asked import Asked, Handlers, flag, number
from registry.hub.conditions import decide
from registry.hub.gate import for_upstream
from registry.hub.lists import Wanted as WantedRepos
from registry.hub.lookup import Found, Lookup
from registry.hub.preparing import Preparations
from registry.hub.shapes import changed_by, past_item
from registry.hub.verified import VerifiedReader, Wanted
from registry.mirror.mirror import Mirror
from registry.usage.telling import Told, nobody
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
        told: Told = nobody,
    ) -> None:
        """``told`` hears of what is sent."""
        self._lookup, self._mirror = Lookup(catalog, mirror, xet.layouts), mirror
        self._reader, self._metrics = reader, metrics
        self._xet, self._addresses, self._told = xet, addresses, told
        self._preparations = Preparations(mirror, xet.layouts)

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
        headers = {"x-repo-commit": found.commit} | (await self._changed(asked, found, items) if expand else {})
        if following is not None:
            # The commit stands for the ref, so that all pages show one snapshot even if the ref moves meanwhile.
            below = found.call.path.strip("/")
            path = _api_path(found, "tree", found.commit) + (f"/{quote(below)}" if below else "")
            kept = {"recursive": _word(recursive), "expand": _word(expand), "limit": limit}
            headers |= link_next(asked.request.scope, path, {**kept, "cursor": _cursor(following)})
        return JSONResponse(items, headers=headers)

    async def paths_info(self, asked: Asked) -> Response:
        paths, expand = _wanted_paths(await asked.body(), asked.request.headers.get("content-type", ""))
        found, items = await asyncio.to_thread(self._lookup.paths, asked.readings, paths, expand=expand)
        headers = await self._changed(asked, found, items) if expand else {}
        if len(items) == 1 and "xetHash" not in items[0]:  # HfFileSystem asks so for a file, and sends no HEAD
            headers |= warned(await self._preparations.warning(found, items[0]["path"], for_upstream(asked)))
        return JSONResponse(items, headers=headers)

    async def _changed(self, asked: Asked, found: Found, items: list[dict[str, Any]]) -> dict[str, str]:
        """Put into the items which commits an upstream says to have changed them last; returns headers that warn."""
        paths = [item["path"] for item in items]
        told, warning = await self._mirror.names.last_changes(found.repo, found.commit, paths, for_upstream(asked))
        for item in items:
            if item["path"] in told:
                item["lastCommit"] = changed_by(told[item["path"]])
        return warned(warning)

    async def refs(self, asked: Asked) -> Response:
        include_prs = flag(asked.query.get("include_prs"))
        repo = await asyncio.to_thread(self._lookup.repo, asked.readings)
        warning = await self._mirror.names.learn_refs(repo, for_upstream(asked), requests=include_prs)
        found = await asyncio.to_thread(self._lookup.refs, repo, include_prs=include_prs)
        return JSONResponse(found, headers=warned(warning))

    async def commits(self, asked: Asked) -> Response:
        limit = number(asked.query.get("limit"), "limit", COMMITS_PAGE, 1, COMMITS_PAGE)
        page = number(asked.query.get("p"), "p", 0, 0, 10_000)
        formatted = "formatted" in asked.all("expand")
        found = await asyncio.to_thread(self._lookup.find, asked.readings)
        told, warning = await self._mirror.names.history(found.repo, found.commit, page, limit, for_upstream(asked))
        if told is not None:
            items, more = [past_item(each, formatted=formatted) for each in told[0]], told[1]
        else:
            skip = page * limit
            items, more = await asyncio.to_thread(
                self._lookup.commits, found, skip=skip, limit=limit, formatted=formatted
            )
        headers = warned(warning)
        if more:
            kept: dict[str, Any] = {"limit": limit, "p": page + 1} | ({"expand[]": "formatted"} if formatted else {})
            headers |= link_next(asked.request.scope, _api_path(found, "commits", found.commit), kept)
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
            if file.xet is None:
                await self._preparations.wait_for(found, found.call.path, file.entry, for_upstream(asked))
            return Response(headers=dict([*headers, ("content-length", str(size))]))
        placed = file.placed
        if placed is None and found.mirrored is not None:
            flight, placed = await self._mirror.fetch(found.mirrored, found.call.path, for_upstream(asked))
        elif placed is not None and found.mirrored is not None:
            await self._mirror.admit_file(found.mirrored, found.call.path, placed)
        wanted = Wanted(str(found.repo), found.commit, found.call.path)
        told = partial(self._told, request.scope, wanted.repo, found.commit, reads=answer.start == 0)
        if placed is None:
            parts = self._mirror.stream(flight, answer.start, answer.stop, self._reader, wanted)
        elif (elsewhere := await asyncio.to_thread(self._addresses.of_blob, placed)) is not None:
            self._metrics.redirected.inc()
            told(count=answer.stop - answer.start)  # as far as we know
            return redirect(elsewhere, headers, file.entry)
        else:
            parts = self._reader.parts(placed, answer.start, answer.stop, wanted)
        response = FilePartsResponse(parts, answer.stop - answer.start, answer.status, headers)
        return Counted(response, self._metrics.sent_bytes, told=lambda sent: told(count=sent))

    async def xet_token(self, asked: Asked) -> Response:
        found = await asyncio.to_thread(self._lookup.find, asked.readings)
        return self._xet.token(asked.request.scope, found.repo, found.commit)

    async def safetensors(self, asked: Asked) -> Response:
        found = await asyncio.to_thread(self._lookup.find, asked.readings)
        if found.mirrored is not None and found.call.path in found.manifest.files:
            authorization = for_upstream(asked)
            told = await self._mirror.names.safetensors(found.repo, found.commit, found.call.path, authorization)
            if told is not None:
                return Response(told, media_type="application/json")
        return JSONResponse(await asyncio.to_thread(self._lookup.safetensors, found))

    async def lfs_files(self, asked: Asked) -> Response:
        return JSONResponse(await asyncio.to_thread(self._lookup.lfs_files, asked.readings))

    async def auth_check(self, asked: Asked) -> Response:
        """200 for a repository that the caller may read or, with ``/write``, write."""
        await asyncio.to_thread(self._lookup.repo, asked.readings)
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
            self._lookup.repos, asked.call.kind, asked.access, wanted, authorization=for_upstream(asked),
            after=_uncursor(asked.query.get("cursor")), limit=limit,
        )  # fmt: skip
        headers = {}
        if following is not None:
            kept = [(k, v) for k, v in asked.request.query_params.multi_items() if k != "cursor"]
            path = f"/api/{asked.call.kind}"
            headers = link_next(asked.request.scope, path, [*kept, ("cursor", _cursor(following))])
        return JSONResponse(items, headers=headers)

    async def whoami(self, asked: Asked) -> Response:
        """The tenant; outside any, whoever has a token of the registry's own. There are no accounts."""
        access = asked.access
        if access.tenant is None and access.label is None:
            return refusal(401, "Invalid username or password.")
        name = access.tenant or access.label or ("administrator" if access.admin else "node")
        token = {"displayName": access.label or name, "role": "write" if access.owns else "read"}
        return JSONResponse({
            "type": "user", "id": name, "name": name, "fullname": name, "isPro": False, "orgs": [],
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
