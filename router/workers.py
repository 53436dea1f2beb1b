"""The workers by model: a set that changes while requests are under way.

Sources say which workers there are (``apply``). A worker that none names any more gets no new requests; when those it
has are over it is gone, and what watches the set (``Watcher``) lets go of it. One that is named again before that is
the same worker as before.

Everything here is synchronous and runs in the event loop's thread, so a choice and its count are one step. The count
goes up when a lease is made and down when it ends; nothing else touches it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Protocol

from helios.config import WorkerSettings
from helios.errors import NotFound, UsageError
from helios.names import is_commit
from router.health import Health, State
from router.load import Load, LocalLoad
from router.membership import CONFIGURATION, Spec, by_url, check_url, parse_worker, rank, spec_of, together, touched
from router.model_limits import UNLIMITED, Limits, least
from router.resilience.guard import Guard, admitted
from router.scheduling.keys import key_of
from router.worker import Address, Lease, Role, Worker, address_of

__all__ = ["Address", "Lease", "Role", "Watcher", "Worker", "Workers", "address_of", "check_url", "parse_worker"]

log = logging.getLogger("helios.router")

START: Final = 0.1
"""The part of its share with which a worker starts, as Envoy's slow start has it."""
FORMER_S: Final = 600.0
"""So long a model without workers is still known: its clients get 503 and come back, as during a rollout."""
FORMER_MAX: Final = 1000
_UP: Final = State.UP
"""An attribute of an Enum takes longer to get than all the rest of a candidate."""

COMPUTED_S: Final = 1.0
"""How long a prompt takes, in seconds, where nothing is known of the worker."""
STREAM: Final = 1
"""Which of ``Worker.first_byte`` is that of streams."""


class Watcher(Protocol):
    """Hears of workers as they come and go, in the event loop's thread, inside the call that changed them."""

    def joined(self, worker: Worker) -> None:
        """It gets requests from now on: it is new, or came back before it was gone."""
        ...

    def left(self, worker: Worker) -> None:
        """It gets no new requests."""
        ...

    def gone(self, worker: Worker) -> None:
        """Nothing is under way there any more, and nothing will be."""
        ...


class _Served:
    """The workers of one name."""

    __slots__ = ("able", "limits", "listed", "prefill", "workers")

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.limits = UNLIMITED
        """What all of them together may have."""
        self.listed = False
        """Whether a worker names it; else it is a model's name with the commit that workers run."""
        self.able: list[Worker] = []
        """Those that may take a client's request, if they are up..."""
        self.prefill: list[Worker] = []
        """...and those that may compute prompts for others."""

    def refresh(self) -> None:
        able = [w for w in self.workers if not (w.cordoned or w.unready)]
        self.able = [w for w in able if w.role != "prefill"]
        self.prefill = [w for w in able if w.role == "prefill"]
        if self.workers:
            self.limits = least(worker.limits for worker in self.workers)


class Workers:
    """The set of workers. ``clock`` gives seconds; ``load``, ``guard``, ``health``: make a worker's, given its URL."""

    def __init__(
        self, settings: Sequence[WorkerSettings], clock: Callable[[], float],
        load: Callable[[str], Load] | None = None, slow_start_s: float = 0.0, guard: Callable[[str], Guard] = Guard,
        health: Callable[[str], Health] | None = None, *, pins: bool = False,
    ) -> None:  # fmt: skip
        """``settings``: what the configuration says; raises UsageError where it is wrong.

        ``pins``: ``model@commit`` are those workers of a model that say that they run the commit."""
        self._pins = pins
        self._guard, self._health = guard, health or (lambda url: Health(clock))
        self._clock, self._slow_start_s = clock, slow_start_s
        self._load = load or (lambda url: LocalLoad())
        self._told: dict[str, dict[int, WorkerSettings]] = {}
        """What each source said last, by the objects' identities: most of a source's workers are as they were."""
        self._specs: dict[str, dict[str, Spec]] = {}
        """What each source says of each URL."""
        self._problems: dict[tuple[str, str, str], list[str]] = {}
        """What is wrong, by source, URL and kind."""
        self._unseen: dict[Lease, float] = {}
        """When the prompt of an answer that is no stream will have been computed, of those under way."""
        self._by_url: dict[str, Worker] = {}
        self._draining: dict[str, Worker] = {}
        self._served: dict[str, _Served] = {}
        self._asleep: dict[str, dict[str, Limits]] = {}
        """Models that each source names without a worker, and their limits..."""
        self._named: dict[str, Limits] = {}
        """...and those of all sources."""
        self._former: dict[str, tuple[float, Limits]] = {}
        """Models whose workers have all left: since when, and the limits that these said."""
        self._adapters: set[str] = set()
        self._starting: dict[Worker, float] = {}
        self._watchers: list[Watcher] = []
        self.awaited: Callable[[str], bool] = lambda model: False
        """Whether requests of a model that has no worker are held, since it is on its way."""
        self._dispatches = 0
        for one in settings:
            if not one.url:
                check_url(one.url)  # that a model sleeps is for sources to say that hear when it does not
        if settings and (problems := self.apply(CONFIGURATION, settings)):
            raise UsageError(problems[0])

    # --- what sources say ---

    def apply(self, source: str, settings: Sequence[WorkerSettings]) -> list[str]:
        """Replace what ``source`` says; returns what is wrong with it, in words, which is left out.

        Settings that are the same objects as before cost next to nothing, equal ones a comparison.
        """
        before = self._told.get(source)
        told = {id(one): one for one in settings}
        known = before or {}
        moved = [one for number, one in told.items() if number not in known]
        moved += [one for number, one in known.items() if number not in told]
        self._told[source] = told
        if not moved:
            return self._wrong(source)
        self._name(source, told.values())
        found, wrong = by_url(told.values(), touched(moved))
        self._note(source, "", "url", wrong)
        names: set[str] = set()
        for url, ones in found.items():
            if self._tell(source, url, ones):
                names |= self._settle(url, newcomer=before is not None)
        self._refresh(names)
        return self._wrong(source)

    @property
    def problems(self) -> dict[str, list[str]]:
        """What is wrong with what each source says, in words; only sources with a problem."""
        return {source: self._wrong(source) for source in sorted({by for by, _, _ in self._problems})}

    def _name(self, source: str, settings: Iterable[WorkerSettings]) -> None:
        """Note which models the source names without a worker."""
        found: dict[str, list[Limits]] = {}
        for one in settings:
            if one.model and not one.url:
                pinned = [f"{one.model}@{one.revision}"] if self._pins and is_commit(one.revision) else []
                for name in (one.model, *pinned):
                    found.setdefault(name, []).append(Limits(one.max_in_flight, one.max_queued))
        self._asleep[source] = {name: least(limits) for name, limits in found.items()}
        named = {name for each in self._asleep.values() for name in each}
        self._named = {name: least(each[name] for each in self._asleep.values() if name in each) for name in named}

    def _wrong(self, source: str) -> list[str]:
        return [text for (by, _, _), texts in self._problems.items() if by == source for text in texts]

    def _note(self, source: str, url: str, kind: str, problems: list[str]) -> None:
        known = self._problems.pop((source, url, kind), [])
        if problems:
            self._problems[source, url, kind] = problems
        for text in problems:
            if text not in known:
                log.warning("a source of workers is wrong", extra={"source": source, "reason": text})

    def _tell(self, source: str, url: str, settings: Sequence[WorkerSettings]) -> bool:
        """Note what the source says of the URL; whether that is another thing than before."""
        spec, problems = spec_of(url, settings)
        self._note(source, url, "setting", problems)
        specs = self._specs.setdefault(url, {})
        before = specs.pop(source, None)
        if spec is not None:
            specs[source] = spec
        else:
            self._note(source, url, "contradiction", [])
        if not specs:
            del self._specs[url]
        return spec != before

    def _settle(self, url: str, newcomer: bool) -> set[str]:
        """Bring one worker to what its sources say together; returns the names whose workers changed."""
        told = sorted(self._specs.get(url, {}).items(), key=lambda item: rank(item[0]))
        worker = self._by_url.get(url)
        if not told:
            return set() if worker is None else self._leave(worker)
        spec, contradictions = together(url, told)
        for source, _ in told:
            self._note(source, url, "contradiction", [text for by, text in contradictions if by == source])
        joined = worker is None
        if worker is None:
            worker = self._draining.pop(url, None)
            if worker is None:
                worker = Worker(url, self._health(url), self._load(url), key_of(url), self._guard(url))
                worker.newcomer = newcomer
            worker.draining = False
            self._by_url[url] = worker
        before = set() if joined else worker.names | worker.pinned
        if worker.weight != spec.weight:
            worker.share *= spec.weight / worker.weight
        worker.role, worker.revision, worker.weight = spec.role, spec.revision, spec.weight
        worker.kv, worker.bootstrap = spec.kv, spec.bootstrap
        worker.models, worker.adapters, worker.unready = list(spec.models), spec.adapters, spec.cordoned
        worker.key_file, worker.limits = spec.key_file, spec.limits
        pins = self._pins and is_commit(worker.revision)
        worker.pinned = frozenset(f"{one}@{worker.revision}" for one in worker.models if pins and "@" not in one)
        after = worker.names | worker.pinned
        for name in before - after:
            self._served[name].workers.remove(worker)
        for name in after - before:
            self._served.setdefault(name, _Served()).workers.append(worker)
            self._former.pop(name, None)
        if joined:
            for watcher in self._watchers:
                watcher.joined(worker)
        return before | after

    def _leave(self, worker: Worker) -> set[str]:
        names = worker.names | worker.pinned
        del self._by_url[worker.url]
        self._draining[worker.url] = worker
        worker.draining = True
        for name in names:
            self._served[name].workers.remove(worker)
        for watcher in self._watchers:
            watcher.left(worker)
        self._ended(worker)
        return names

    def _over(self, lease: Lease, worker: Worker) -> None:
        """A lease is."""
        self._unseen.pop(lease, None)
        if worker.draining:
            self._ended(worker)

    def _ended(self, worker: Worker) -> None:
        """One that drains has one request less."""
        if worker.leases == 0 and worker.draining:
            del self._draining[worker.url]
            worker.draining = False
            self._starting.pop(worker, None)
            for watcher in self._watchers:
                watcher.gone(worker)

    def _refresh(self, names: Iterable[str]) -> None:
        for name in names:
            served = self._served[name]
            served.refresh()
            served.listed = any(name in worker.names for worker in served.workers)
            if not served.workers:
                del self._served[name]
                self._former[name] = self._clock(), served.limits
                if len(self._former) > FORMER_MAX:
                    del self._former[next(iter(self._former))]
            if any(name in worker.adapters for worker in served.workers):
                self._adapters.add(name)
            else:
                self._adapters.discard(name)

    # --- who watches ---

    def watch(self, watcher: Watcher) -> None:
        """Tell of the workers there are, then of each change, until ``unwatch``."""
        self._watchers.append(watcher)
        for worker in list(self._by_url.values()):
            watcher.joined(worker)

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.remove(watcher)

    # --- what there is ---

    @property
    def all(self) -> Collection[Worker]:
        """Those that sources name."""
        return self._by_url.values()

    @property
    def draining(self) -> Collection[Worker]:
        """Those that no source names any more and that still have requests."""
        return self._draining.values()

    def at(self, url: str) -> Worker | None:
        """The worker at a URL as ``check_url`` writes it, though it be draining."""
        return self._by_url.get(url) or self._draining.get(url)

    @property
    def models(self) -> list[str]:
        """The names that can be asked for, adapters included, and those of models that sleep, sorted."""
        served = {name for name, served in self._served.items() if served.listed}
        return sorted(served | {name for name in self._named if name not in self._served and "@" not in name})

    def of(self, model: str) -> list[Worker]:
        """Every worker of a model, of any role and state; empty for a model that is not known."""
        served = self._served.get(model)
        return served.workers if served is not None else []

    def own_name(self, model: str) -> str:
        """What the workers of a model call it: all but that, where it is one with the commit that they run."""
        served = self._served.get(model)
        return model if served is None or served.listed else model.partition("@")[0]

    def known(self, model: str) -> bool:
        """Whether the model has workers, or sleeps, or had some a while ago, or is awaited."""
        if self.named(model) or self.awaited(model):
            return True
        return self._was(model) is not None

    def named(self, model: str) -> bool:
        """Whether a source names the model, be it that it sleeps."""
        return model in self._served or model in self._named

    def _was(self, model: str) -> Limits | None:
        """The limits of a model that had workers a while ago; None: it had none."""
        former = self._former.get(model)
        return former[1] if former is not None and self._clock() - former[0] < FORMER_S else None

    def limits(self, model: str) -> Limits:
        """How many requests of the model are taken; of one that has no workers any more what these said."""
        served = self._served.get(model)
        if served is not None:
            return served.limits
        return self._named.get(model) or self._was(model) or UNLIMITED

    def may_wait(self, model: str) -> float:
        """How many requests of the model may wait at the same time."""
        most = self.limits(model).queued
        return math.inf if most is None else most

    def spare(self, model: str) -> float:
        """How many more requests of the model may be answered now, by its limits. What is counted is what is under
        way at its workers, by all processes, and what this one has at some that leave."""
        most = self.limits(model).in_flight
        if most is None:
            return math.inf
        ending = [worker for worker in self._draining.values() if model in worker.names or model in worker.pinned]
        there = [worker for worker in (*self.of(model), *ending) if worker.role != "prefill"]
        return max(0, most - sum(worker.in_flight for worker in there))

    def adapter(self, name: str) -> str | None:
        """The name, if it is that of a LoRA adapter."""
        return name if name in self._adapters else None

    def without_decode(self) -> list[str]:
        """Models whose every worker has role=prefill: none would answer clients."""
        return [m for m, served in sorted(self._served.items()) if all(w.role == "prefill" for w in served.workers)]

    # --- choosing ---

    def candidates(self, model: str, excluded: Collection[Worker]) -> list[Worker]:
        """The workers that may take a client's request: those that are up, or, when none is, those not checked yet.

        Of these the ones that nothing is held against, or else the least bad (``router.resilience.guard.admitted``).
        """
        served = self._served.get(model)
        if served is None:
            return []
        able = [worker for worker in served.able if worker not in excluded] if excluded else served.able
        up = [worker for worker in able if worker.health.state is _UP]
        return admitted(up or [worker for worker in able if worker.health.usable])

    def prefillers(self, model: str) -> list[Worker]:
        """The workers that may compute prompts for others: those that are up and that nothing is held against."""
        served = self._served.get(model)
        able = () if served is None else served.prefill
        return [worker for worker in able if worker.health.state is _UP and worker.guard.admits()]

    def why_none(self, model: str) -> str:
        """Why no worker takes a request of the model."""
        reasons = {_why_not(worker) for worker in self.of(model) if worker.role != "prefill"}
        return "; ".join(sorted(reasons)) or "it has none now"

    def lease(
        self, worker: Worker, tokens: int = 0, adapter: str | None = None, prefill: int = 0, *, streamed: bool = True
    ) -> Lease:
        """The guard under which a request of about ``tokens`` is sent to the worker. Whoever takes it ends it.

        ``prefill`` of them have to be computed before the first byte of a stream; of an answer that is not
        ``streamed`` nobody sees when that is, so they count for as long as it takes streams there."""
        self._dispatches += 1
        lease = Lease(worker, self._dispatches, tokens, adapter, self._over, prefill)
        if not streamed and prefill:
            now = self._clock()
            self._unseen[lease] = now + (worker.first_byte[STREAM].value(now) or COMPUTED_S)
        return lease

    # --- what an administrator and the clock change ---

    def cordon(self, url: str) -> None:
        """Give the worker no new requests until ``uncordon``; raises NotFound."""
        self._set_cordon(url, True)

    def uncordon(self, url: str) -> None:
        self._set_cordon(url, False)

    def _set_cordon(self, url: str, cordoned: bool) -> None:
        url = check_url(url)
        worker = self.at(url)
        if worker is None:
            raise NotFound(f"no worker has the URL {url}")
        worker.cordoned = cordoned
        if not worker.draining:
            self._refresh(worker.names | worker.pinned)

    def came_up(self, worker: Worker, was_down: bool) -> None:
        """A check found it up. One that is new among others, or was down, starts with a part of its share."""
        if self._slow_start_s > 0 and (was_down or worker.newcomer):
            self._starting[worker] = self._clock()
            worker.share = worker.weight * START
        worker.newcomer = False

    def tick(self, now: float) -> None:
        """What goes by the clock; to be called several times a second."""
        for lease in [lease for lease, due in self._unseen.items() if due <= now]:
            del self._unseen[lease]
            lease.computed()
        if not self._starting:
            return
        for worker, since in list(self._starting.items()):
            part = (now - since) / self._slow_start_s
            worker.share = worker.weight * min(1.0, max(START, part))
            if part >= 1:
                del self._starting[worker]


def _why_not(worker: Worker) -> str:
    if worker.cordoned:
        return "cordoned by an administrator"
    return "not ready yet" if worker.unready else worker.guard.reason or worker.health.reason
