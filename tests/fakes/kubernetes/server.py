"""The API server over HTTP: which request means what, lists, watches, and what goes wrong with them.

Faults of all requests: ``faults``. Faults of watches: ``cut`` (end every watch's connection amid a chunk), ``mute``
(they stay open and say nothing), ``drip`` (bytes, never a line, and no end), ``end`` (end them cleanly), ``compact``
(410, inside the stream or, with ``gone_as_status``, as the answer's status), ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.fakes.kubernetes import patches, scaling
from tests.fakes.kubernetes.cluster import Cluster
from tests.fakes.kubernetes.custom import Served
from tests.fakes.kubernetes.errors import Refusal
from tests.fakes.kubernetes.faults import Call, Cut, Faults
from tests.fakes.kubernetes.store import Manifest
from tests.fakes.kubernetes.watching import Fits, line, seen_as, selector

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>status|scale))?"
)
QUERY = {
    "list": {"labelSelector", "limit", "continue"},
    "watch": {"labelSelector", "watch", "allowWatchBookmarks", "resourceVersion", "timeoutSeconds"},
    "get": set(),
    "apply": {"fieldManager", "force", "fieldValidation", "dryRun"},
    "delete": {"gracePeriodSeconds", "propagationPolicy"},
}
WRITE_QUERY = {"fieldManager", "fieldValidation", "dryRun"}
PATCHES = {
    "application/apply-patch+yaml": "apply",
    "application/merge-patch+json": "merge",
    "application/json-patch+json": "json",
}
YES = ("true", "True", "1")


class ApiServer:
    """One on loopback between ``open`` and ``close``."""

    def __init__(self, token: str = "secret", *, bookmark_s: float = 0.05, collect_s: float = 0.02) -> None:
        self.token, self.bookmark_s, self._collect_s = token, bookmark_s, collect_s
        self.cluster, self.faults = Cluster(), Faults()
        self.users: dict[str, str] = {}
        """Further tokens -> whose they are."""
        self.complaints: list[str] = []
        self.lists = self.watches = 0
        self.asked: Counter[tuple[str, str]] = Counter()
        """Kind and verb -> requests that came, whatever became of them."""
        self.calls: list[Call] | None = None
        """Every request, if somebody wants to know."""
        self.gone_as_status = self.mute = self.drip = False
        self.page_most, self.url = 1000, ""
        self.performing: Callable[[Call], None] = lambda call: None
        """Told of each request but watches in the moment in which it is performed."""
        self.before_page: Callable[[dict[str, str]], None] = lambda query: None
        self._open: set[Any] = set()
        self._runner: web.AppRunner | None = None
        self._collector: asyncio.Task[None] | None = None
        self._ends = self._port = 0

    # --- what the cluster does ---

    def put(self, plural: str, one: Manifest) -> Manifest:
        """Create or replace an object as it is, past all admission: what kubelets and controllers would write."""
        served = self.served(plural)
        one = {**one, "apiVersion": served.kind.api_version, "kind": served.kind.kind, "metadata": {**one["metadata"]}}
        if served.kind.namespaced:
            one["metadata"].setdefault("namespace", "ns")
        return self.cluster.store.put(served.kind.resource, one)

    def delete(self, plural: str, name: str, namespace: str = "ns") -> None:
        """Take an object away at once."""
        kind = self.served(plural).kind
        self.cluster.store.remove((kind.resource, namespace if kind.namespaced else "", name))

    def all(self, plural: str, namespace: str | None = None) -> list[Manifest]:
        """The objects of a kind, by place."""
        resource = self.served(plural).kind.resource
        there = self.cluster.store.objects.items()
        found = {key: one for key, one in there if key[0] == resource and namespace in (None, key[1])}
        return [found[key] for key in sorted(found)]

    def served(self, plural: str) -> Served:
        """The kind of this plural."""
        return next(one for one in self.cluster.kinds.values() if plural in (one.kind.plural, one.kind.resource))

    @property
    def writes(self) -> Counter[tuple[str, str]]:
        """Kind and verb -> writes that came, but those of leases."""
        verbs = ("create", "update", "patch", "apply", "delete")
        return Counter({key: n for key, n in self.asked.items() if key[1] in verbs and key[0] != "Lease"})

    # --- faults ---

    def compact(self) -> None:
        """Forget every version before the present one."""
        self.cluster.store.compact()

    @property
    def refuse(self) -> list[int]:
        return self.faults.refuse

    @refuse.setter
    def refuse(self, codes: list[int]) -> None:
        self.faults.refuse = codes

    def cut(self) -> None:
        for transport in list(self._open):
            transport.write(b'ffff\r\n{"type": "MOD')
            transport.close()

    def end(self) -> None:
        self._ends += 1
        self.cluster.store.wake()

    async def open(self) -> None:
        app = web.Application(client_max_size=4 << 20)
        app.router.add_route("*", "/{path:.*}", self._guarded)
        quiet = logging.Logger("fake", logging.CRITICAL + 1)  # aiohttp complains of connections that are torn
        # A request whose sender has gone is not performed any more.
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, logger=quiet, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._collector = asyncio.create_task(self._collect())

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        if self._collector is not None:
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector
        for transport in list(self._open):
            transport.abort()
        await runner.cleanup()

    async def _collect(self) -> None:
        """The garbage collector, which comes a little later."""
        seen = -1
        while True:
            await asyncio.sleep(self._collect_s)
            if seen != self.cluster.store.version:
                while self.cluster.collect():
                    pass
                seen = self.cluster.store.version

    # --- answers ---

    async def _guarded(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._handle(request)
        except Refusal as refusal:
            headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
            return web.json_response(refusal.body(), status=refusal.status, headers=headers)
        except Cut:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError from None
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            self.complaints.append(f"{request.path_qs}: {error!r}")
            raise

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        found = PATH.fullmatch(request.path)
        served = None
        if found is not None:
            served = self.cluster.kinds.get((found["group"] or "", found["version"], found["plural"]))
        if served is None or found is None:
            return web.Response(text="404 page not found\n", status=404)  # as for a group that is not installed
        users = {f"Bearer {self.token}": "", **{f"Bearer {token}": name for token, name in self.users.items()}}
        user = users.get(request.headers.get("authorization", ""))
        if user is None:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        call = await self._meant(request, served, found["namespace"] or "", found["name"] or "", found["sub"] or "")
        call = dataclasses.replace(call, user=user)
        self.asked[call.kind, call.verb] += 1
        if self.calls is not None:
            self.calls.append(call)
        fault = await self.faults.before(call)
        if call.verb == "watch":
            return await self._watch(request, served, call)
        self.performing(call)
        answer = self._perform(call, served, PATCHES.get(request.content_type, ""))
        if fault is not None and fault.lost:
            raise Cut
        return web.json_response(answer, status=201 if call.verb == "create" else 200)

    async def _meant(self, request: web.Request, served: Served, namespace: str, name: str, sub: str) -> Call:
        query = dict(request.query)
        content = await request.read() if request.method != "GET" else b""
        if PATCHES.get(request.content_type) == "apply":
            patches.yaml_like(content)
        body = json.loads(content or b"null")
        if request.method == "GET" and not name:
            verb = "watch" if query.get("watch") in YES else "list"
        else:
            verbs = {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete", "PATCH": "patch"}
            verb = verbs[request.method]
        if verb == "patch" and PATCHES.get(request.content_type) == "apply":
            verb = "apply"
        if unknown := set(query) - QUERY.get(verb, WRITE_QUERY):
            self.complaints.append(f"a {verb} with {sorted(unknown)}")
            raise Refusal(400, "BadRequest", f"unknown {unknown}")
        if verb == "patch" and request.content_type not in PATCHES:
            raise Refusal(415, "UnsupportedMediaType", request.content_type)
        if sub and ((sub == "status" and not served.status) or (sub == "scale" and served.scale is None)):
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        return Call(verb, served.kind.kind, namespace, name, sub, query, body)

    def _perform(self, call: Call, served: Served, how: str) -> Manifest:
        cluster, query = self.cluster, call.query
        options: dict[str, Any] = {
            "manager": query.get("fieldManager") or "unknown", "strict": query.get("fieldValidation") == "Strict",
        }  # fmt: skip
        where = served, call.namespace, call.name
        if call.verb == "list":
            return self._list(served, call.namespace, selector(query.get("labelSelector", "")), query)
        if call.subresource == "scale":
            return scaling.perform(cluster, call, served, how, options)
        if call.verb == "get":
            return cluster.get(served.kind, call.namespace, call.name)
        if call.verb == "create":
            return cluster.create(served, call.namespace, call.body, **options)
        if call.verb == "delete":
            return cluster.delete(*where, (call.body or {}) | {"asked": query})
        options["subresource"] = call.subresource
        if call.verb == "update":
            return cluster.replace(*where, call.body, **options)
        if call.verb == "apply":
            if "fieldManager" not in query:
                raise Refusal(400, "BadRequest", "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
            return cluster.apply(*where, call.body, force=query.get("force") in YES, **options)
        return cluster.patch(*where, call.body, how, **options)

    def _list(self, served: Served, namespace: str, fits: Fits, query: dict[str, str]) -> Manifest:
        self.lists += 1
        self.before_page(query)
        store, kind = self.cluster.store, served.kind
        start, version = ["", ""], store.version
        if token := query.get("continue"):
            version, start = json.loads(token)
            if version < store.compacted:
                raise Refusal(410, "Expired", "The provided continue parameter is too old")
        found = {
            place[1:]: one for place, one in store.at(version).items()
            if place[0] == kind.resource and namespace in ("", place[1]) and fits(one)
        }  # fmt: skip
        rest = [(list(key), found[key]) for key in sorted(found) if list(key) > start]
        limit = min(int(query.get("limit", "0")) or len(rest), self.page_most)
        metadata: Manifest = {"resourceVersion": str(version)}
        if len(rest) > limit:
            metadata |= {"continue": json.dumps([version, rest[limit - 1][0]]), "remainingItemCount": len(rest) - limit}
        bare = [{k: v for k, v in one.items() if k not in ("apiVersion", "kind")} for _, one in rest[:limit]]
        items = bare or None  # an empty list is null, as Go writes it; items of typed lists have no kind
        return {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}

    async def _watch(self, request: web.Request, served: Served, call: Call) -> web.StreamResponse:
        self.watches += 1
        query, store, kind = call.query, self.cluster.store, served.kind
        if not query.get("resourceVersion", "").isdigit():
            self.complaints.append("a watch without a version")
            raise Refusal(400, "BadRequest", "no version")
        seen = int(query["resourceVersion"])
        if seen > store.version:
            self.complaints.append(f"a watch from the version {seen}, which is not there yet")
            raise Refusal(504, "Timeout", "Too large resource version")
        gone = Refusal(410, "Expired", f"too old resource version: {seen}")
        if seen < store.compacted and self.gone_as_status:
            raise gone
        fits = selector(query.get("labelSelector", ""))
        answer = web.StreamResponse(headers={"content-type": "application/json"})
        await answer.prepare(request)
        transport = request.transport
        self._open.add(transport)
        until, ends = time.monotonic() + int(query.get("timeoutSeconds", "1800")), self._ends
        mark_at = time.monotonic() + self.bookmark_s
        try:
            while (time.monotonic() < until or self.drip) and ends == self._ends:
                changed = store.changed
                if self.drip:
                    await answer.write(b" ")
                elif not self.mute:
                    if seen < store.compacted:
                        await answer.write(line("ERROR", gone.body()))
                        return answer
                    for change in store.since(seen):
                        seen = change.version
                        if (event := seen_as(change, kind.resource, call.namespace, fits)) is not None:
                            # In two pieces: a line is no unit of TCP.
                            await answer.write(event[:20])
                            await answer.write(event[20:])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, mark_at - time.monotonic())):
                        await changed.wait()
                if time.monotonic() >= mark_at:
                    mark_at = time.monotonic() + self.bookmark_s
                    if query.get("allowWatchBookmarks") in YES and not self.mute and not self.drip:
                        mark = {"kind": kind.kind, "apiVersion": kind.api_version}
                        await answer.write(line("BOOKMARK", mark | {"metadata": {"resourceVersion": str(seen)}}))
            await answer.write_eof()
        except ConnectionError:
            pass
        finally:
            self._open.discard(transport)
        return answer
