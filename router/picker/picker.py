"""What the picks of one process share: the relay with its workers and limits, and what a gateway calls a worker."""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING

import msgspec

from helios.metrics import RouterMetrics
from router import errors
from router.errors import ApiError
from router.picker.ledger import Ledger
from router.picker.pick import Pick
from router.picker.subset import Subset
from router.relay.headers import HOSTS, Headers
from router.relay.relay import Relay
from router.routes import RAW_ROUTES
from router.worker import Worker
from router.worker_keys import CREDENTIALS

if TYPE_CHECKING:
    from router.catalog import Catalog

log = logging.getLogger("helios.router")

MODELS = b"/v1/models"


class Picker:
    """One process's. Everything runs in the event loop's thread."""

    def __init__(self, relay: Relay, catalog: Catalog) -> None:
        self.relay, self.settings, self._catalog = relay, relay.settings.picker, catalog
        self.metrics: RouterMetrics = relay.metrics
        self.ledger = Ledger(self.settings.hold_s, self.metrics.picks_outlived.inc, self.freed)
        self.unreachable: frozenset[Worker] = frozenset()
        """Workers that no gateway can be sent to."""
        self._endpoints: dict[Worker, str] = {}
        self._results = {"picked": self.metrics.picks.labels("picked")}
        self.metrics.picker_streams.set_function(lambda: float(self.streams))
        self.streams = 0
        """Streams of gateways that are open."""
        relay.workers.watch(self)

    # --- workers as gateways know them ---

    def joined(self, worker: Worker) -> None:
        found, why = _endpoint(worker)
        self._endpoints[worker] = found
        if not found:
            self.unreachable |= {worker}
            log.warning("gateways can't be sent to a worker", extra={"worker": worker.url, "reason": why})

    def left(self, worker: Worker) -> None:
        pass

    def gone(self, worker: Worker) -> None:
        self._endpoints.pop(worker, None)
        self.unreachable -= {worker}

    def endpoint(self, worker: Worker | None) -> str:
        """``ip:port``; "" for one that no gateway can be sent to."""
        return "" if worker is None else self._endpoints.get(worker, "")

    # --- requests ---

    def begin(self, method: bytes, target: bytes, raw: Headers, subset: Subset | None) -> Pick:
        """A request's head is here. Raises ApiError (404, 405) where it is none for a worker."""
        path, _, query = target.partition(b"?")
        route = RAW_ROUTES.get(path)
        if route is None:
            raise errors.unknown_path(method.decode("latin-1"), path.decode("latin-1")[:200])
        if method != b"POST":
            raise errors.method_not_allowed(method.decode("latin-1"), route.path, "POST")
        return Pick(self, route, query, raw, subset)

    def models(self, method: bytes, target: bytes, raw: Headers) -> bytes | None:
        """The list of models, or one, where that is what is asked for: no worker knows them all. Raises ApiError."""
        path = target.partition(b"?")[0]
        if method != b"GET" or not (path == MODELS or path.startswith(MODELS + b"/")):
            return None
        visible = self._catalog.visible(raw, self.relay.admission)
        name = path[len(MODELS) + 1 :].decode("latin-1")
        if name and name not in visible:
            raise errors.unknown_model(name, list(visible))
        self.count("models")
        return msgspec.json.encode(self._catalog.get(name) if name else self._catalog.list(visible))

    def changes(self, raw: Headers, worker: Worker) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """Headers that the gateway sets for this worker, and those that it removes."""
        keys, relay = self.relay.keys, self.relay
        removed = [name for name, _ in raw if name in HOSTS]
        passed = keys.in_place(raw, worker, ours=relay.authenticates)
        if passed is raw:
            return [], removed
        removed += [name for name, _ in raw if name in CREDENTIALS]
        return [pair for pair in passed if pair[0] == CREDENTIALS[0]], removed

    def freed(self, worker: Worker) -> None:
        """A worker has a request less."""
        if self.relay.admission is not None:
            self.relay.admission.freed(worker)

    def count(self, result: str) -> None:
        """A request is answered. ``result`` is an error's code, or as the metric says: there are few."""
        known = self._results.get(result)
        if known is None:
            known = self._results[result] = self.metrics.picks.labels(result)
        known.inc()

    def picked(self, seconds: float) -> None:
        self._results["picked"].inc()
        self.metrics.pick_seconds.observe(seconds)

    def overloaded(self) -> ApiError | None:
        """Why one more stream is not served, if it isn't."""
        return errors.too_many_connections() if self.streams >= self.settings.max_streams else None


def _endpoint(worker: Worker) -> tuple[str, str]:
    """What a gateway calls it, or why it can't."""
    host, port = worker.address.host, worker.address.port
    if worker.address.prefix:
        return "", "its URL has a path, and gateways send requests to theirs"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "", "its URL has a name, and gateways want an IP address"
    return (f"[{host}]:{port}" if address.version == 6 else f"{host}:{port}"), ""
