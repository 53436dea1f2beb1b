"""One vLLM server as the router sees it, and the guard under which a request is sent to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Any, Literal
from urllib.parse import urlsplit

from router.health import Health, State
from router.kv.publishers import UNSAID
from router.latency import PeakEwma
from router.load import Load
from router.model_limits import UNLIMITED
from router.resilience.guard import Guard
from router.worker_metrics import WorkerMetrics

Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker is: ``authority`` is what ``Host`` says, ``prefix`` what stands before each path."""

    host: str
    port: int
    tls: bool
    authority: bytes
    prefix: bytes


def address_of(url: str) -> Address:
    """What a URL of ``check_url`` says."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    authority = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return Address(parts.hostname or "", port, tls, authority.encode(), parts.path.encode())


class Worker:
    """One server. A worker that serves several models (``--served-model-name a b``) is one worker."""

    ours = True

    __slots__ = (
        "adapters",
        "adapters_in_flight",
        "address",
        "bootstrap",
        "cards",
        "cordoned",
        "dispatched_at",
        "draining",
        "first_byte",
        "guard",
        "health",
        "home",
        "key_file",
        "kv",
        "leases",
        "limits",
        "load",
        "metrics",
        "models",
        "newcomer",
        "pinned",
        "revision",
        "role",
        "seed",
        "share",
        "turn",
        "unready",
        "url",
        "weight",
    )  # fmt: skip

    def __init__(self, url: str, health: Health, load: Load, seed: int, guard: Guard) -> None:
        self.url, self.health, self.load, self.seed, self.guard = url, health, load, seed, guard
        self.address = address_of(url)
        self.home = seed & 0xFFFFFFFF or 1
        """Its number where it is remembered who got which prompt; another one after ``begins_anew``."""
        # What its sources say of it.
        self.role: Role = "both"
        self.models: list[str] = []
        self.adapters: frozenset[str] = frozenset()
        """LoRA adapters that it serves under these names."""
        self.revision = ""
        self.weight = 1.0
        self.key_file = ""
        """File with the key that it wants; empty: the one of all workers, if there is one."""
        self.kv = UNSAID
        """Where it publishes KV events."""
        self.bootstrap = ""
        """Where those meet it that take blocks from it: ``PORT`` or ``HOST:PORT``; empty: nobody said."""
        self.limits = UNLIMITED
        """Of its models, at this router."""
        self.pinned: frozenset[str] = frozenset()
        """``model@commit`` for each of its models, where such names are asked for and it says which commit it runs."""
        # What becomes of it.
        self.cordoned = self.draining = False
        self.unready = False
        """Its source says that it takes no requests yet."""
        self.newcomer = False
        """Whether it came while others were at work already: it gets its share over a time."""
        self.share = 1.0
        """Its part of the requests, beside those of others: its weight, less while it starts."""
        # What it does.
        self.leases = 0
        """Requests that this process has there; ``load`` may count those of others."""
        self.dispatched_at = 0
        """Number of the last dispatch, counted over all workers."""
        self.turn = 0.0
        """Round robin's: the virtual time of its next turn."""
        self.adapters_in_flight: Counter[str] = Counter()
        self.first_byte = (PeakEwma(), PeakEwma())
        """Seconds from a request to the first byte of its answer: for whole answers, for streams."""
        self.metrics: WorkerMetrics | None = None
        """The last reading of its own metrics."""
        self.cards: dict[str, dict[str, Any]] = {}
        """What the worker says of its models: the entries of its ``/v1/models``, by id."""

    def __repr__(self) -> str:
        return f"Worker({self.url}, {self.health.state.value}, {self.in_flight} in flight)"

    def begins_anew(self) -> None:
        """It has come up: as far as anybody knows it was just started, and has nothing of what it got before."""
        self.home = getrandbits(32) or 1

    @property
    def in_flight(self) -> int:
        """Requests dispatched to it whose answer has not ended."""
        return self.load.requests

    @property
    def up(self) -> bool:
        return self.health.state is State.UP

    @property
    def names(self) -> set[str]:
        """The names under which it can be asked for: models and adapters."""
        return {*self.models, *self.adapters}

    def fresh_metrics(self, now: float, max_age_s: float) -> WorkerMetrics | None:
        """The last reading, if it is not older than that."""
        metrics = self.metrics
        return metrics if metrics is not None and now - metrics.at <= max_age_s else None


class Lease:
    """A request at a worker: counted from now until ``end``, which may be called again."""

    __slots__ = ("_adapter", "_ended", "_prefill", "_tokens", "_worker")

    def __init__(
        self, worker: Worker, number: int, tokens: int, adapter: str | None,
        ended: Callable[[Lease, Worker], None], prefill: int = 0,
    ) -> None:  # fmt: skip
        self._worker: Worker | None = worker
        self._tokens, self._adapter, self._ended = tokens, adapter, ended
        worker.dispatched_at = number
        worker.leases += 1
        if adapter is not None:
            worker.adapters_in_flight[adapter] += 1
        worker.load.begin(tokens)
        self._prefill = prefill
        if prefill:
            worker.load.wait(prefill)

    def computed(self) -> None:
        """The prompt has been: the first byte is here, or would be if the answer were a stream."""
        if self._prefill and self._worker is not None:
            self._worker.load.wait(-self._prefill)
            self._prefill = 0

    def end(self) -> None:
        self.computed()
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.load.end(self._tokens)
        worker.leases -= 1
        adapter = self._adapter
        if adapter is not None:
            worker.adapters_in_flight[adapter] -= 1
            if worker.adapters_in_flight[adapter] <= 0:
                del worker.adapters_in_flight[adapter]
        self._ended(self, worker)
