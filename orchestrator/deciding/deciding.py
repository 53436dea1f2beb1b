"""All services' decisions, kept up with the cluster and with what routers say: a ``Scaling`` for the reconcilers.

Each process knows which services there are and tells the signals of them (``sync``), so that whoever asks any process
for external metrics gets the numbers that the leader wrote. Only the leader decides: it begins with what the statuses
remember (``begin``), decides for a service when its turn comes first, and then each ``look_s`` seconds, or at once when
a request is held for one that sleeps; a decision that changes something is a turn of the service, and so is each look
while its requests move between commits.

All of it belongs to the event loop, and nothing in it awaits but ``run``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from helios import worker_labels
from helios.errors import InvalidInput
from helios.kube.kinds import DEPLOYMENT, Kind
from helios.pulse import Pulse
from orchestrator.actions import Key, Manifest, View
from orchestrator.api import parse
from orchestrator.api.model import ModelSpec
from orchestrator.api.service import ServiceSpec
from orchestrator.deciding.mind import Mind
from orchestrator.deciding.plan import Plan, asked_as, plan_of
from orchestrator.reconcile import names
from orchestrator.reconcile.fleet import CREATED, moved_by, roles
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL, SCALED_OBJECT
from orchestrator.reconcile.observed import Health, Wanted, moment
from orchestrator.reconcile.site import Site
from orchestrator.scaling.share import Want, share
from orchestrator.scaling.signals import UNHEARD
from orchestrator.scaling.signals import Signals as Sample
from orchestrator.signals.sampler import Sampler
from orchestrator.signals.served import Served
from orchestrator.signals.serving import Signals

log = logging.getLogger("helios.operator")

SYNC_S: Final = 1.0
"""How often is looked which services there are, in seconds."""
PAUSE_S: Final = 0.02
"""Between two looks at what may have changed, in seconds."""
MEDIAN: Final = 0.5


@dataclass
class _Service:
    """What is known of one. ``mark``: what its plan was made of."""

    mark: tuple[object, ...]
    plan: Plan
    samplers: dict[str, Sampler]
    mind: Mind | None = None
    due: float = 0.0
    deaf_until: float = 0.0
    """A request was held, and there was no worker to be had: it is looked again then."""
    spec: ServiceSpec | None = field(default=None, repr=False)


class Deciding:
    """See above. ``signals`` None: no router is asked. ``attach`` it to what it decides for before it is used."""

    def __init__(
        self, site: Site, signals: Signals | None, *, look_s: float, ceilings: Mapping[str, int] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._site, self._signals, self._look_s, self._wall = site, signals, look_s, wall
        self._ceilings, self._reader = dict(ceilings or {}), parse.Reader()
        self._services: dict[Key, _Service] = {}
        self._told: dict[Key, tuple[object, ...]] = {}
        self._pulse = signals.pulse if signals is not None else Pulse()
        self._view: View | None = None
        self._leads: Callable[[], bool] = lambda: False
        self._add: Callable[[Kind, Key], None] = lambda kind, key: None

    def attach(self, view: View, leads: Callable[[], bool], add: Callable[[Kind, Key], None]) -> None:
        """``view``: the caches; ``leads``: whether this process may act; ``add``: has an object have a turn."""
        self._view, self._leads, self._add = view, leads, add

    def begin(self) -> None:
        """This process leads from now on: what it knew may be old, what the statuses remember counts."""
        self._services.clear()

    # --- a Scaling ---

    def wanted(self, namespace: str, service: str) -> Mapping[str, Wanted]:
        found = self._decided(Key(namespace, service))
        return found.mind.shown if found is not None and found.mind is not None and not found.plan.fixed else {}

    def state(self, namespace: str, service: str) -> str:
        key = Key(namespace, service)
        found = self._decided(key)
        if found is not None and found.mind is not None:
            return found.mind.text
        manifest = self._found(key)
        return "" if manifest is None else _status(manifest).get("scaling", "")

    def health(self, namespace: str, service: str) -> Mapping[str, Health]:
        found, manifest = self._decided(Key(namespace, service)), self._found(Key(namespace, service))
        if self._signals is None or found is None or manifest is None:
            return {}
        collector, asked, now = self._signals.collector, found.plan.names, self._wall()
        health = {}
        for one in _status(manifest).get("revisions") or ():
            commit = one["commit"]
            load = collector.load(asked, "", commit)
            if load is None:
                continue
            outcomes = collector.outcomes(asked, commit, max(0.0, now - moment(one.get("since", ""))))
            bad = outcomes.failed + outcomes.elsewhere
            count = outcomes.ok + outcomes.refused + bad
            first = outcomes.first_token_s(MEDIAN)
            health[commit] = Health(
                count, 100 * bad / count if count else None, None if first is None else 1000 * first,
                None if load.partial else load.in_flight,
            )  # fmt: skip
        return health

    def prefetch(self, namespace: str, model: str) -> int | None:
        """As many as the service that expects most. None: some service that uses it was not decided for yet."""
        most = 0  # where people say how many workers there are, nothing is expected
        for manifest in self._seen.all(INFERENCE_SERVICE, namespace):
            if manifest["spec"].get("model", {}).get("name") == model:
                found = self._services.get(_key(manifest))
                if found is None or found.mind is None:
                    return None
                most = max(most, 0 if found.plan.fixed else found.mind.prefetch)
        return most

    # --- looking ---

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            version = self._pulse.version
            wait_s = self.turn()
            await self._pulse.after(version, wait_s)
            await asyncio.sleep(PAUSE_S)

    def turn(self) -> float:
        """Tell the signals which services there are, and decide what is due. Seconds until the next is."""
        self.sync()
        if not self._leads():
            return SYNC_S
        now, next_s = self._wall(), SYNC_S
        for key, one in list(self._services.items()):
            if one.mind is None or one.plan.fixed:
                continue
            if one.due <= now or one.due > now + self._look_s:  # the second: the clock was set back
                self._look(key, now)
            elif (now >= one.deaf_until or one.deaf_until > now + self._look_s) and self._held(one):
                self._look(key, now)
                if not any(one.mind.granted.values()):
                    one.deaf_until = one.due
            next_s = min(next_s, max(0.0, one.due - now))
        return next_s

    def sync(self) -> None:
        """Which services there are, and what is wanted of each: as their statuses say, in every process."""
        there = set()
        for manifest in self._seen.all(INFERENCE_SERVICE):
            key = _key(manifest)
            there.add(key)
            model = self._model(key.namespace, manifest)
            mark = (_version(manifest), _generation(model))
            if self._told.get(key) != mark:
                self._told[key] = mark
                self._tell(key, manifest, model)
        for key in self._told.keys() - there:
            del self._told[key]
            self._services.pop(key, None)
            if self._signals is not None:
                self._signals.services.remove(key.namespace, key.name)

    def _tell(self, key: Key, manifest: Manifest, model: Manifest | None) -> None:
        if self._signals is None:
            return
        try:
            spec = self._reader.service_spec(manifest)
        except InvalidInput:
            return
        desired, its = _status(manifest).get("roles") or {}, roles(spec)
        served = Served(
            names=asked_as(spec, self._model_spec(model)), roles=tuple(its),
            desired={role: desired[name].get("desired", 0) for role in its if (name := names.ROLES[role]) in desired},
        )  # fmt: skip
        self._signals.services.put(key.namespace, key.name, served)

    def _held(self, one: _Service) -> bool:
        """Whether a request waits for one that sleeps."""
        assert one.mind is not None
        if self._signals is None or any(one.mind.granted.values()):
            return False
        load = self._signals.collector.load(one.plan.names)
        return load is not None and load.held > 0

    # --- deciding ---

    @property
    def _seen(self) -> View:
        assert self._view is not None, "nothing is attached"
        return self._view

    def _found(self, key: Key) -> Manifest | None:
        return self._seen.get(INFERENCE_SERVICE, key.namespace, key.name)

    def _model(self, namespace: str, manifest: Manifest) -> Manifest | None:
        return self._seen.get(MODEL, namespace, str((manifest["spec"].get("model") or {}).get("name", "")))

    def _model_spec(self, manifest: Manifest | None) -> ModelSpec | None:
        if manifest is None:
            return None
        try:
            return self._reader.model_spec(manifest)
        except InvalidInput:
            return None

    def _decided(self, key: Key) -> _Service | None:
        """The service with its plan as it is now, and a decision if there is to be one; None: its spec can't be."""
        manifest = self._found(key)
        if manifest is None:
            return None
        model = self._model(key.namespace, manifest)
        mark = (manifest["metadata"].get("uid"), _generation(manifest), _generation(model))
        one = self._services.get(key)
        if one is None or one.mark != mark:
            try:
                spec = self._reader.service_spec(manifest)
            except InvalidInput:
                return None
            plan = plan_of(spec, self._model_spec(model), self._look_s, heard=self._signals is not None)
            # After people have said how many there are, what the status has counts.
            kept = one.mind if one is not None and one.mark[0] == mark[0] and not one.plan.fixed else None
            same = one is not None and one.plan.names == plan.names and set(one.plan.roles) == set(plan.roles)
            samplers = one.samplers if one is not None and same else self._samplers(plan)
            one = self._services[key] = _Service(mark, plan, samplers, kept, spec=spec)
        if one.mind is None:
            one.mind = Mind(_status(manifest).get("scaling", ""), self._last(manifest, one.plan), self._wall())
        if not one.plan.fixed and (not one.due or not one.mind.decided):
            self._look(key, self._wall(), first=True)
        return one

    def _samplers(self, plan: Plan) -> dict[str, Sampler]:
        if self._signals is None:
            return {}
        return {role: self._signals.sampler(plan.names, role) for role in plan.roles}

    def _look(self, key: Key, now: float, *, first: bool = False) -> None:
        """Decide for one service. ``first``: it has a turn already."""
        one, manifest = self._services[key], self._found(key)
        if manifest is None or one.mind is None:
            return
        one.due = now + self._look_s
        status = _status(manifest).get("roles") or {}
        seen = {}
        for role in one.plan.roles:
            ready = int((status.get(names.ROLES[role]) or {}).get("ready", 0))
            there = self._there(manifest, one, role)
            if self._signals is None:
                seen[role] = Sample(replicas=there, ready=ready, router_age_s=UNHEARD, partial=True)
            else:
                seen[role] = one.samplers[role].sample(there, ready)
        if not first and len(_status(manifest).get("revisions") or ()) > 1:
            self._add(INFERENCE_SERVICE, key)  # requests move: what is heard of the commits may end that
        nodes = one.mind.prefetch
        alike = [other for other in self._services.values() if other.plan.names == one.plan.names]
        one.mind.others = len(alike) - 1 if one.plan.names else 0
        one.mind.look(now, one.plan, seen)
        for other in self._grant(key, now):
            if other != key or not first:
                self._add(INFERENCE_SERVICE, other)
        if one.mind.prefetch != nodes or first:
            self._add(MODEL, Key(key.namespace, str(manifest["spec"]["model"]["name"])))

    def _there(self, manifest: Manifest, one: _Service, role: str) -> int:
        """Workers that the cluster was asked for. Where the operator moves them that is what it wanted last: while
        requests move between commits there are more. An autoscaler's number is in the Deployment."""
        assert one.mind is not None
        assert one.spec is not None
        wanted = one.mind.granted.get(role, 0)
        if not wanted or moved_by(one.spec, role, self._site, self._seen.served(SCALED_OBJECT)) == "Operator":
            return wanted
        counts = _replicas(self._seen, manifest).get(role, [])
        return counts[0] if len(counts) == 1 and counts[0] else wanted

    def _last(self, manifest: Manifest, plan: Plan) -> dict[str, int]:
        """What was wanted last, as the status says; without one what there is."""
        said, there = _status(manifest).get("roles") or {}, _replicas(self._seen, manifest)
        found = {}
        for role in plan.roles:
            its = said.get(names.ROLES[role])
            found[role] = sum(there.get(role, [])) if its is None else int(its.get("desired", 0))
        return found

    def _grant(self, key: Key, now: float) -> list[Key]:
        """See to ceilings; the services of which something is to be shown."""
        if not self._ceilings:
            one = self._services[key]
            assert one.mind is not None
            granted = {_role(want): want.replicas for want in one.mind.wants(str(key), one.plan)}
            return [key] if one.mind.grant(now, one.plan, granted) else []
        wants: list[Want] = []
        for other, one in self._services.items():
            if one.mind is not None and one.mind.decided and not one.plan.fixed:
                for want in one.mind.wants(str(other), one.plan):
                    wants.append(_pooled(want, one.plan, self._ceilings))
        shared, changed = share(wants, self._ceilings), []
        for other, one in self._services.items():
            mine = {_role(want): shared[want.name] for want in wants if want.name.rpartition("/")[0] == str(other)}
            if mine and one.mind is not None and one.mind.grant(now, one.plan, mine):
                changed.append(other)
        return changed


def _pooled(want: Want, plan: Plan, ceilings: Mapping[str, int]) -> Want:
    """In the pool of its type, if that has a ceiling, else in its resource's."""
    its = plan.roles[_role(want)]
    pool = next((kind for kind in its.kinds if kind in ceilings), "")
    return Want(
        name=want.name, replicas=want.replicas, needed=want.needed, min_replicas=want.min_replicas,
        priority=want.priority, pool=pool or "no ceiling", units=want.units,
    )  # fmt: skip


def _role(want: Want) -> str:
    return want.name.rpartition("/")[2]


def _replicas(view: View, manifest: Manifest) -> dict[str, list[int]]:
    """Replicas of its Deployments, by role."""
    found: dict[str, list[int]] = {}
    for one in view.owned(DEPLOYMENT, manifest["metadata"].get("uid", "")):
        role = (one["metadata"].get("labels") or {}).get(worker_labels.ROLE, "")
        found.setdefault(role, []).append(one.get("spec", {}).get("replicas", CREATED))
    return found


def _key(manifest: Manifest) -> Key:
    return Key(manifest["metadata"]["namespace"], manifest["metadata"]["name"])


def _status(manifest: Manifest) -> Manifest:
    return manifest.get("status") or {}


def _version(manifest: Manifest) -> str:
    return str(manifest["metadata"].get("resourceVersion", ""))


def _generation(manifest: Manifest | None) -> tuple[str, int] | None:
    metadata = None if manifest is None else manifest["metadata"]
    return None if metadata is None else (str(metadata.get("uid", "")), int(metadata.get("generation", 1)))
