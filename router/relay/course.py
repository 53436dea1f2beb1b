"""Where one request goes: the worker that is chosen for it, and after a failure another one, or a fallback.

No I/O: ``Exchange`` carries out what is said here, or a gateway does that asked for it (``router.picker``). What is
chosen is counted in the same step, by the ``Dispatch`` that begins there, or the gateway's ``Pick``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from router import errors
from router.resilience.fallback import Target, poor
from router.resilience.retry import Failure
from router.scheduling.request import Request
from router.workers import Worker

if TYPE_CHECKING:
    from router.admission.entry import Entry
    from router.disaggregation.transfer import Transfer
    from router.kv.dialogue import Answer
    from router.relay.dispatch import Dispatch
    from router.relay.framing import Head
    from router.relay.intake import Intake
    from router.relay.relay import Relay
    from router.relay.request_head import RequestHead
    from router.relay.trace import Trace
    from router.resilience.fallback import Endpoint
    from router.resilience.hedging import Hedge
    from router.tracing.recorder import Spans

log = logging.getLogger("helios.router")

UNKNOWN: Final = "unknown"
"""The metric label of models that are not configured: names from outside must not become labels."""
NOBODY: Final[frozenset[Worker]] = frozenset()


class Course:
    """One request's."""

    __slots__ = (
        "_fallbacks", "_give_up_at", "_indexed", "_ours", "_placed", "_reason", "_relay", "_repeats", "_target",
        "_tried", "body", "model", "request", "said", "spans", "transfer",
    )  # fmt: skip

    def __init__(self, relay: Relay, said: RequestHead, *, ours: bool = True) -> None:
        """``ours``: it goes over connections of this router; else a gateway sends it, which reaches workers alone and
        writes spans of its own."""
        self._relay, self.said, self._ours = relay, said, ours
        self.spans: Spans | None = None if relay.tracing is None or not ours else relay.tracing.begin(said)
        """What is noted for its spans; None where it has none."""
        self._placed = False
        self.model = UNKNOWN
        """Which model it is for, that is known: the one that was asked for, then that of a fallback."""
        self.body = b""
        """What a fallback's endpoint is sent."""
        self.request: Request | None = None
        """As scheduling sees it, from the first choice of a worker until an answer is here."""
        self.transfer: Transfer | None = None
        """What is known of its prompt's blocks, where another worker computes them."""
        self._tried: frozenset[Worker] = NOBODY
        self._repeats = 0
        self._give_up_at = 0.0
        self._reason = ""
        self._fallbacks: list[Target] | None = None
        self._target: Target | None = None
        self._indexed: Answer | None = None
        """What the index of KV events says of the prompt."""

    @property
    def diverted(self) -> bool:
        """Whether a fallback has it."""
        return self._target is not None

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the request is when not at a worker."""
        return None if self._target is None else self._target.endpoint

    # --- choosing ---

    def look_up(self, intake: Intake, then: Callable[[], None]) -> bool:
        """Ask what workers have of the prompt, where the policy goes by that; whether ``then`` is called, later."""
        lookups = self._relay.lookups
        if lookups is None or intake.model is None:
            return False

        def told(known: Answer | None) -> None:
            self._indexed = known
            then()

        return lookups.ask(self.said.route.path, intake.model, intake, told)

    def choose(
        self, intake: Intake, entry: Entry | None, outside: frozenset[Worker] = NOBODY
    ) -> Worker | Endpoint | None:
        """Where the request goes now, which nothing has counted yet. None: it has to wait. Raises ApiError.

        ``outside``: workers that it can't go to, whatever becomes of the others."""
        workers = self._relay.workers
        if self._target is not None and self._target.endpoint is not None:
            self._target, self.body = None, b""  # it was there
        now = self._relay.now()
        while True:
            model = self._known(intake, now)
            candidates = workers.candidates(model, self._tried | outside if outside else self._tried)
            if candidates and candidates[0].guard.clear:
                break
            target = self._fall_back(model, intake) if poor(candidates) else None
            if target is None:
                break
            if target.endpoint is not None:
                return target.endpoint
        if entry is not None:
            allowed = entry.gate(candidates, intake.size)
            if allowed is None:
                self._tried = NOBODY  # it may be up again when this one is called
                return None
            candidates = allowed
        if not candidates or (len(self._tried) > 1 and now >= self._give_up_at):
            retry_after = max(1, math.ceil(self._relay.settings.health_interval_s))
            why = entry.why_down() if entry is not None else ""
            raise errors.no_worker(model, why or self._reason or workers.why_none(model), retry_after)
        request = self.request
        if request is None:
            request = self.request = Request(
                model, intake.fields, path=self.said.route.path, headers=self.said.headers, body=intake.content,
                adapter=workers.adapter(model), known=self._indexed, alone=len(workers.of(model)) == 1,
            )  # fmt: skip
        return self._relay.policy.choose(request, candidates)

    def _known(self, intake: Intake, now: float) -> str:
        """The model that is asked for. Raises ApiError where there is no such."""
        relay, model = self._relay, intake.model
        if model is None or not relay.workers.named(model):
            if model is not None and (missing := relay.missing(model)) is not None:
                raise missing
            if model is None or not relay.workers.known(model):
                raise errors.unknown_model(model, relay.workers.models)
        if self.model is not model:
            self.model = model
            relay.resilience.began(model)
            self._give_up_at = now + relay.settings.connect_timeout_s
        return model

    def beside(self, leg: Dispatch, hedge: Hedge) -> Worker | None:
        """The worker of a second attempt, while this one is silent; None: there is none now, which is counted."""
        relay, model, request, hedges = self._relay, self.model, self.request, self._relay.hedges
        if request is None or leg.worker is None or hedges is None:
            return None
        others = relay.workers.candidates(model, self._tried | {leg.worker})
        spare, queued = hedges.spare(others), False
        if relay.admission is not None:
            spare, queued = relay.admission.with_room(model, spare), relay.admission.waits(model)
        refusal = hedge.refusal(queued=queued, others=len(others), spare=len(spare))
        if refusal:
            relay.metrics.unhedged.labels(model, refusal).inc()
            return None
        request.prefill = request.prompt_tokens
        return relay.policy.choose(request, spare)

    def place(self) -> Trace:
        """The place in the trace of the attempt that is made now, which the log names from here on: each is a span."""
        said = self.said
        if self._placed:
            said.trace = said.trace.beside(self._relay.bits)
        self._placed = True
        return said.trace

    def wait_on(self) -> None:
        """From now on there is as much time as ever to find a worker that can be reached."""
        self._give_up_at = self._relay.now() + self._relay.settings.connect_timeout_s

    # --- what becomes of it there ---

    def unreachable(self, leg: Dispatch, reason: str) -> None:
        """There was no connection, so nothing was sent."""
        worker, self._reason = leg.worker, reason
        self.tried(leg)
        if worker is not None:
            self._relay.accounts.elsewhere[self.model, worker.revision] += 1
        if worker is not None and worker.health.failed(reason):
            log.warning("a worker is down", extra={"worker": worker.url, "reason": reason})

    def tried(self, leg: Dispatch) -> None:
        """The request won't come to this one's worker again."""
        if leg.worker is not None:
            self._tried |= {leg.worker}

    def again(self, leg: Dispatch, failure: Failure, reason: str) -> bool:
        """Whether the request goes elsewhere after this failure: it is safe, possible, and paid for."""
        relay, model, worker = self._relay, self.model, leg.worker
        if not relay.resilience.repeats(self.said.route, failure, self._repeats):
            return False
        tried = self._tried if worker is None else self._tried | {worker}
        if not relay.workers.candidates(model, tried) and self._able(model, tried) is None:
            return False
        if not relay.resilience.pay(model):
            return False
        if worker is not None:
            relay.accounts.elsewhere[model, worker.revision] += 1
        self._repeats += 1
        self._tried = tried
        self._reason = reason
        leg.failed(failure.value)
        self.wait_on()
        self.once_more(leg, failure.value, reason)
        return True

    def once_more(self, leg: Dispatch, why: str, reason: str) -> None:
        """Note that the request, which is still where it was, is sent again; ``why`` is a label of the metric."""
        self._relay.metrics.retries.labels(why).inc()
        extra = {"worker": leg.to.url, "reason": reason, **self.said.ids}
        log.info("a request goes to another connection", extra=extra)

    def answered(self, head: Head) -> None:
        """An answer has come that is passed on."""
        self.over()
        if self._target is not None:
            self._target.mark(head)

    def over(self) -> None:
        """Nothing of it is needed any more: these hold the request's body."""
        self.request, self._indexed, self.body, self.transfer = None, None, b"", None

    # --- fallbacks ---

    def _fall_back(self, model: str, intake: Intake) -> Target | None:
        """The next fallback that can serve, with the body rewritten for it; None: there is none. Raises ApiError."""
        target = self._able(model, self._tried)
        if target is None or self._fallbacks is None:
            return None
        del self._fallbacks[: self._fallbacks.index(target) + 1]
        try:
            body = target.body(intake.content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise errors.invalid_body(f"The request body is not valid JSON: {error}.") from None
        if target.endpoint is None:
            intake.rewrite(body, target.model)
        else:
            self.body = body
        self._target = target
        self.request = self._indexed = self.transfer = None  # they are about the body that came
        self._relay.resilience.fell_back(model, target)
        log.info("a request falls back", extra={"model": model, "to": target.name, **self.said.ids})
        return target

    def _able(self, model: str, tried: frozenset[Worker]) -> Target | None:
        if self._fallbacks is None:
            self._fallbacks = self._relay.resilience.fallbacks.of(model, self.said.route)
        fit = [one for one in self._fallbacks if self._ours or one.endpoint is None]
        return next((one for one in fit if one.able(self._relay.workers, tried)), None)
