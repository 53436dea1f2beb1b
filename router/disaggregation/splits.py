"""Which requests are disaggregated, and which worker computes their prompts.

Asked when a request has been given to a worker (``Dispatch.begin``). What speaks against it is looked at in the order
of what it costs to know; any doubt means that the worker computes the prompt itself, where it can
(``Connector.alone``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from helios.config import DisaggregationSettings
from router import errors
from router.disaggregation.bodies import Values, document_of, why_whole
from router.disaggregation.connectors import CONNECTORS
from router.disaggregation.pairs import Pairs
from router.disaggregation.peers import Peers
from router.disaggregation.prefill import Prefill
from router.disaggregation.transfer import NO_TICKET, Transfer
from router.errors import ApiError
from router.worker import Worker

if TYPE_CHECKING:
    from router.relay.course import Course
    from router.relay.intake import Intake
    from router.relay.relay import Relay
    from router.scheduling.request import Request

REMOTE: Final = "remote"
"""The label of a prompt that another worker computes..."""
CACHED: Final = "cached"
"""...and of one of which the worker that answers said that it has enough."""
Step = tuple[Prefill | None, int]
"""The request for prefill that was sent, and the ticket with which the attempt takes what is for it
(``Transfer.take``)."""
BY_ITSELF: Final[Step] = (None, NO_TICKET)


class Splits:
    """Of one process."""

    def __init__(self, settings: DisaggregationSettings, relay: Relay) -> None:
        self._settings, self._relay = settings, relay
        self.connector = CONNECTORS[settings.connector]
        self.pairs = Pairs(relay.now)
        self.peers = Peers(self.connector)

    def begin(self, course: Course, intake: Intake, to: Worker, go: Callable[[], None]) -> Step:
        """Have the prompt computed elsewhere; ``go`` is called when that is over, however it ended.

        Without a request for prefill the request goes to its worker now, by itself or for blocks that there are.
        Raises ApiError where that worker can't compute the prompt, and nobody else does."""
        request, transfer = course.request, course.transfer
        if to.role != "decode" or request is None:
            return BY_ITSELF
        if course.said.route.path not in self.connector.routes:
            self._count(course, "route")
            return BY_ITSELF
        if transfer is not None:
            if transfer.busy:
                return BY_ITSELF  # this is the second attempt of a hedged request
            if transfer.refusal is not None:
                raise transfer.refusal
            transfer.again()
            if transfer.fits(to.revision):
                return None, transfer.ticket
        if self.connector.alone and request.prefill < self._settings.min_tokens:
            self._count(course, "short")
            return BY_ITSELF
        workers, why = self._able(course.model, to)
        if not workers:
            return self._without(course, why)
        if transfer is None:
            transfer = self._transfer(course, intake)
            if transfer is None:
                return BY_ITSELF
        if transfer.to_probe:
            transfer.probe(to.revision)
            return None, transfer.ticket
        if not transfer.wanted:
            return self._without(course, "failed")
        worker, compute = self._choose(request, workers)
        peer = self.peers.of(worker)
        if peer is None:
            self.pairs.cools(worker)
            return self._without(course, "cold")
        return self._prefill(course, transfer, worker, compute, peer, to, go), transfer.ticket

    def _able(self, model: str, to: Worker) -> tuple[Sequence[Worker], str]:
        """The workers that may compute the prompt; none: why."""
        row = self.connector
        workers = [one for one in self._relay.workers.prefillers(model) if one.revision == to.revision]
        if not workers:
            return (), "no_worker"
        if row.handshake:
            warm = [one for one in workers if self.pairs.warm(one, to)]
            if not warm and row.alone:
                return (), "cold"
            workers = warm or workers
        free = [one for one in workers if one.load.prefill < self._settings.max_waiting_tokens]
        if not free and row.alone:
            return (), "busy"
        return free or workers, ""

    def _without(self, course: Course, why: str) -> Step:
        """The worker is to compute the prompt itself. Raises ApiError where it can't."""
        self._count(course, why)
        if not self.connector.alone:
            raise errors.no_prefill(course.model, why)
        return BY_ITSELF

    def _choose(self, request: Request, workers: Sequence[Worker]) -> tuple[Worker, int]:
        """A worker, and the tokens that it has to compute. What the other one lacks stays as it was."""
        uncached = request.prefill
        worker = self._relay.policy.choose(request, workers)
        compute, request.prefill = request.prefill, uncached
        return worker, compute

    def _transfer(self, course: Course, intake: Intake) -> Transfer | None:
        path = course.said.route.path
        try:
            document = document_of(intake.content)
            why = why_whole(path, document) if self.connector.alone else ""
        except (msgspec.DecodeError, UnicodeDecodeError):
            why = "malformed"  # its worker will say so
        if why:
            self._count(course, why)
            return None
        relay, settings = self._relay, self._settings
        course.transfer = Transfer(
            path, document, self.connector, settings.lease_s, relay.now, relay.bits, settings.cache_hit_threshold
        )
        return course.transfer

    def _prefill(
        self, course: Course, transfer: Transfer, worker: Worker, compute: int, peer: Values, to: Worker,
        go: Callable[[], None],
    ) -> Prefill:  # fmt: skip
        relay, request, said = self._relay, course.request, course.said
        assert request is not None
        body = transfer.begin(to.revision, peer, said.identity)
        lease = relay.workers.lease(worker, request.prompt_tokens, request.adapter, compute, streamed=False)
        trace = said.trace.beside(relay.bits)
        began = relay.now()
        span = None if course.spans is None else course.spans.sends(worker, trace.span, began)

        def then(params: bytes, cached: int | None, why: str, refusal: ApiError | None) -> None:
            if not why and not self.peers.still(worker, params):
                why = "moved"
                self.pairs.cools(worker)
            if why:
                transfer.failed(refusal)
                self._count(course, why)
            else:
                transfer.ready(params, cached)
                self._count(course, REMOTE)
                relay.metrics.prefill_seconds.labels(course.model).observe(relay.now() - began)
            go()

        prefill = Prefill(relay, said, worker, trace, lease, self._settings.timeout_s, span, then, self.connector)
        prefill.begin(body, transfer.identity, peer.get("rank", b""))
        return prefill

    def had(self, course: Course) -> None:
        """The worker that answers had enough of the prompt."""
        self._count(course, CACHED)

    def _count(self, course: Course, result: str) -> None:
        self._relay.metrics.prefills.labels(course.model, result).inc()
