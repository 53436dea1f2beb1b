"""One request's way in: whose it is, what it takes of the limits, where it waits, and what it used in the end.

An exchange drives it by calls. What was taken is settled once, in ``leave``, whatever happened; a place in the queue
is given up there, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING

from router import errors
from router.admission import aliases, asked
from router.admission.asked import NOTHING
from router.admission.at_registry import Found
from router.admission.buckets import Charge, Keeper
from router.admission.queue import Claim, Full, Ticket, Waiting
from router.admission.rights import Principal
from router.admission.usage import Meter
from router.errors import ApiError
from router.relay.framing import Head, Mode
from router.relay.intake import Intake
from router.routes import InferenceRoute
from router.workers import Worker

if TYPE_CHECKING:
    from router.admission.admission import Admission

WAKING_RETRY_S = 10
"""Retry-After of a model that is still being woken."""

Done = Callable[[ApiError | None], None]
"""Told once: None when the request may go on, else why not."""


class Entry:
    """``model`` is the model that is asked for, aliases resolved; ``passed``: it need not wait any more."""

    __slots__ = (
        "_admission", "_asked", "_charges", "_claim", "_done", "_headers", "_keeper", "_left", "_meter", "_principal",
        "_route", "_since", "_stop_looking", "_ticket", "_waking", "model", "passed",
    )  # fmt: skip

    def __init__(self, admission: Admission, principal: Principal, route: InferenceRoute) -> None:
        self._admission, self._principal, self._route = admission, principal, route
        self._asked = NOTHING
        self._left = self._waking = False
        self._charges: list[Charge] = []
        self._done: Done | None = None
        """Who is told what the limits say, while they are asked."""
        self._keeper: Keeper | None = None
        self._ticket: Ticket | None = None
        self._claim: Claim | None = None
        self._meter: Meter | None = None
        self._since = 0.0
        self._headers: Collection[tuple[str, str]] = ()
        self._stop_looking: Callable[[], None] | None = None
        self.model = ""
        self.passed = False

    # --- what may be asked, and how much ---

    def admit(self, intake: Intake, done: Done) -> None:
        """The body is whole: check the rights and take of the limits. ``done`` is told once, unless ``leave`` comes
        first; what has to be asked elsewhere is told later. Raises ApiError: 400, 403, 404."""
        admission, name = self._admission, intake.model
        if name is None:
            raise errors.unknown_model(None, admission.visible(self._principal))
        model, workers, registry = admission.aliases.get(name, name), admission.workers, admission.registry
        allowed = self._may(model)
        if not allowed and workers.known(model):
            raise admission.refused(errors.not_allowed(name, self._route.path))
        if not allowed or registry is None or workers.named(model):
            self._take(intake, model, workers.own_name(model), done)
        elif (found := registry.find(model)) is not None:
            self._found(intake, found, done)
        else:
            self._stop_looking = registry.wait(model, partial(self._looked_up, intake, done))

    def _may(self, model: str) -> bool:
        """Who may use a model of the registry may use every revision of it."""
        may, path = self._principal.may, self._route.path
        pinned = self._admission.registry is not None and "@" in model
        return may(model, path) or (pinned and may(model.partition("@")[0], path))

    def _looked_up(self, intake: Intake, done: Done, found: Found | ApiError) -> None:
        """What the name stands for is known now, or won't be."""
        self._stop_looking = None
        try:
            self._found(intake, found, done)
        except ApiError as error:
            done(error)

    def _found(self, intake: Intake, found: Found | ApiError, done: Done) -> None:
        """The registry has said it. Raises ApiError."""
        if isinstance(found, ApiError):
            raise found
        self._headers = found.headers
        self._take(intake, found.model, found.served, done)

    def _take(self, intake: Intake, model: str, served: str, done: Done) -> None:
        """The model is known, whose workers call it ``served``: take of the limits. Raises ApiError."""
        admission, name = self._admission, intake.model
        if name is None or not admission.workers.known(model):
            raise errors.unknown_model(name, admission.visible(self._principal))
        self.model = model
        if served != name:
            if self._route.body == "form":
                raise errors.alias_in_form(name, served)
            intake.rewrite(aliases.replaced(intake.content, name, served), model)
        plan = admission.plan(self._principal, served)
        if admission.queues(model) or plan:
            self._asked = asked.read(self._route.path, intake.fields, intake.size, admission.settings.output_tokens)
        if not plan:
            done(None)
            return
        estimate = self._asked.tokens
        for name, unit, limit in plan:
            if unit == "requests":
                self._charges.append(Charge(name, unit, limit, 1.0))
                continue
            if estimate > limit:
                raise admission.refused(errors.over_limit(name, estimate, limit))
            self._charges.append(Charge(name, unit, limit, estimate))
            if self._meter is None:
                self._meter = Meter()
        self._done = done
        admission.limits.take(self._charges, self._told)

    def _told(self, error: ApiError | None, keeper: Keeper) -> None:
        """What the limits say."""
        done, self._done = self._done, None
        if error is None:
            self._keeper = keeper
            if self._left:
                self._settle(0.0)
        if not self._left and done is not None:
            done(None if error is None else self._admission.refused(error))

    # --- waiting ---

    def gate(self, candidates: list[Worker], size: int) -> list[Worker] | None:
        """Which of the workers may be used; None: wait. An empty list stays one where nobody can help.

        ``size``: bytes of the body."""
        admission = self._admission
        if not admission.queues(self.model):
            return candidates
        if self.passed and candidates:
            return admission.with_room(self.model, candidates) or candidates
        principal = self._principal
        self._claim = Claim(principal.tenant, principal.rank, principal.weight, self._asked.tokens, size)
        self._waking = not candidates
        if not candidates:
            waking = admission.wakes(self.model)
            if waking is None or waking.want(self.model) is not None:
                return candidates
            self.passed = False
            return None
        free = admission.with_room(self.model, candidates)
        if not free or admission.line.waits(self.model):
            return None
        admission.line.passed(self.model, self._claim)
        self.passed = True
        return free

    def wait(self, owner: Waiting) -> None:
        """Stand in the queue; ``owner`` is called. Raises ApiError: 429 when it is full."""
        assert self._claim is not None
        try:
            self._ticket = self._admission.line.push(self.model, owner, self._claim)
        except Full:
            raise self._full() from None
        self._since = self._admission.clock()
        self._admission.begins_to_wait(self.model)

    def waits_for(self, waking: bool) -> None:
        """What it waits for is another thing from now on."""
        if waking is not self._waking:
            self._waking, self._since = waking, self._admission.clock()

    def due(self) -> float:
        """When to look at it again, in the clock's seconds: for the end of its patience, or a comment."""
        settings = self._admission.settings.queue
        if self._asked.stream and settings.comment_after_s:
            return min(self._until(), self._admission.clock() + settings.comment_after_s)
        return self._until()

    def gives_up(self) -> ApiError | None:
        """Why it does not wait any longer; None: it does."""
        admission = self._admission
        if admission.clock() < self._until():
            return None
        waited = admission.clock() - self._since
        if self._waking:
            progress = "" if admission.waking is None else admission.waking.progress(self.model)
            return admission.refused(errors.waking(self.model, waited, progress, WAKING_RETRY_S))
        line, ahead = admission.line, self._ahead()
        retry, most = line.retry_after_s(self.model, ahead), admission.workers.limits(self.model).in_flight
        if most is not None and not admission.workers.spare(self.model):
            return admission.refused(errors.limit_of_model(self.model, most, waited, ahead, retry))
        return admission.refused(errors.saturated(self.model, waited, ahead, retry))

    def comment(self) -> bytes:
        """What a stream is told while it waits, as a comment (a line that clients of SSE skip)."""
        if not self._waking:
            return b": queued, %d ahead\n\n" % self._ahead()
        progress = "" if self._admission.waking is None else self._admission.waking.progress(self.model)
        told = "".join(c for c in progress if c.isprintable())
        return f": waking {told}".rstrip().encode() + b"\n\n"

    @property
    def streams(self) -> bool:
        return self._asked.stream

    def called(self) -> None:
        """It waits no more."""
        self._done_waiting("served")
        self._ticket, self.passed = None, True

    def why_down(self) -> str:
        """Why its model could not be woken, if that is why there is no worker; else ""."""
        waking = self._admission.waking
        reason = "" if waking is None else waking.reason(self.model)
        return reason and f"it could not be started: {reason}"

    def pushed_out(self) -> ApiError:
        self._done_waiting("refused")
        self._ticket = None
        line = self._admission.line
        retry = line.retry_after_s(self.model, line.waiting(self.model))
        return self._admission.refused(errors.pushed_out(self.model, retry))

    def turned_away(self) -> ApiError:
        """The queue was full, as who has it says."""
        self._done_waiting("refused")
        self._ticket = None
        return self._full()

    def _full(self) -> ApiError:
        line, model = self._admission.line, self.model
        waiting, most = line.waiting(model), self._admission.workers.limits(model).queued
        retry = line.retry_after_s(model, waiting)
        if most is not None and waiting >= most:
            return self._admission.refused(errors.queue_of_model_full(model, most, retry))
        return self._admission.refused(errors.queue_full(model, waiting, retry))

    def _ahead(self) -> int:
        return 0 if self._ticket is None else self._admission.line.ahead(self.model, self._ticket)

    def _until(self) -> float:
        settings = self._admission.settings.queue
        return self._since + (settings.waking_s if self._waking else settings.saturated_s)

    # --- at a worker, and the end ---

    def mark(self, head: Head) -> None:
        """Say in an answer's head what the registry has to say of the model."""
        head.lines += [f"{name}: {value}".encode() for name, value in self._headers]

    def came(self, piece: bytes) -> None:
        """Bytes of the answer."""
        if self._meter is not None:
            self._meter.feed(piece)

    def leave_unseen(self) -> None:
        """The request is over at a worker whose answer went past here: it used what was estimated."""
        self._leave(False)
        if self._keeper is not None and self._meter is not None:
            self._admission.used(self.model, "estimated", self._asked.tokens)
        self._keeper = None

    def leave(self, head: Head | None, ended: bool, gone: bool) -> None:
        """The request is over, whichever way. ``head`` is the worker's, None where none came; ``ended``: the answer
        is whole."""
        self._leave(gone)
        if self._keeper is None:
            return
        if head is None or head.status >= 400:
            self._settle(0.0)
            return
        chunked = head.chunked or head.mode is Mode.CHUNKED
        used = self._meter.tokens(chunked, head.events) if ended and self._meter is not None else None
        if self._meter is not None:
            source = "estimated" if used is None else "reported"
            tokens = self._asked.tokens if used is None else used
            self._admission.used(self.model, source, tokens)
        if used is not None:
            self._settle(float(used))

    def _leave(self, gone: bool) -> None:
        """Ask and wait no more."""
        self._left = True
        if self._stop_looking is not None:
            self._stop_looking()
        if self._ticket is not None:
            self._admission.line.leave(self.model, self._ticket)
            self._done_waiting("gone" if gone else "refused")
            self._ticket = None

    def _settle(self, used: float) -> None:
        """The tokens that were used, of those taken; a request stays a request."""
        keeper, self._keeper = self._keeper, None
        change = used - self._asked.tokens
        owed = [Charge(c.name, c.unit, c.limit, change) for c in self._charges if c.unit == "tokens"]
        if keeper is not None and owed and change and math.isfinite(change):
            keeper.settle(owed)

    def _done_waiting(self, outcome: str) -> None:
        assert self._ticket is not None
        waited = self._admission.clock() - self._ticket.since
        self._admission.metrics.queue_wait.labels(self.model, outcome).observe(waited)
