"""Metrics of services, for whoever scales by them: what each means is here, once, for KEDA and for autoscalers.

A value that is not known for sure is an error: an autoscaler that gets one leaves replicas as they are, and one that
got a sum without a router that it didn't hear would take some away. What a role's queue is: requests at routers, which
every role has before it, and those that wait in its engines. Of a revision it is the revision's part of them, by its
ready workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from helios.errors import InvalidInput, NotFound, Unavailable
from orchestrator import external
from orchestrator.signals.collector import Collector, Load
from orchestrator.signals.sampler import PART
from orchestrator.signals.served import ROLES, Directory, Served
from orchestrator.signals.window import weighted

LATENCY_S: Final = 120.0
"""Of so many seconds is the time to the first token, as autoscalers have it."""


class Chosen(NamedTuple):
    """Whose workers a metric is about; ``role``, ``revision``: "" for all."""

    namespace: str
    service: str
    role: str = ""
    revision: str = ""


class Values:
    """Of the services of a cluster."""

    def __init__(self, collector: Collector, directory: Directory) -> None:
        self._collector, self._directory = collector, directory
        self._metrics: dict[str, Callable[[Chosen, Served], float]] = {
            external.QUEUED.name: self._queued,
            external.IN_FLIGHT.name: lambda chosen, served: self._load(chosen, served).in_flight,
            external.TOKENS.name: lambda chosen, served: self._load(chosen, served).tokens,
            external.KV_USAGE.name: self._kv_usage,
            external.TTFT.name: self._ttft,
            external.ITL.name: self._itl,
            external.DESIRED.name: self._desired,
        }

    @property
    def names(self) -> list[str]:
        """Of the metrics there are."""
        return sorted(self._metrics)

    def value(self, metric: str, chosen: Chosen) -> float:
        """Raises NotFound where there is no such metric or service, InvalidInput for a role that it has not,
        Unavailable while the value is not known."""
        make = self._metrics.get(metric)
        if make is None:
            raise NotFound(f"there is no metric {metric[:80]!r}", hint=f"There are {', '.join(self.names)}.")
        return make(chosen, self.check(chosen))

    def busy(self, chosen: Chosen) -> bool:
        """Whether anything is asked of the service: requests wait, or are under way. What is known to be there counts
        though something is not known. Raises NotFound, InvalidInput, and Unavailable where nobody knows."""
        served = self.check(chosen)
        load = self._collector.load(served.names)
        if load is not None and (load.held or load.in_flight):
            return True
        self._sure(load)
        return False

    def check(self, chosen: Chosen) -> Served:
        """The service. Raises NotFound, InvalidInput."""
        served = self._directory.find(chosen.namespace, chosen.service)
        if served is None:
            raise NotFound(
                f"there is no InferenceService {chosen.service[:80]!r} in the namespace {chosen.namespace[:80]!r}"
            )
        if chosen.role and chosen.role not in served.roles:
            known = ", ".join(served.roles) if chosen.role in ROLES else ", ".join(ROLES)
            raise InvalidInput(f"{chosen.service} has no workers of the role {chosen.role[:80]!r}; known: {known}")
        return served

    def _load(self, chosen: Chosen, served: Served) -> Load:
        return self._sure(self._collector.load(served.names, chosen.role, chosen.revision))

    def _sure(self, load: Load | None) -> Load:
        if load is None:
            raise Unavailable(
                "no router has said anything lately", hint="The operator's log names those it can't read."
            )
        if load.partial:
            unheard = self._collector.unheard
            which = ", ".join(unheard) if unheard else "one that has not heard of all its processes yet"
            raise Unavailable(f"some router was not heard: {which}")
        return load

    def _read(self, load: Load) -> Load:
        if not load.read:
            raise Unavailable(f"of {load.ready} ready workers {len(load.readings)} have said what they do")
        return load

    def _queued(self, chosen: Chosen, served: Served) -> float:
        load = self._read(self._load(chosen, served))
        held = float(load.held)
        if held and chosen.revision:
            whole = self._load(chosen._replace(revision=""), served).ready
            held *= load.ready / whole if whole else 1.0
        return held + sum(one.waiting for one in load.readings)

    def _kv_usage(self, chosen: Chosen, served: Served) -> float:
        """In percent, summed: an autoscaler divides by the number of workers."""
        return 100 * sum(one.kv_usage for one in self._read(self._load(chosen, served)).readings)

    def _ttft(self, chosen: Chosen, served: Served) -> float:
        """In milliseconds; 0 where there was no stream."""
        self._load(chosen, served)
        outcomes = self._collector.outcomes(served.names, chosen.revision, LATENCY_S)
        return 1000 * (outcomes.first_token_s(PART) or 0.0)

    def _itl(self, chosen: Chosen, served: Served) -> float:
        """In milliseconds; 0 where no token was made."""
        load = self._read(self._load(chosen, served))
        gaps = ((one.token_s, one.tokens) for one in load.readings if one.token_s is not None)
        return 1000 * (weighted(gaps, PART) or 0.0)

    def _desired(self, chosen: Chosen, served: Served) -> float:
        """What the policy has decided, which knows what to do about what is not known."""
        role = chosen.role or served.roles[-1]
        if role not in served.desired:
            raise Unavailable(f"nothing has been decided yet for the role {role} of {chosen.service}")
        return served.desired[role]
