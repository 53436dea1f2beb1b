"""What requests share on their way in: identities, limits, the queues of models, and the models being woken.

All of it is synchronous, in the event loop's thread: a decision and its count are one step. ``begin`` starts the
tasks there are: fetching an issuer's keys, and asking the store of shared limits.

A request of a model takes one of three ways. A worker has room: it goes. All have enough to do, or others wait already:
it waits, fairly. No worker is up: it waits, too, while the model is woken; where nobody can wake it the relay says so.
Whoever waits is called by the ``Line`` when a worker has room again: this process's own, or that of all processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from helios.config import AdmissionSettings, KubernetesSettings, LimitSettings, RouterSettings
from helios.errors import UsageError
from helios.metrics import RouterMetrics
from helios.series import Count
from router import errors
from router.admission import aliases
from router.admission.at_registry import AtRegistry
from router.admission.buckets import Limits as Buckets
from router.admission.buckets import LocalLimits, Unit
from router.admission.entry import Entry
from router.admission.holders import Header, Keys
from router.admission.line import Here, Line
from router.admission.line_there import Bounds, There
from router.admission.line_words import ToOwner
from router.admission.queue import FairQueue, Room
from router.admission.redis_buckets import RedisLimits
from router.admission.rights import ANYBODY, BACKGROUND, Principal, Right, Tenants, check_limits
from router.admission.sums import Sums
from router.admission.waking import Wakes
from router.model_limits import UNLIMITED, Limits
from router.relay.headers import Headers
from router.routes import InferenceRoute
from router.workers import Worker, Workers

if TYPE_CHECKING:
    from router.admission.jwt import Verifier

PLANS: Final = 4096
"""Pairs of somebody and a model whose limits are remembered."""

Plan = tuple[tuple[str, Unit, float], ...]
"""The buckets that concern a request: whose, in what, and how much for each minute."""


class Admission:
    """One router's. ``clock`` gives seconds, ``now`` unix seconds."""

    def __init__(
        self, settings: RouterSettings, workers: Workers, metrics: RouterMetrics, *, waking: Wakes | None = None,
        clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time, processes: int = 1,
        sums: Callable[[str], Sums | None] | None = None, registry: AtRegistry | None = None,
        say: Callable[[ToOwner], None] | None = None,
    ) -> None:  # fmt: skip
        """``waking``: has models woken; None: nobody can. ``processes``: how many share the limits, which ``sums``
        keeps, and the queue, whose owner is told with ``say``; ``registry``: knows names that no worker serves.

        Raises UsageError for settings that can't work."""
        _check(settings)
        ours = self.settings = settings.admission
        self.workers, self.metrics, self.clock = workers, metrics, clock
        self.registry = registry
        self.aliases = settings.aliases
        for alias in self.aliases:
            if workers.named(alias):
                raise UsageError(f"router.aliases: {alias!r} is the name of a model")
        self._tenants = Tenants(ours)
        self._keys = Keys(Path(ours.keys), self._tenants, now, clock) if ours.keys else None
        self._verifier = self._make_verifier(now)
        self.authenticates = self._keys is not None or self._verifier is not None
        local = LocalLimits(clock, processes, sums)
        self._shared = RedisLimits(ours.shared, local, clock) if ours.shared.url else None
        self.limits: Buckets = self._shared or local
        self._plans: dict[tuple[Principal, str], Plan] = {}
        self._background: dict[Hashable, Principal] = {}
        self._used: dict[tuple[str, str], Count] = {}
        self._waking_now: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.waking = waking
        self._wakes_workers = bool(ours.wake_url) or ours.hold
        self.begins_to_wait: Callable[[str], None] = lambda model: None
        """Hears of the model of each request that begins to wait."""
        self._queues_all = bool(ours.queue.per_worker) or self.waking is not None
        requests, size = ours.queue.max_requests, ours.queue.max_mib << 20
        self.elsewhere: There | None = None
        """The line, where the queue is another process's."""
        if say is not None:
            bounds = Bounds(requests, size, processes, self.workers.may_wait)
            self.elsewhere = There(bounds, self._has_room, self._queues, clock, say)
        room = Room(requests, size)
        self.line: Line = self.elsewhere or Here(room, self._has_room, self.workers.may_wait, self._queues, clock)
        metrics.queued_bytes.set_function(lambda: float(self.room.bytes))
        if self._shared is not None:
            shared = self._shared
            metrics.shared_limits_up.set_function(lambda: 0.0 if shared.away else 1.0)

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Start what looks after the issuer's keys and the shared limits."""
        if self._verifier is not None:
            from helios.jwks import Jwks

            self._tasks.append(group.create_task(Jwks(self.settings.jwt, self._verifier).run()))
        if self._shared is not None:
            self._tasks.append(group.create_task(self._shared.run()))

    def end(self) -> None:
        """Stop what ``begin`` started."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    # --- who ---

    def enter(self, route: InferenceRoute, headers: Headers, principal: Principal | None = None) -> Entry:
        """A request's head is here; ``principal``: who sent it, where that is known. Raises ApiError: 401, 403, 503."""
        if principal is None:
            principal = self.identify(headers)
        if not principal.may_use(route.path):
            self._refuse(errors.not_allowed(None, route.path))
        return Entry(self, principal, route)

    def identify(self, headers: Headers) -> Principal:
        """Who sent these headers (names in lower case). Raises ApiError: 401, 503."""
        if not self.authenticates:
            return ANYBODY
        header = _credentials(headers)
        if header is None:
            self._refuse(errors.no_credentials())
        keys = self._keys
        if keys is not None and (known := keys.sender(header)) is not None:
            return known
        text = _text(header)
        principal = None if keys is None else keys.find(text, header)
        if principal is not None:
            return principal
        if self._verifier is None or "." not in text:
            self._refuse(errors.bad_credentials("the API key is unknown, revoked or expired"))
        try:
            return self._verifier.find(text)
        except errors.ApiError as error:
            self._refuse(error)

    def on_behalf(self, tenant: str, key: str, rights: Sequence[Right]) -> Principal:
        """Somebody for whom something is done in the background, after everything else. Raises ApiError (401).

        ``key``: the API key's id, which must be good still; "": ``rights`` are what he had when he asked for it."""
        if not self.authenticates:
            return self._behind(ANYBODY, lambda: ANYBODY)
        if not key:
            mine = tuple(rights)
            return self._behind((tenant, mine), lambda: self._tenants.principal(tenant, mine, "low"))
        principal = None if self._keys is None else self._keys.by_id(key)
        if principal is None:
            self._refuse(errors.bad_credentials(f"the API key {key} is revoked or expired"))
        return self._behind(principal, lambda: principal)

    def _behind(self, who: Hashable, make: Callable[[], Principal]) -> Principal:
        """The same one for the same: what is known of somebody (``plan``) is kept by who he is."""
        known = self._background.get(who)
        if known is None:
            if len(self._background) >= PLANS:
                self._background.clear()
            known = self._background[who] = replace(make(), rank=BACKGROUND)
        return known

    def visible(self, principal: Principal) -> list[str]:
        """The names of models and aliases that somebody may use on some route, sorted."""
        named = {model: model for model in self.workers.models}
        named |= {alias: model for alias, model in self.aliases.items() if model in named}
        rights = principal.rights
        return sorted(
            name for name, model in named.items()
            if principal.bound.names(model) and any(right.names(model) for right in rights)
        )  # fmt: skip

    # --- how much ---

    def plan(self, principal: Principal, model: str) -> Plan:
        """The buckets that concern somebody's request of a model."""
        asked = principal, model
        known = self._plans.get(asked)
        if known is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            whose = (
                (f"the key {principal.key}", principal.key_limits),
                (f"the tenant {principal.tenant}", principal.tenant_limits),
                (f"the model {model}", self.settings.models.get(model, LimitSettings())),
            )
            known = self._plans[asked] = tuple(bucket for name, limits in whose for bucket in _buckets(name, limits))
        return known

    def used(self, model: str, source: str, tokens: float) -> None:
        """Count tokens; ``source``: reported, estimated."""
        count = self._used.get((model, source))
        if count is None:
            count = self._used[model, source] = self.metrics.tokens.labels(model, source)
        count.inc(tokens)

    # --- who waits ---

    @property
    def room(self) -> Room:
        """What waits in this process."""
        return self.line.room

    def _queues(self, model: str, queue: FairQueue) -> None:
        """A model has a queue from now on."""
        self.metrics.queued.labels(model).set_function(queue.__len__)

    def stands_for(self, model: str) -> str:
        """The name whose workers take a model's requests, as far as that is known; nobody is asked."""
        model = self.aliases.get(model, model)
        return model if self.registry is None else self.registry.stands_for(model)

    def waits(self, model: str) -> bool:
        """Whether anybody waits for a worker of the model."""
        return self.line.waits(model)

    def wakes(self, model: str) -> Wakes | None:
        """Who wakes the model; None: nobody. What has workers that are down is no matter of the registry's."""
        return self.waking if self._wakes_workers or not self.workers.named(model) else None

    def queues(self, model: str) -> bool:
        """Whether anybody ever waits for the model."""
        return self._queues_all or self.workers.limits(model) != UNLIMITED

    def with_room(self, model: str, candidates: list[Worker]) -> list[Worker]:
        """Those that may get another request of the model."""
        if not self.workers.spare(model):
            return []
        most = self.settings.queue.per_worker
        return [worker for worker in candidates if worker.in_flight < most] if most else candidates

    def _has_room(self, model: str) -> bool:
        return bool(self.with_room(model, self.workers.candidates(model, ())))

    def freed(self, worker: Worker) -> None:
        """A worker has a request less."""
        self.line.freed(worker)

    def tick(self) -> None:
        """Some time has passed."""
        if self.registry is not None:
            self.registry.tick()
        if self.waking is not None:
            self.waking.tick(self._served)
        self.line.tick()
        for model in self.line.models():
            self._turn(model)

    def _turn(self, model: str) -> None:
        """Tell those who wait on when what they wait for has changed, and send them away when it can't come."""
        waking = not self.workers.candidates(model, ())
        if waking and ((wakes := self.wakes(model)) is None or wakes.want(model) is not None):
            tickets = self.line.tickets(model)
            for ticket in tickets:
                self.line.leave(model, ticket)
            for ticket in tickets:
                ticket.owner.called()  # who is called and finds no worker says why
        elif waking is not (model in self._waking_now):
            (self._waking_now.add if waking else self._waking_now.discard)(model)
            for ticket in self.line.tickets(model):
                ticket.owner.waits_for(waking)

    def _served(self, model: str) -> bool:
        return bool(self.workers.candidates(model, ()))

    def refused(self, error: errors.ApiError) -> errors.ApiError:
        """Count a refusal of ours."""
        self.metrics.refused.labels(error.code).inc()
        return error

    def _refuse(self, error: errors.ApiError) -> NoReturn:
        raise self.refused(error)

    def _make_verifier(self, now: Callable[[], float]) -> Verifier | None:
        if not self.settings.jwt.jwks:
            return None
        from helios.jwks import check
        from router.admission.jwt import Verifier

        check(self.settings.jwt, "router.admission.jwt")
        return Verifier(self.settings.jwt, self._tenants, now)


def make(
    settings: RouterSettings, workers: Workers, metrics: RouterMetrics, waking: Wakes | None = None, processes: int = 1,
    sums: Callable[[str], Sums | None] | None = None, registry: AtRegistry | None = None,
    say: Callable[[ToOwner], None] | None = None,
) -> Admission | None:  # fmt: skip
    """The admission that the settings ask for; None where they ask for nothing of it, and no source of workers can say
    limits of models. Raises UsageError."""
    told = settings.discovery.file or settings.discovery.kubernetes != KubernetesSettings()
    limited = told or any(Limits(one.max_in_flight, one.max_queued) != UNLIMITED for one in settings.workers)
    asked = settings.admission != AdmissionSettings() or bool(settings.aliases)
    if not asked and not limited and waking is None and registry is None:
        return None
    return Admission(
        settings, workers, metrics, waking=waking, processes=processes, sums=sums, registry=registry, say=say
    )  # fmt: skip


def _credentials(headers: Headers) -> Header | None:
    """The header in which somebody says who he is: Authorization, or what Anthropic's clients send."""
    other: Header | None = None
    for header in headers:
        name = header[0]
        if name == b"authorization":
            return header
        if name == b"x-api-key":
            other = header
    return other


def _text(header: Header) -> str:
    """The key or token in it; "" for credentials of another kind."""
    name, value = header
    if name == b"x-api-key":
        return value.strip().decode("latin-1")
    scheme, _, text = value.strip().partition(b" ")
    return text.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""


def _buckets(name: str, limits: LimitSettings) -> list[tuple[str, Unit, float]]:
    units: tuple[tuple[Unit, float], ...] = (
        ("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute),
    )  # fmt: skip
    return [(name, unit, limit) for unit, limit in units if limit]


def _check(settings: RouterSettings) -> None:
    """Raises UsageError for settings that can't work."""
    ours = settings.admission
    aliases.check(settings.aliases)
    for name, value in (
        ("queue.max_requests", ours.queue.max_requests), ("queue.max_mib", ours.queue.max_mib),
        ("queue.saturated_s", ours.queue.saturated_s), ("queue.waking_s", ours.queue.waking_s),
        ("jwt.refresh_s", ours.jwt.refresh_s), ("output_tokens", ours.output_tokens),
    ):  # fmt: skip
        if value <= 0:
            raise UsageError(f"router.admission.{name} must be more than 0, not {value}")
    for name, value in (
        ("queue.per_worker", ours.queue.per_worker), ("queue.comment_after_s", ours.queue.comment_after_s),
        ("jwt.leeway_s", ours.jwt.leeway_s),
    ):  # fmt: skip
        if value < 0:
            raise UsageError(f"router.admission.{name} must be 0 or more, not {value}")
    for model, limits in ours.models.items():
        check_limits(limits, f"router.admission.models.{model}")
    if ours.roles and not ours.jwt.jwks:
        raise UsageError("router.admission.roles are for JWTs", hint="Set router.admission.jwt.jwks.")
    if ours.tenants and not ours.jwt.jwks and not ours.keys:
        raise UsageError(
            "router.admission.tenants without keys or jwt: nobody would be a tenant",
            hint="Set router.admission.keys to a file that `helios router keys create` writes.",
        )
