"""The Hub API as one route: which call a path is, whose it is, which handler answers, and how errors look."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.routing import BaseRoute, Match, NoMatchFound, Route
from starlette.types import Message, Receive, Scope, Send

from helios.errors import HeliosError, IntegrityError, InvalidInput, NotFound
from helios.names import RepoId
from registry.access import PUBLIC, Access, Tenants, TokenMissing
from registry.hub.answers import error_answer, header_text, refusal
from registry.hub.asked import Asked, Handler, Handlers, repo_of
from registry.hub.paths import TENANTS, HubCall, parse, parse_tenant
from registry.shown import shown

log = logging.getLogger("helios.registry.hub")

Notice = Callable[[RepoId, str | None], str | None]
"""What a client should be warned of that asks for a revision of a repository: ``topic; message``, or None."""

Before = Callable[[Asked], Awaitable[str | None]]
"""What is done before a call is handled: brings here what it is about. Returns what the client is to be warned of."""

TICKETED: Final = frozenset({"lfs-object"})
"""Calls whose address itself is the permission, because clients send no token there."""

_KEY: Final = "helios.hub"


class HubRoute(BaseRoute):
    """Every path that is a call of the Hub's API; put it last, it looks at what nobody else took."""

    def __init__(
        self,
        tenants: Tenants,
        groups: Sequence[Handlers],
        notice: Notice | None = None,
        before: Before | None = None,
    ) -> None:
        self._tenants, self._notice, self._before = tenants, notice, before
        self._handlers: dict[str, dict[str, Handler]] = {}
        for group in groups:
            for verb, methods in group.items():
                self._handlers.setdefault(verb, {}).update(methods)

    def calls(self) -> set[tuple[str, str]]:
        """Verb and method of every call that is answered."""
        return {(verb, method) for verb, methods in self._handlers.items() for method in methods}

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return Match.NONE, {}
        raw = (scope.get("raw_path") or quote(scope["path"]).encode()).decode("latin-1").partition("?")[0]
        prefix = scope.get("root_path", "").rstrip("/")
        try:
            if (found := parse_tenant(raw, prefix)) is not None:
                tenant, readings = found
                return Match.FULL, {_KEY: (tenant, readings), "root_path": f"{prefix}/{TENANTS}/{tenant}"}
            readings = parse(raw, prefix)
        except InvalidInput as error:
            return Match.FULL, {_KEY: error}
        return (Match.FULL, {_KEY: (None, readings)}) if readings else (Match.NONE, {})

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response, warning = await self._answer(scope, receive, send)
            await response(scope, receive, send if warning is None else _warning(send, warning))
        except HeliosError as error:
            # Before the head: a body that fails later is cut off by the response itself.
            await error_answer(self._translate(error, scope))(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> tuple[Any, str | None]:
        matched = scope[_KEY]
        if isinstance(matched, InvalidInput):
            raise matched
        tenant, readings = matched
        verb, request = readings[0].verb, Request(scope, receive, send)
        scope["route"] = _Label(f"/hub/{verb}")
        access = PUBLIC if verb in TICKETED else self._access(tenant, readings[0], request)
        methods = self._handlers.get(verb, {})
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            return refusal(405, f"{verb} is not asked with {request.method}", {"allow": allowed}), None
        asked = Asked(request, _allowed([call for call in readings if call.verb == verb], access), access)
        warning = None if self._before is None else await self._before(asked)
        response = await handler(asked)
        return response, warning or self._notice_of(asked)

    def _access(self, tenant: str | None, call: HubCall, request: Request) -> Access:
        try:
            return self._tenants.caller(request.scope, tenant)
        except TokenMissing as error:
            # As the Hub answers for what may be private: clients then say that one should log in.
            raise TokenMissing(error.message, code="RepoNotFound" if call.id else None) from None

    def _notice_of(self, asked: Asked) -> str | None:
        if self._notice is None or not asked.call.id:
            return None
        return self._notice(asked.repo, asked.call.revision)

    def _translate(self, error: HeliosError, scope: Scope) -> HeliosError:
        where = {
            "path": shown(scope["path"]),
            "error": shown(error.message),
            "request": scope.get("helios.request"),
        }
        if type(error) is NotFound:  # no repository, revision or path, but an object that should be there
            log.error("the store has a gap", extra=where)
            return IntegrityError(f"the registry's store has a gap: {error.message}")
        if error.status >= 500:
            log.warning("request failed", extra=where)
        return error


class _TenantRoute(Route):
    """A route under tenants' prefixes; links in its answers are built from the one that it was asked under."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is Match.FULL:
            child["root_path"] = f"{scope.get('root_path', '')}/{TENANTS}/{child['path_params']['tenant']}"
        return match, child


def under_tenants(routes: Sequence[Route]) -> list[BaseRoute]:
    """The routes, and again under every tenant's prefix: what stands in front of us may pass on nothing else.

    Who a call is from is its own business: calls of the native API ask for the tenant's token (registry/api/support),
    those that bring a grant of ours don't.
    """
    prefix = f"/{TENANTS}/{{tenant}}"
    again = [_TenantRoute(prefix + r.path, r.endpoint, methods=sorted(r.methods or ())) for r in routes]
    return [*routes, *again]


class _Label:
    """What the request counts as in the metrics."""

    def __init__(self, path: str) -> None:
        self.path = path


def _allowed(readings: list[HubCall], access: Access) -> list[HubCall]:
    """The readings whose repository the caller may know of; raises RepoNotFound when none is left."""
    left = [call for call in readings if not call.id or access.visible(repo_of(call))]
    if not left:
        access.check_visible(repo_of(readings[0]))
    return left


def _warning(send: Send, text: str) -> Send:
    """Sends with ``X-HF-Warning``, which huggingface_hub prints once a topic."""

    async def warning(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (b"x-hf-warning", header_text(text).encode("latin-1"))
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return warning
