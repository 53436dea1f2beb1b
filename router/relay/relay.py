"""What all exchanges share, and the one timer that ends those whose deadline has passed."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from helios.config import RouterSettings
from helios.metrics import RouterMetrics
from router.errors import ApiError
from router.relay.accounts import Accounts
from router.relay.intake import Budget
from router.relay.upstream import Pool
from router.resilience.resilience import Resilience
from router.scheduling.policy import Policy
from router.worker import Worker
from router.worker_keys import WorkerKeys
from router.workers import Workers

if TYPE_CHECKING:
    from router.admission.admission import Admission
    from router.disaggregation.splits import Splits
    from router.kv.asking import Lookups
    from router.relay.dispatch import Dispatch
    from router.tracing.recorder import Recorder

BAD: Final = 400
"""From this status on an answer is an error."""
TICK_S: Final = 0.1
"""How often deadlines are looked at: one timer for all, since one for each piece would cost more than relaying it."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Underway(Protocol):
    """A request. ``deadline`` is when ``expire`` is due, in the loop's seconds."""

    deadline: float

    def expire(self) -> None: ...

    def cut(self) -> None:
        """The router's time is up."""
        ...


def _later(seconds: float, call: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, call)


class Relay:
    """The state of one process's data plane. Everything runs in the event loop's thread."""

    def __init__(
        self, settings: RouterSettings, workers: Workers, policy: Policy, metrics: RouterMetrics,
        resilience: Resilience, admission: Admission | None = None, tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        """Without ``admission`` everybody may use everything, and nobody waits.

        ``tls``: how workers with https are met; None: as the system's certificates say.
        """
        self.admission = admission
        self.settings, self.workers, self.policy, self.metrics = settings, workers, policy, metrics
        self.resilience, self.hedges = resilience, resilience.hedges
        self.keys = WorkerKeys(settings.worker_key_file)
        self.authenticates = admission is not None and admission.authenticates
        """Whether clients' credentials are for this router."""
        self.renames = settings.answer_model == "asked"
        """Whether answers name the model as the client did."""
        self.max_body = settings.max_body_mib << 20
        self.budget = Budget(settings.max_buffered_mib << 20)
        self.tls = tls
        self.pool = Pool(settings.connect_timeout_s, tls)
        self.active: set[Underway] = set()
        """Requests under way, those of gateways included..."""
        self.dispatches: set[Dispatch] = set()
        """...and their attempts."""
        self.now: Callable[[], float] = time.monotonic
        """Seconds; what deadlines are measured by."""
        self.later: Callable[[float, Callable[[], None]], Timer] = _later
        """Calls, in so many seconds, unless it is cancelled."""
        self.bits: Callable[[int], int] = random.getrandbits
        """So many random bits, for the ids of spans."""
        self.missing: Callable[[str], ApiError | None] = lambda model: None
        """What a client is told of a model that no worker serves; None: nothing but that."""
        self.lookups: Lookups | None = None
        """Who is asked what workers have of a prompt, where the policy goes by that."""
        self.splits: Splits | None = None
        """Who has prompts computed elsewhere, where that is worth it."""
        self.tracing: Recorder | None = None
        """What notes requests for their spans, where these are exported."""
        self.accounts = Accounts(metrics)
        workers.watch(self)

    def joined(self, worker: Worker) -> None:
        pass

    def left(self, worker: Worker) -> None:
        self.pool.forget(worker)

    def gone(self, worker: Worker) -> None:
        self.pool.forget(worker)  # what it answered meanwhile left connections, too

    async def run(self) -> None:
        """Look at what is due until cancelled, then give the connections up."""
        try:
            while True:
                await asyncio.sleep(TICK_S)
                now = self.now()
                self.look(now)
                if self.admission is not None:
                    self.admission.tick()
                self.pool.sweep(now)
                self.workers.tick(now)
        finally:
            await self.pool.close()

    def look(self, now: float) -> None:
        """End, or move on, what is due."""
        for leg in [one for one in self.dispatches if one.deadline <= now]:
            leg.expire()
        for exchange in [one for one in self.active if one.deadline <= now]:
            exchange.expire()

    def cut(self) -> None:
        """End every request in flight."""
        for exchange in list(self.active):
            exchange.cut()

    def hung(self, worker: Worker) -> None:
        """The worker was found to generate nothing: what may be repeated goes elsewhere."""
        for leg in [one for one in self.dispatches if one.worker is worker]:
            leg.hung()

    def account(
        self, path: str, model: str, status: int, leg: Dispatch | None, began: float, *, gone: bool, whole: bool
    ) -> None:  # fmt: skip
        """A request is over. ``leg``: the attempt that it ended with; ``gone``: the client left; ``whole``: all of an
        answer came."""
        worker = None if leg is None else leg.worker
        key = (
            path, model, status, "" if worker is None else worker.revision, leg is not None and leg.streamed,
            not whole and not gone and status < BAD,
        )  # fmt: skip
        account = self.accounts.of(key)
        if account is None:  # as many as there are routes, known models, statuses and revisions
            account = self.accounts.made(key, {one.revision for one in self.workers.all})
        account.count.inc()
        if gone:
            self.metrics.disconnects.inc()
        if leg is not None and leg.first_byte_at:
            account.first_byte.observe(leg.first_byte_at - began)
        account.duration.observe(self.now() - began)
