"""A Kubernetes API server for lists and watches, as far as discovery needs one, that checks what it is told.

It keeps objects with one counter of resource versions and a log of changes, as etcd does. Lists are paged at one
version; a watch gives every change after its version, bookmarks if asked for, and 410 for a version before the log's
beginning (``compact``), inside the stream or as the answer's status (``gone_as_status``). An object that stops fitting
a selector is ``DELETED`` for that watch. What a real API server would refuse is kept in ``complaints``.

Faults: ``refuse`` (a status for each of the next requests), ``cut`` (end every watch's connection amid a chunk),
``mute`` (watches stay open and say nothing), ``drip`` (bytes, never a line, and no end), ``end`` (end watches cleanly),
``close``.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import re
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TYPES = {
    ("/apis/discovery.k8s.io/v1", "endpointslices"): ("EndpointSlice", "discovery.k8s.io/v1"),
    ("/api/v1", "pods"): ("Pod", "v1"),
}
LIST = {"labelSelector", "limit", "continue"}
WATCH = {"labelSelector", "watch", "allowWatchBookmarks", "resourceVersion", "timeoutSeconds"}


@dataclass
class Change:
    version: int
    plural: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclass
class ApiServer:
    token: str = "secret"
    bookmark_s: float = 0.05
    version: int = 100
    compacted: int = 0
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    log: list[Change] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    lists: int = 0
    watches: int = 0
    refuse: list[int] = field(default_factory=list)
    gone_as_status: bool = False
    mute: bool = False
    drip: bool = False
    page_most: int = 1000
    url: str = ""
    _open: set[Any] = field(default_factory=set)
    _runner: Any = None
    _changed: Any = None
    _ends: int = 0
    _port: int = 0

    # --- what the cluster does ---

    def put(self, plural: str, one: dict[str, Any]) -> None:
        """Create or replace an object."""
        one = copy.deepcopy(one)
        key = plural, one["metadata"].setdefault("namespace", "ns"), one["metadata"]["name"]
        self._change(plural, key, one)

    def delete(self, plural: str, name: str, namespace: str = "ns") -> None:
        self._change(plural, (plural, namespace, name), None)

    def _change(self, plural: str, key: tuple[str, str, str], one: dict[str, Any] | None) -> None:
        self.version += 1
        before = self.objects.pop(key, None)
        if one is not None:
            one["metadata"]["resourceVersion"] = str(self.version)
            self.objects[key] = one
        self.log.append(Change(self.version, plural, before, one))
        self._wake()

    def compact(self) -> None:
        """Forget every version before the present one."""
        self.version += 1
        self.compacted, self.log = self.version, []

    # --- faults ---

    def cut(self) -> None:
        for transport in list(self._open):
            transport.write(b'ffff\r\n{"type": "MOD')
            transport.close()

    def end(self) -> None:
        self._ends += 1
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        if changed is not None:
            changed.set()

    async def open(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._guarded)
        self._changed = asyncio.Event()
        quiet = logging.Logger("fake", logging.CRITICAL + 1)  # aiohttp complains of connections that are torn
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, logger=quiet)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            for transport in list(self._open):
                transport.abort()
            await runner.cleanup()

    # --- answers ---

    async def _guarded(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._handle(request)
        except ConnectionError:
            raise
        except Exception as error:
            self.complaints.append(f"{request.path_qs}: {error!r}")
            raise

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        found = re.fullmatch(r"(/.*)/namespaces/([^/]+)/([a-z]+)", request.path)
        if found is None or (found[1], found[3]) not in TYPES:
            self.complaints.append(f"unknown path {request.path}")
            return status(404, "NotFound", request.path)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return status(401, "Unauthorized", "Unauthorized")
        if self.refuse:
            code = self.refuse.pop(0)
            return status(code, "Expired" if code == 410 else "InternalError", "as told")
        plural, namespace, query = found[3], found[2], dict(request.query)
        watching = query.get("watch") in ("true", "True", "1")
        if unknown := set(query) - (WATCH if watching else LIST):
            self.complaints.append(f"a {'watch' if watching else 'list'} with {sorted(unknown)}")
            return status(400, "BadRequest", f"unknown {unknown}")
        fits = selector(query.get("labelSelector", ""))
        if watching:
            return await self._watch(request, plural, namespace, fits, query)
        return self._list(plural, namespace, fits, query)

    def _list(self, plural: str, namespace: str, fits: Any, query: dict[str, str]) -> web.Response:
        self.lists += 1
        start, version = "", self.version
        if token := query.get("continue"):
            version, start = json.loads(token)
            if version < self.compacted:
                return status(410, "Expired", "The provided continue parameter is too old")
        kind, api = next(TYPES[key] for key in TYPES if key[1] == plural)
        there = dict(self.objects)
        for change in reversed([one for one in self.log if one.version > version]):  # back to the list's version
            one = change.after or change.before
            if one is not None:
                key = change.plural, one["metadata"]["namespace"], one["metadata"]["name"]
                there.pop(key, None)
                if change.before is not None:
                    there[key] = change.before
        found = {k[2]: one for k, one in there.items() if k[:2] == (plural, namespace) and fits(one)}
        rest = [(name, found[name]) for name in sorted(found) if name > start]
        limit = min(int(query.get("limit", "0")) or len(rest), self.page_most)
        metadata = {"resourceVersion": str(version)}
        if len(rest) > limit:
            metadata |= {"continue": json.dumps([version, rest[limit - 1][0]]), "remainingItemCount": len(rest) - limit}
        items = [one for _, one in rest[:limit]] or None  # an empty list is null, as Go writes it
        return web.json_response({"kind": f"{kind}List", "apiVersion": api, "metadata": metadata, "items": items})

    async def _watch(
        self, request: web.Request, plural: str, namespace: str, fits: Any, query: dict[str, str]
    ) -> web.StreamResponse:
        self.watches += 1
        if not query.get("resourceVersion", "").isdigit():
            self.complaints.append("a watch without a version")
            return status(400, "BadRequest", "no version")
        seen = int(query["resourceVersion"])
        if seen > self.version:
            self.complaints.append(f"a watch from the version {seen}, which is not there yet")
            return status(504, "Timeout", "Too large resource version")
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {seen}"}
        if seen < self.compacted and self.gone_as_status:
            return status(410, "Expired", gone["message"])
        answer = web.StreamResponse(headers={"content-type": "application/json"})
        await answer.prepare(request)
        transport = request.transport
        self._open.add(transport)
        until, ends = time.monotonic() + int(query.get("timeoutSeconds", "1800")), self._ends
        kind, api = next(TYPES[key] for key in TYPES if key[1] == plural)
        try:
            while (time.monotonic() < until or self.drip) and ends == self._ends:
                changed = self._changed
                if self.drip:
                    await answer.write(b" ")
                elif not self.mute:
                    if seen < self.compacted:
                        await answer.write(line("ERROR", gone))
                        return answer
                    for change in [one for one in self.log if one.version > seen]:
                        seen = change.version
                        if (event := seen_as(change, plural, namespace, fits)) is not None:
                            # In two pieces: a line is no unit of TCP.
                            await answer.write(event[:20])
                            await answer.write(event[20:])
                try:
                    async with asyncio.timeout(self.bookmark_s):
                        await changed.wait()
                except TimeoutError:
                    if query.get("allowWatchBookmarks") in ("true", "True") and not self.mute and not self.drip:
                        mark = {"kind": kind, "apiVersion": api, "metadata": {"resourceVersion": str(seen)}}
                        await answer.write(line("BOOKMARK", mark))
            await answer.write_eof()
        except ConnectionError:
            pass
        finally:
            self._open.discard(transport)
        return answer


def seen_as(change: Change, plural: str, namespace: str, fits: Any) -> bytes | None:
    """The event that a change is for a watch."""
    if change.plural != plural:
        return None
    before, after = (
        one if one is not None and one["metadata"]["namespace"] == namespace and fits(one) else None
        for one in (change.before, change.after)
    )
    if after is not None:
        return line("ADDED" if before is None else "MODIFIED", after)
    if before is None:
        return None
    last = copy.deepcopy(before)
    last["metadata"]["resourceVersion"] = str(change.version)
    return line("DELETED", last)


def line(kind: str, one: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": one}).encode() + b"\n"


def status(code: int, reason: str, message: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
    return web.json_response(body, status=code)


def selector(text: str) -> Any:
    """A label selector: ``a=b``, ``a==b``, ``a!=b``, ``a in (b,c)``, ``a``, ``!a``, with commas between."""
    terms = [term.strip() for term in re.findall(r"(?:[^,(]|\([^)]*\))+", text)]

    def fits(one: dict[str, Any]) -> bool:
        labels = one["metadata"].get("labels") or {}
        for term in terms:
            if found := re.fullmatch(r"(\S+)\s+in\s+\(([^)]*)\)", term):
                good = labels.get(found[1]) in [v.strip() for v in found[2].split(",")]
            elif found := re.fullmatch(r"([^=!]+)(!=|==?)([^=]*)", term):
                good = (labels.get(found[1]) == found[3]) != (found[2] == "!=")
            else:
                good = (term.lstrip("!") in labels) != term.startswith("!")
            if not good:
                return False
        return True

    return fits


def kubeconfig(server: ApiServer, token: str | None = None) -> str:
    """A kubeconfig that leads to the server."""
    return json.dumps(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {"token": token or server.token}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "ns"}}],
        }
    )  # fmt: skip


def pod(name: str, ip: str | None, *, ready: bool = True, ending: bool = False, **more: Any) -> dict[str, Any]:
    """A pod as the API server shows it, with ``labels`` and ``annotations``."""
    metadata: dict[str, Any] = {"name": name, "namespace": "ns", "uid": more.pop("uid", f"uid-{name}")}
    metadata |= {"labels": {"app": "vllm", **more.pop("labels", {})}, "annotations": more.pop("annotations", {})}
    if ending:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    conditions = [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}]
    return {
        "metadata": metadata,
        "spec": {"containers": [{"name": "v", "image": "i", "ports": [{"name": "http", "containerPort": 8000}]}]},
        "status": {"phase": "Running", "podIP": ip, "conditions": conditions},
    }


def endpoint(ip: str, pod_name: str | None, *, uid: str | None = None, **conditions: bool | None) -> dict[str, Any]:
    one: dict[str, Any] = {"addresses": [ip], "conditions": conditions, "nodeName": "n"}
    if pod_name is not None:
        one["targetRef"] = {"kind": "Pod", "namespace": "ns", "name": pod_name, "uid": uid or f"uid-{pod_name}"}
    return one


def endpoint_slice(name: str, endpoints: list[dict[str, Any]] | None, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "ns", "labels": {"app": "vllm", **more.pop("labels", {})}},
        "addressType": more.pop("family", "IPv4"),
        "endpoints": endpoints,
        "ports": more.pop("ports", [{"name": "http", "port": 8000, "protocol": "TCP"}]),
    }
