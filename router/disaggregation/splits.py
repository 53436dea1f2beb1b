"""Which requests are disaggregated, and which worker computes their prompts.

Asked when a request has been given to a worker (``Dispatch.begin``). What speaks against it is looked at in the order
of what it costs to know; any doubt means that the worker computes the prompt itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from helios.config import DisaggregationSettings
from router.disaggregation.bodies import CAPS, document_of, why_whole
from router.disaggregation.connectors import CONNECTORS
from router.disaggregation.pairs import Pairs
from router.disaggregation.prefill import Prefill
from router.disaggregation.transfer import Transfer
from router.worker import Worker

if TYPE_CHECKING:
    from router.relay.course import Course
    from router.relay.intake import Intake
    from router.relay.relay import Relay

REMOTE: Final = "remote"
"""The label of a prompt that another worker computes."""


class Splits:
    """Of one process."""

    def __init__(self, settings: DisaggregationSettings, relay: Relay) -> None:
        self._settings, self._relay = settings, relay
        self.connector = CONNECTORS[settings.connector]
        self.pairs = Pairs(relay.now)

    def begin(self, course: Course, intake: Intake, to: Worker, go: Callable[[], None]) -> Prefill | None:
        """Have the prompt computed elsewhere; ``go`` is called when that is over, however it ended.

        None: the request goes to its worker now, by itself or with blocks that there are already."""
        if to.role != "decode" or course.request is None:
            return None
        if course.said.route.path not in CAPS:
            self._count(course, "route")
            return None
        transfer = course.transfer
        if transfer is not None:
            if transfer.busy:
                return None  # this is the second attempt of a hedged request
            transfer.again()
            if transfer.fits(to.revision):
                return None
        request = course.request
        if request.prefill < self._settings.min_tokens:
            self._count(course, "short")
            return None
        workers = [one for one in self._relay.workers.prefillers(course.model) if one.revision == to.revision]
        if not workers:
            self._count(course, "no_worker")
            return None
        if self.connector.handshake:
            workers = [one for one in workers if self.pairs.warm(one, to)]
            if not workers:
                self._count(course, "cold")
                return None
        workers = [one for one in workers if one.load.prefill < self._settings.max_waiting_tokens]
        if not workers:
            self._count(course, "busy")
            return None
        if transfer is None:
            transfer = self._transfer(course, intake)
        if transfer is None:
            return None
        if not transfer.wanted:
            self._count(course, "failed")
            return None
        uncached = request.prefill
        worker = self._relay.policy.choose(request, workers)
        compute, request.prefill = request.prefill, uncached
        body = transfer.begin(to.revision)
        return self._prefill(course, transfer, worker, compute, body, go)

    def _transfer(self, course: Course, intake: Intake) -> Transfer | None:
        path = course.said.route.path
        try:
            document = document_of(intake.content)
            why = why_whole(path, document)
        except (msgspec.DecodeError, UnicodeDecodeError):
            why = "malformed"  # its worker will say so
        if why:
            self._count(course, why)
            return None
        relay = self._relay
        course.transfer = Transfer(path, document, self.connector, self._settings.lease_s, relay.now)
        return course.transfer

    def _prefill(
        self, course: Course, transfer: Transfer, worker: Worker, compute: int, body: bytes, go: Callable[[], None]
    ) -> Prefill:
        relay, request = self._relay, course.request
        assert request is not None
        lease = relay.workers.lease(worker, request.prompt_tokens, request.adapter, compute, streamed=False)
        trace = course.said.trace.beside(relay.bits)
        began = relay.now()
        span = None if course.spans is None else course.spans.sends(worker, trace.span, began)

        def then(params: bytes, cached: int | None, why: str) -> None:
            if why:
                transfer.failed()
                self._count(course, why)
            else:
                transfer.ready(params, cached)
                self._count(course, REMOTE)
                relay.metrics.prefill_seconds.labels(course.model).observe(relay.now() - began)
            go()

        prefill = Prefill(relay, course.said, worker, trace, lease, self._settings.timeout_s, span, then)
        prefill.begin(body)
        return prefill

    def _count(self, course: Course, result: str) -> None:
        self._relay.metrics.prefills.labels(course.model, result).inc()
