"""The Hub's read calls as routes: parse, look up in a thread, answer."""

from __future__ import annotations

import asyncio
import json
import logging
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from helios.errors import HeliosError, IntegrityError, InvalidInput, NotFound
from helios.http.server import FilePartsResponse
from helios.metrics import RegistryMetrics
from registry.catalog import Catalog
from registry.counted import Counted
from registry.hub.answers import error_answer, etag_of, file_headers, link_next, refusal, with_warning
from registry.hub.conditions import decide
from registry.hub.lookup import Found, Lookup
from registry.hub.paths import HubCall, parse
from registry.hub.verified import VerifiedReader, Wanted
from registry.mirror.mirror import FOLLOWED, Mirror
from registry.xet.routes import XetService

log = logging.getLogger("helios.registry.hub")

PAGE: Final = 1000
"""Entries of a tree, and repositories of a list, in one answer: the default and the most."""
COMMITS_PAGE: Final = 50
MAX_BODY: Final = 8 << 20
"""Longest body of paths-info in bytes."""

Handler = Callable[[Request, Sequence[HubCall]], Awaitable[Any]]


class HubRoute(BaseRoute):
    """Every path that is a call of the Hub's API; put it last, it looks at what nobody else took."""

    def __init__(
        self,
        catalog: Catalog,
        reader: VerifiedReader,
        mirror: Mirror,
        xet: XetService,
        metrics: RegistryMetrics,
    ) -> None:
        self._lookup = Lookup(catalog, mirror, xet.layouts)
        self._reader, self._mirror, self._xet, self._metrics = reader, mirror, xet, metrics
        self._handlers: dict[str, tuple[tuple[str, ...], Handler]] = {
            "info": (("GET", "HEAD"), self._info),
            "tree": (("GET", "HEAD"), self._tree),
            "paths-info": (("POST",), self._paths_info),
            "refs": (("GET", "HEAD"), self._refs),
            "commits": (("GET", "HEAD"), self._commits),
            "resolve": (("GET", "HEAD"), self._resolve),
            "list": (("GET", "HEAD"), self._list),
            "whoami": (("GET", "HEAD"), self._whoami),
            "xet-read-token": (("GET",), self._xet_token),
        }

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return Match.NONE, {}
        raw = scope.get("raw_path") or quote(scope["path"]).encode()
        try:
            readings = parse(raw.decode("latin-1").partition("?")[0], scope.get("root_path", ""))
        except InvalidInput as error:
            return Match.FULL, {"helios.hub": error}
        return (Match.FULL, {"helios.hub": readings}) if readings else (Match.NONE, {})

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            readings = scope["helios.hub"]
            if isinstance(readings, InvalidInput):
                raise readings
            scope["route"] = _Label(f"/hub/{readings[0].verb}")
            methods, handler = self._handlers[readings[0].verb]
            if request.method in methods:
                calls = [call for call in readings if call.verb == readings[0].verb]
                if readings[0].verb in FOLLOWED:
                    warning = await self._mirror.prepare(calls, request.headers.get("authorization"))
                    send = with_warning(send, warning) if warning else send
                response = await handler(request, calls)
            else:
                response = refusal(
                    405, "the Hub API here is read-only: publish with `helios push`", {"allow": ", ".join(methods)}
                )
            await response(scope, receive, send)
        except HeliosError as problem:
            error = problem
            if type(problem) is NotFound:  # no repository, revision or path, but an object that should be there
                error = IntegrityError(f"the registry's store has a gap: {problem.message}")
                log.error("the store has a gap", extra={"path": scope["path"], "error": problem.message})
            # Before the head: a body that fails later is cut off by the response itself.
            await error_answer(error)(scope, receive, send)

    async def _info(self, request: Request, readings: Sequence[HubCall]) -> Response:
        query = request.query_params
        found = await asyncio.to_thread(
            self._lookup.info, readings, blobs=_flag(query.get("blobs")), security=_flag(query.get("securityStatus"))
        )
        return JSONResponse(found)

    async def _tree(self, request: Request, readings: Sequence[HubCall]) -> Response:
        query = request.query_params
        limit = _number(query.get("limit"), "limit", PAGE, 1, PAGE)
        recursive, expand = _flag(query.get("recursive")), _flag(query.get("expand"))
        after = _uncursor(query.get("cursor"))
        found, items, following = await asyncio.to_thread(
            self._lookup.listing, readings, recursive=recursive, expand=expand, after=after, limit=limit
        )
        headers = {"x-repo-commit": found.commit}
        if following is not None:
            # The commit stands for the ref, so that all pages show one snapshot even if the ref moves meanwhile.
            below = found.call.path.strip("/")
            path = _api_path(found, "tree", found.commit) + (f"/{quote(below)}" if below else "")
            kept = {"recursive": _word(recursive), "expand": _word(expand), "limit": limit}
            headers |= link_next(request.scope, path, {**kept, "cursor": _cursor(following)})
        return JSONResponse(items, headers=headers)

    async def _paths_info(self, request: Request, readings: Sequence[HubCall]) -> Response:
        paths, expand = _wanted_paths(await _body(request), request.headers.get("content-type", ""))
        return JSONResponse(await asyncio.to_thread(self._lookup.paths, readings, paths, expand=expand))

    async def _refs(self, request: Request, readings: Sequence[HubCall]) -> Response:
        include_prs = _flag(request.query_params.get("include_prs"))
        return JSONResponse(await asyncio.to_thread(self._lookup.refs, readings, include_prs=include_prs))

    async def _commits(self, request: Request, readings: Sequence[HubCall]) -> Response:
        query = request.query_params
        limit = _number(query.get("limit"), "limit", COMMITS_PAGE, 1, COMMITS_PAGE)
        page = _number(query.get("p"), "p", 0, 0, 10_000)
        found, items, more = await asyncio.to_thread(self._lookup.commits, readings, skip=page * limit, limit=limit)
        headers = {}
        if more:
            path = _api_path(found, "commits", found.commit)
            headers = link_next(request.scope, path, {"limit": limit, "p": page + 1})
        return JSONResponse(items, headers=headers)

    async def _resolve(self, request: Request, readings: Sequence[HubCall]) -> Any:
        get = request.method == "GET"
        now = None if get else self._lookup.file_now(readings)
        if now is None:
            now = await asyncio.to_thread(self._lookup.file, readings, bytes_too=get)
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
            authorization = request.headers.get("authorization")
            flight, placed = await self._mirror.fetch(found.mirrored, found.call.path, authorization)
        wanted = Wanted(str(found.repo), found.commit, found.call.path)
        if placed is None:
            parts = self._mirror.stream(flight, answer.start, answer.stop, self._reader, wanted)
        else:
            parts = self._reader.parts(placed, answer.start, answer.stop, wanted)
        response = FilePartsResponse(parts, answer.stop - answer.start, answer.status, headers)
        return Counted(response, self._metrics.sent_bytes)

    async def _list(self, request: Request, readings: Sequence[HubCall]) -> Response:
        query = request.query_params
        limit = _number(query.get("limit"), "limit", PAGE, 1, PAGE)
        search, author, tags = query.get("search", ""), query.get("author", ""), query.getlist("filter")
        full = _flag(query.get("full"))
        items, following = await asyncio.to_thread(
            self._lookup.repos,
            readings[0].kind,
            search=search,
            author=author,
            tags=tags,
            full=full,
            after=_uncursor(query.get("cursor")),
            limit=limit,
        )
        headers = {}
        if following is not None:
            kept = [(k, v) for k, v in query.multi_items() if k != "cursor"]
            headers = link_next(request.scope, f"/api/{readings[0].kind}", [*kept, ("cursor", _cursor(following))])
        return JSONResponse(items, headers=headers)

    async def _xet_token(self, request: Request, readings: Sequence[HubCall]) -> Response:
        found = await asyncio.to_thread(self._lookup.find, readings)
        return self._xet.token(request.scope, found.repo)

    async def _whoami(self, request: Request, readings: Sequence[HubCall]) -> Response:
        return refusal(401, "Invalid username or password.")


class _Label:
    """What the request counts as in the metrics."""

    def __init__(self, path: str) -> None:
        self.path = path


def _api_path(found: Found, verb: str, revision: str) -> str:
    return f"/api/{found.repo.kind}/{found.repo.id}/{verb}/{revision}"


def _flag(text: str | None) -> bool:
    return (text or "").lower() in ("true", "1", "yes")


def _word(flag: bool) -> str:
    return "true" if flag else "false"


def _number(text: str | None, name: str, default: int, least: int, most: int) -> int:
    """A number in the query, cut to the most allowed."""
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise InvalidInput(f"{name}={text[:40]!r} is not a number from {least} on")
    return min(int(text), most)


def _cursor(after: str) -> str:
    return urlsafe_b64encode(after.encode()).decode()


def _uncursor(text: str | None) -> str:
    try:
        return b64decode(text or "", altchars="-_", validate=True).decode()
    except ValueError:
        raise InvalidInput("the cursor is not one that this registry gave") from None


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise InvalidInput(f"the body is longer than {MAX_BODY} bytes: ask for fewer paths at a time")
    return bytes(body)


def _wanted_paths(body: bytes, content_type: str) -> tuple[list[str], bool]:
    """Paths and ``expand`` from a form, as huggingface_hub sends it, or from JSON."""
    try:
        if content_type.partition(";")[0].strip().lower() == "application/json":
            data = json.loads(body)
            paths, expand = data["paths"], data.get("expand", False)
        else:
            fields = parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
            paths = [value for name, value in fields if name == "paths"]
            expand = _flag(dict(fields).get("expand"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"the body of paths-info is neither a form nor JSON with 'paths': {error!r}") from None
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InvalidInput("'paths' must be a list of texts")
    return paths, expand is True
