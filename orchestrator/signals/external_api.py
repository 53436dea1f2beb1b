"""``external.metrics.k8s.io/v1beta1``: metrics of services for autoscalers, behind the API server's aggregation layer.

| call | answer |
|---|---|
| ``GET /apis``, ``/apis/<group>``, ``/apis/<group>/v1beta1`` | APIGroupList, APIGroup, APIResourceList |
| ``GET /apis/<group>/v1beta1/namespaces/<namespace>/<metric>?labelSelector=`` | ExternalMetricValueList |
| ``GET /openapi/v2``, ``/openapi/v3`` | documents without a schema, which the API server asks for |
| ``GET /healthz``, ``/livez``, ``/readyz`` | 200 or 503, to everybody |

Errors are ``Status`` objects. A value that is not known is 503: an autoscaler leaves replicas as they are.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from helios.errors import HeliosError
from helios.http.front import Health
from helios.metrics import SignalsMetrics
from orchestrator.signals.front_proxy import FrontProxy
from orchestrator.signals.selectors import quantity, selected
from orchestrator.signals.values import Chosen, Values

GROUP: Final = "external.metrics.k8s.io"
VERSION: Final = "v1beta1"
API: Final = f"{GROUP}/{VERSION}"
REASONS: Final = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed",
    500: "InternalError", 503: "ServiceUnavailable",
}  # fmt: skip
"""What Kubernetes calls these statuses (k8s.io/apimachinery, pkg/apis/meta/v1, StatusReason)."""

Handler = Callable[[Request], Awaitable[Response]]


class ExternalApi:
    """The application. ``front_proxy``: who may ask, as it is now; ``now``: Unix seconds."""

    def __init__(
        self, values: Values, front_proxy: Callable[[], FrontProxy], health: Health, metrics: SignalsMetrics, *,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._values, self._front_proxy, self._health, self._metrics = values, front_proxy, health, metrics
        self._now = now
        routes = [
            Route("/healthz", self._live, methods=["GET"]),
            Route("/livez", self._live, methods=["GET"]),
            Route("/readyz", self._ready, methods=["GET"]),
            self._guarded("/apis", self._groups),
            self._guarded(f"/apis/{GROUP}", self._group),
            self._guarded(f"/apis/{API}", self._resources),
            self._guarded(f"/apis/{API}/namespaces/{{namespace}}/{{metric}}", self._metric),
            self._guarded("/openapi/v2", self._openapi_v2),
            self._guarded("/openapi/v3", self._openapi_v3),
        ]
        handlers: Any = {HeliosError: _failed, HTTPException: _refused, Exception: _broken}
        self.app = Starlette(routes=routes, exception_handlers=handlers)
        self.app.router.redirect_slashes = False

    def _guarded(self, path: str, handler: Handler) -> Route:
        async def guarded(request: Request) -> Response:
            self._front_proxy().demand(request.scope)
            return await handler(request)

        return Route(path, guarded, methods=["GET"])

    # --- values ---

    async def _metric(self, request: Request) -> Response:
        metric, namespace = request.path_params["metric"], request.path_params["namespace"]
        known = metric if metric in self._values.names else "unknown"
        try:
            labels = selected(request.query_params.get("labelSelector", ""))
            chosen = Chosen(namespace, labels["service"], labels.get("role", ""), labels.get("revision", ""))
            value = self._values.value(metric, chosen)
        except HeliosError as error:
            self._metrics.external_requests.labels(known, str(error.status)).inc()
            raise
        self._metrics.external_requests.labels(known, "200").inc()
        at = datetime.fromtimestamp(self._now(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        item = {"metricName": metric, "metricLabels": labels, "timestamp": at, "value": quantity(value)}
        return JSONResponse({"kind": "ExternalMetricValueList", "apiVersion": API, "metadata": {}, "items": [item]})

    # --- discovery ---

    async def _groups(self, request: Request) -> Response:
        return JSONResponse({"kind": "APIGroupList", "apiVersion": "v1", "groups": [_GROUP]})

    async def _group(self, request: Request) -> Response:
        return JSONResponse({"kind": "APIGroup", "apiVersion": "v1", **_GROUP})

    async def _resources(self, request: Request) -> Response:
        found = [
            {"name": name, "singularName": "", "namespaced": True, "kind": "ExternalMetricValueList", "verbs": ["get"]}
            for name in self._values.names
        ]
        return JSONResponse({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": API, "resources": found})

    async def _openapi_v2(self, request: Request) -> Response:
        about = {"title": "Helios external metrics", "version": version("helios-llm")}
        return JSONResponse({"swagger": "2.0", "info": about, "paths": {}})

    async def _openapi_v3(self, request: Request) -> Response:
        return JSONResponse({"paths": {}})

    # --- health ---

    async def _live(self, request: Request) -> Response:
        return _said(self._health.unlive)

    async def _ready(self, request: Request) -> Response:
        return _said(self._health.unready)


_GROUP: Final = {
    "name": GROUP,
    "versions": [{"groupVersion": API, "version": VERSION}],
    "preferredVersion": {"groupVersion": API, "version": VERSION},
}


def _said(why: str) -> Response:
    return PlainTextResponse(f"{why}\n" if why else "ok\n", 503 if why else 200)


def _status(code: int, message: str) -> Response:
    body = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": REASONS.get(code, "InternalError"), "code": code,
    }  # fmt: skip
    return JSONResponse(body, code, {"retry-after": "5"} if code == 503 else {})


async def _failed(request: Request, error: HeliosError) -> Response:
    return _status(error.status, str(error).replace("\n", " "))


async def _refused(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors: 404 and 405."""
    return _status(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")


async def _broken(request: Request, error: Exception) -> Response:
    return _status(500, "The operator failed; its log says how.")
