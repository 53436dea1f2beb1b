"""EndpointSlices, pods and Services -> workers. No I/O: the same objects give the same, in whatever order they came.

An endpoint is a worker if its port is known and something says which models it serves. What a worker is, is said by
keys: as an annotation of its pod, else a label of its pod, else a label of its slice, which a Service's labels become.
A label's value can't hold ``/`` or ``,``, hence the annotations. Where no key says where KV events are published, it is
at a port called ``kv-events``, ``kv-replay``, if there is one; the same holds for ``bootstrap``.

| key | value |
|---|---|
| ``helios.dev/models`` | names it serves, with commas |
| ``helios.dev/model`` | one name |
| ``helios.dev/role`` | ``both``, ``prefill``, ``decode`` |
| ``helios.dev/revision`` | the commit it runs |
| ``helios.dev/weight`` | share of requests relative to the other workers of the model; ``0``: no new ones |
| ``helios.dev/adapters`` | LoRA adapters, with commas |
| ``helios.dev/port`` | name or number of its port |
| ``helios.dev/scheme`` | ``http``, ``https`` |
| ``helios.dev/kv-events`` | where it publishes KV events: a port's name or number, ``tcp://HOST:PORT``, ``none`` |
| ``helios.dev/kv-replay`` | where it is asked for them again, in the same way |
| ``helios.dev/kv-ranks`` | its data-parallel ranks |
| ``helios.dev/bootstrap`` | where those meet it that take blocks from it: a port's name or number, ``HOST:PORT`` |
| ``helios.dev/max-in-flight`` | requests of its models that are answered at the same time |
| ``helios.dev/max-queued`` | requests of its models that wait |

An endpoint that terminates is no worker any more, so it is drained. One that is not ready is a cordoned worker: it gets
no requests, and its model is a known one while it loads. One pod may stand in several slices (while endpoints move
between them, for several Services, for IPv4 and IPv6): it is one worker.

A Service whose annotations or labels name models says that there are such, though no pod of it is there: they sleep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from helios.config import WorkerSettings
from helios.decoding import converted
from helios.errors import UsageError
from helios.http.hosts import bracketed
from helios.kube.endpoints import Endpoint, EndpointSlice
from helios.worker_labels import (
    ADAPTERS,
    BOOTSTRAP,
    EVENTS,
    MAX_IN_FLIGHT,
    MAX_QUEUED,
    MODEL,
    MODELS,
    PORT,
    PREFIX,
    RANKS,
    REPLAY,
    REVISION,
    ROLE,
    SCHEME,
    WEIGHT,
)
from router.discovery.objects import Pod, Service
from router.discovery.source import Found, checked

FAMILIES: Final = ("IPv4", "IPv6", "FQDN")
"""Types of addresses, the preferred first."""

Ports = list[tuple[str, int, str]]
"""Name, number and application protocol of each."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a worker is, as one slice or its pod says. ``who`` is its pod, as far as there is one."""

    who: tuple[str, ...]
    family: int
    host: str
    ports: Ports
    ready: bool
    terminating: bool
    notes: tuple[Mapping[str, str], ...]
    name: str
    slice: str = ""

    def note(self, key: str) -> str:
        """What the first that knows the key says of it; empty: nobody does."""
        return next((notes[key].strip() for notes in self.notes if key in notes), "")


def workers_of(slices: Iterable[EndpointSlice] | None, pods: Iterable[Pod] | None, port: str) -> Found:
    """All workers among them. ``None``: no objects of this type are looked at.

    With both, a worker is an endpoint whose pod is there too. ``port`` is the name or number of the port.
    """
    known = None if pods is None else {(pod.metadata.namespace, pod.metadata.name): pod for pod in pods}
    places = _of_pods(known or {}) if slices is None else _of_slices(slices, known)
    by_pod: dict[tuple[str, ...], list[_Place]] = {}
    for place in places:
        by_pod.setdefault(place.who, []).append(place)
    by_url: dict[str, list[WorkerSettings]] = {}
    problems: set[str] = set()
    for who in sorted(by_pod):
        if any(place.terminating for place in by_pod[who]):
            continue
        try:
            workers = list(_workers(by_pod[who], port))
        except UsageError as error:
            problems.add(f"{min(place.name for place in by_pod[who])}: {error.message}")
            continue
        # An address may be said of two pods for a moment: the one that takes requests is meant.
        there = by_url.get(workers[0].url)
        if there is None or (there[0].cordoned and not workers[0].cordoned):
            by_url[workers[0].url] = workers
    return Found(tuple(one for url in sorted(by_url) for one in by_url[url]), tuple(sorted(problems)))


def asleep(services: Iterable[Service]) -> Found:
    """The models that Services name: settings without a URL, one for each model, revision and limits."""
    found: dict[tuple[str, ...], WorkerSettings] = {}
    problems: set[str] = set()
    for one in services:
        its = one.metadata
        notes = {**(its.labels or {}), **(its.annotations or {})}
        for model in _models(notes.get(MODELS, ""), notes.get(MODEL, "")):
            raw = {
                "model": model, "url": "", "revision": notes.get(REVISION, ""),
                "max_in_flight": notes.get(MAX_IN_FLIGHT) or None, "max_queued": notes.get(MAX_QUEUED) or None,
            }  # fmt: skip
            try:
                settings = converted(raw, WorkerSettings, strict=False)
            except msgspec.ValidationError as error:
                problems.add(f"{its.namespace}/{its.name}: its labels are wrong: {error}")
            else:
                limits = str(settings.max_in_flight), str(settings.max_queued)
                found[model, settings.revision, *limits] = settings
    return Found(tuple(found[key] for key in sorted(found)), tuple(sorted(problems)))


def _models(several: str, one: str) -> list[str]:
    """What ``MODELS`` names, else ``MODEL``; sorted."""
    return sorted({name.strip() for name in (several.split(",") if several.strip() else [one])} - {""})


def _of_slices(slices: Iterable[EndpointSlice], pods: Mapping[tuple[str, str], Pod] | None) -> Iterator[_Place]:
    for one in slices:
        if one.address_type not in FAMILIES:
            continue
        ports = [(p.name or "", p.port, p.app_protocol or "") for p in one.ports or () if p.port is not None]
        for endpoint in one.endpoints or ():
            place = _of_endpoint(one, endpoint, ports, pods)
            if place is not None:
                yield place


def _of_endpoint(
    one: EndpointSlice, endpoint: Endpoint, ports: Ports, pods: Mapping[tuple[str, str], Pod] | None
) -> _Place | None:
    if not endpoint.addresses:
        return None
    host, target, pod = endpoint.addresses[0], endpoint.target_ref, None
    namespace = one.metadata.namespace
    if target is not None and target.kind == "Pod":
        namespace = target.namespace or namespace
        pod = None if pods is None else pods.get((namespace, target.name))
        who, name = (namespace, target.name, target.uid), f"{namespace}/{target.name}"
        if pod is not None and target.uid and pod.metadata.uid != target.uid:
            pod = None  # one of the same name, before or after it
    else:
        who, name = (namespace, "", host), f"{namespace}/{one.metadata.name} ({host})"
    if pods is not None and pod is None:
        return None
    conditions = endpoint.conditions
    # What is not said of an endpoint counts as ready, and as not terminating (discovery.k8s.io/v1).
    ready = conditions is None or conditions.ready is not False
    terminating = conditions is not None and conditions.terminating is True
    notes: tuple[Mapping[str, str], ...] = (one.metadata.labels or {},)
    if pod is not None:
        terminating = terminating or pod.metadata.deletion_timestamp is not None
        notes = (pod.metadata.annotations or {}, pod.metadata.labels or {}, *notes)
    family = FAMILIES.index(one.address_type)
    return _Place(who, family, host, ports, ready, terminating, notes, name, one.metadata.name)


def _of_pods(pods: Mapping[tuple[str, str], Pod]) -> Iterator[_Place]:
    for (namespace, name), pod in pods.items():
        status, metadata = pod.status, pod.metadata
        if status.pod_ip is None or status.phase in ("Succeeded", "Failed"):
            continue
        ports = [(p.name or "", p.container_port, "") for c in pod.spec.containers for p in c.ports or ()]
        ready = any(c.type == "Ready" and c.status == "True" for c in status.conditions or ())
        yield _Place(
            (namespace, name, metadata.uid), int(":" in status.pod_ip), status.pod_ip, ports, ready,
            metadata.deletion_timestamp is not None, (metadata.annotations or {}, metadata.labels or {}),
            f"{namespace}/{name}",
        )  # fmt: skip


def _workers(places: list[_Place], port: str) -> Iterator[WorkerSettings]:
    """The worker that all these places are, once for each model. Raises UsageError."""
    places = sorted(places, key=lambda place: (place.family, place.host, place.slice))
    family, host = places[0].family, places[0].host
    places = [place for place in places if (place.family, place.host) == (family, host)]
    notes = tuple(notes for place in places for notes in place.notes)
    ports = sorted({one for place in places for one in place.ports})
    place = _Place(places[0].who, family, host, ports, any(p.ready for p in places), False, notes, "")
    models = _models(place.note(MODELS), place.note(MODEL))
    if not models:
        raise UsageError(f"nothing says which models it serves: annotate it with {MODELS}")
    number, protocol = _port(ports, place.note(PORT) or port)
    scheme = place.note(SCHEME) or ("https" if protocol == "https" else "http")
    if scheme not in ("http", "https"):
        raise UsageError(f"{SCHEME} is {scheme!r}: it must be http or https")
    for model in models:
        yield _settings(place, model, f"{scheme}://{bracketed(host)}:{number}")


def _settings(place: _Place, model: str, url: str) -> WorkerSettings:
    weight = place.note(WEIGHT) or "1"
    none = weight == "0"  # a worker's weight is more than 0: this one is to get no new requests
    raw = {
        "model": model, "url": url, "role": place.note(ROLE) or "both", "revision": place.note(REVISION),
        "weight": "1" if none else weight, "cordoned": none or not place.ready,
        "adapters": [name.strip() for name in place.note(ADAPTERS).split(",") if name.strip()],
        "kv_events": _place_of(place, EVENTS), "kv_replay": _place_of(place, REPLAY),
        "kv_ranks": place.note(RANKS) or "0", "bootstrap": _place_of(place, BOOTSTRAP),
        "max_in_flight": place.note(MAX_IN_FLIGHT) or None, "max_queued": place.note(MAX_QUEUED) or None,
    }  # fmt: skip
    try:
        return checked(converted(raw, WorkerSettings, strict=False))
    except msgspec.ValidationError as error:
        raise UsageError(f"its labels are wrong: {error}") from None


def _place_of(place: _Place, key: str) -> str:
    """What the key says; the name of a port, or without the key a port that is called so, becomes its number."""
    said = place.note(PREFIX + key)
    return next((str(number) for name, number, _ in place.ports if name == (said or key)), said)


def _port(ports: Ports, wanted: str) -> tuple[int, str]:
    """Number and protocol of the port that is wanted. A single one counts whatever it is called."""
    for name, number, protocol in ports:
        if wanted in (name, str(number)):
            return number, protocol
    if wanted.isascii() and wanted.isdigit() and 0 < int(wanted) < 65536:
        return int(wanted), ""
    if len(ports) == 1:
        return ports[0][1], ports[0][2]
    listed = ", ".join(f"{name or 'unnamed'} {number}" for name, number, _ in ports) or "none"
    raise UsageError(f"it has no port {wanted!r}, but {listed}")
