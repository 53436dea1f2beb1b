"""The policy that the configuration asks for: a name, a name with its parameters, or filters, scorers and a picker.

    policy = "round-robin"
    policy = {name = "prefix-affinity", prefix_chars = 4096}
    policy = {filters = [{name = "canary", weights = {old = 9, new = 1}}],
              scorers = [{name = "queue-depth", weight = 2}, "least-requests"], picker = "power-of-two"}

A name of the first two forms stands for such a combination (``POLICIES``). What is not known is an error that lists
what there is: a scheduler that ignores a misspelled weight is found weeks later.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from helios.config import Section
from helios.decoding import converted, from_json
from helios.errors import UsageError
from router.scheduling.canary import Canary
from router.scheduling.homes import MOST, Homes, local
from router.scheduling.kv_usage import KvUsage
from router.scheduling.latency import Latency
from router.scheduling.least_requests import LeastRequests
from router.scheduling.least_tokens import LeastTokens
from router.scheduling.lora_affinity import LoraAffinity
from router.scheduling.max_score import MaxScore
from router.scheduling.policy import Learner, Pipeline, Policy
from router.scheduling.power_of_two import PowerOfTwo
from router.scheduling.prefix_affinity import PrefixAffinity
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.prefix_index import Asked, PrefixIndex, PrefixIndexScorer
from router.scheduling.queue_depth import QueueDepth
from router.scheduling.random_choice import RandomChoice
from router.scheduling.round_robin import RoundRobin
from router.scheduling.session_affinity import SessionAffinity
from router.scheduling.unsaturated import Unsaturated

Chars = Annotated[int, Meta(ge=1, le=65536)]
Factor = Annotated[float, Meta(gt=1.0, le=1000.0)]
Floor = Annotated[int, Meta(ge=1)]
Field = Literal["", "user", "prompt_cache_key", "session_id"]
HEADER: Final = "x-session-id"


@dataclass(frozen=True, slots=True)
class Tools:
    """What policies are made with. ``now``: the clock, in seconds; ``max_age_s``: how long a reading of a worker's
    metrics counts; ``index``: what answers for ``prefix-index``; ``homes``: where it is remembered which worker got
    what, for so many beginnings."""

    now: Callable[[], float]
    rng: random.Random
    max_age_s: float
    index: PrefixIndex = field(default_factory=Asked)
    homes: Callable[[int], Homes] = local


class _None(Section, frozen=True):
    """No parameters."""


class _Prefix(Section, frozen=True):
    prefix_chars: Chars = 1024
    load_factor: Factor = 1.25
    min_requests: Floor = 4


class _Cache(Section, frozen=True):
    entries: Annotated[int, Meta(ge=1024, le=MOST)] = 1 << 17
    slack: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.3


class _Session(Section, frozen=True):
    header: str = HEADER
    field: Field = "user"
    prefix_chars: Annotated[int, Meta(ge=0, le=65536)] = 1024
    load_factor: Factor = 2.0
    min_requests: Floor = 8


class _Canary(Section, frozen=True):
    weights: dict[str, Annotated[float, Meta(ge=0.0)]]
    header: str = HEADER
    field: Field = "user"
    prefix_chars: Chars = 1024


class _Unsaturated(Section, frozen=True):
    queue: Annotated[int, Meta(ge=1)] = 5
    kv_usage: Annotated[float, Meta(gt=0.0)] = 0.95


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing that can be named. ``metrics``: whether it reads the workers' own metrics; ``learns``: whether it is a
    ``Learner``; ``asks``: whether it goes by the index of KV events."""

    parameters: type[Section]
    make: Callable[[Any, Tools], Any]
    metrics: bool = False
    learns: bool = False
    asks: bool = False


def _canary(p: _Canary, t: Tools) -> Canary:
    if not 0 < sum(p.weights.values()) < math.inf:
        raise UsageError("the policy's 'canary' needs weights: a revision's name and a number for each")
    return Canary(p.weights, _header(p.header), p.field, p.prefix_chars, t.rng)


def _session(p: _Session, t: Tools) -> SessionAffinity:
    return SessionAffinity(_header(p.header), p.field, p.prefix_chars, p.load_factor, p.min_requests)


def _index(p: _Cache, t: Tools) -> PrefixIndexScorer:
    return PrefixIndexScorer(t.index, _cache(p, t))


def _cache(p: _Cache, t: Tools) -> PrefixCache:
    return PrefixCache(t.homes(p.entries), p.slack, t.now)


FILTERS: Final[Mapping[str, _Part]] = {
    "canary": _Part(_Canary, _canary),
    "unsaturated": _Part(_Unsaturated, lambda p, t: Unsaturated(p.queue, p.kv_usage, t.now, t.max_age_s), True),
}
SCORERS: Final[Mapping[str, _Part]] = {
    "kv-usage": _Part(_None, lambda p, t: KvUsage(t.now, t.max_age_s), True),
    "latency": _Part(_None, lambda p, t: Latency(t.now)),
    "least-requests": _Part(_None, lambda p, t: LeastRequests()),
    "least-tokens": _Part(_None, lambda p, t: LeastTokens()),
    "lora-affinity": _Part(_None, lambda p, t: LoraAffinity(t.now, t.max_age_s), True),
    "prefix-affinity": _Part(_Prefix, lambda p, t: PrefixAffinity(p.prefix_chars, p.load_factor, p.min_requests)),
    "prefix-cache": _Part(_Cache, _cache, learns=True),
    "prefix-index": _Part(_Cache, _index, learns=True, asks=True),
    "queue-depth": _Part(_None, lambda p, t: QueueDepth(t.now, t.max_age_s), True),
    "session-affinity": _Part(_Session, _session),
}
PICKERS: Final[Mapping[str, _Part]] = {
    "max-score": _Part(_None, lambda p, t: MaxScore()),
    "power-of-two": _Part(_None, lambda p, t: PowerOfTwo(t.rng)),
    "random": _Part(_None, lambda p, t: RandomChoice(t.rng)),
    "round-robin": _Part(_None, lambda p, t: RoundRobin()),
}
_LEAST: Final = {"name": "least-requests", "weight": 1}
POLICIES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    # The part that takes the parameters, and what is combined.
    "canary": ("filters", {"filters": ["canary"], "scorers": ["prefix-affinity"]}),
    "latency": ("scorers", {"scorers": ["latency"]}),
    "least-requests": ("scorers", {"scorers": ["least-requests"]}),
    "least-tokens": ("scorers", {"scorers": ["least-tokens"]}),
    # An adapter moves when its worker has five times the requests of one with a place for it.
    "lora-affinity": ("scorers", {"scorers": [{"name": "lora-affinity", "weight": 4}, _LEAST]}),
    "power-of-two": ("picker", {"picker": "power-of-two"}),
    "prefix-affinity": ("scorers", {"scorers": ["prefix-affinity"]}),
    "prefix-cache": ("scorers", {"scorers": ["prefix-cache"]}),
    "prefix-index": ("scorers", {"scorers": ["prefix-index"]}),
    "queue-depth": ("scorers", {"scorers": [{"name": "queue-depth", "weight": 2}, _LEAST]}),
    "random": ("picker", {"picker": "random"}),
    "round-robin": ("picker", {"picker": "round-robin"}),
    "session-affinity": ("scorers", {"scorers": ["session-affinity"]}),
}
_KINDS: Final = ("filters", "scorers", "picker")


@dataclass(frozen=True, slots=True)
class Built:
    """``reads_metrics``: whether the workers' own metrics have to be scraped for it; ``asks_index``: whether the index
    of KV events has to be asked about each request."""

    policy: Policy
    reads_metrics: bool
    asks_index: bool = False


def build(wanted: str | Mapping[str, Any], tools: Tools) -> Built:
    """Make the policy. Raises UsageError that says what is wrong and lists what there is."""
    table = _combined(wanted)
    metrics, asks = [], []
    learners: list[Learner] = []

    def made(what: str, known: Mapping[str, _Part], entry: Any) -> tuple[float, Any]:
        name, weight, parameters = _entry(what, known, entry)
        part = known[name]
        metrics.append(part.metrics)
        asks.append(part.asks)
        made_ = part.make(_parameters(what, name, part, parameters), tools)
        if part.learns:
            learners.append(made_)
        return weight, made_

    filters = [made("filter", FILTERS, one)[1] for one in _list(table, "filters")]
    scorers = [made("scorer", SCORERS, one) for one in _list(table, "scorers")]
    picker = made("picker", PICKERS, table.get("picker", "max-score"))[1]
    return Built(Pipeline(filters, scorers, picker, learners), any(metrics), any(asks))


def policy_of(wanted: str | Mapping[str, Any], tools: Tools | None = None) -> Policy:
    """The policy alone, with a clock that stands still where none is given."""
    return build(wanted, tools or Tools(lambda: 0.0, random.Random(0), 0.0)).policy  # noqa: S311 - no secret


def reads_metrics(wanted: str | Mapping[str, Any]) -> bool:
    """Whether the policy needs the workers' own metrics."""
    return build(wanted, Tools(lambda: 0.0, random.Random(0), 0.0)).reads_metrics  # noqa: S311 - no secret


def asks_index(wanted: str | Mapping[str, Any]) -> bool:
    """Whether the policy goes by the index of KV events."""
    return build(wanted, Tools(lambda: 0.0, random.Random(0), 0.0)).asks_index  # noqa: S311 - no secret


def explained(wanted: str | Mapping[str, Any]) -> dict[str, Any]:
    """What the policy stands for: its name (None for a combination of its own), and its filters, scorers and picker,
    each with all of its parameters. Raises UsageError."""

    def whole(what: str, known: Mapping[str, _Part], entry: Any) -> dict[str, Any]:
        name, weight, given = _entry(what, known, entry)
        parameters: dict[str, Any] = msgspec.to_builtins(_parameters(what, name, known[name], given))
        return {"name": name, **({"weight": weight} if what == "scorer" else {}), **parameters}

    table = _combined(wanted)
    return {
        "name": wanted if isinstance(wanted, str) else wanted.get("name"),
        "filters": [whole("filter", FILTERS, one) for one in _list(table, "filters")],
        "scorers": [whole("scorer", SCORERS, one) for one in _list(table, "scorers")],
        "picker": whole("picker", PICKERS, table.get("picker", "max-score")),
    }


def known() -> dict[str, list[str]]:
    """The names that a policy can be made of."""
    kinds = {"policies": POLICIES, "filters": FILTERS, "scorers": SCORERS, "pickers": PICKERS}
    return {kind: sorted(names) for kind, names in kinds.items()}


def parse_policy(text: str) -> str | dict[str, Any]:
    """What the command line says: a name, or a table as JSON; raises UsageError."""
    if not text.startswith("{"):
        return text
    try:
        return from_json(text, dict[str, Any])
    except msgspec.DecodeError as error:
        raise UsageError(f"--policy is not valid JSON: {error}") from None


def _combined(wanted: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Filters, scorers and picker of any of the three forms."""
    if isinstance(wanted, str):
        wanted = {"name": wanted}
    if "name" not in wanted:
        for key in wanted:
            if key not in _KINDS:
                raise _unknown("the policy has the unknown key", key, ("name", *_KINDS))
        if not wanted:
            raise UsageError("the policy is empty", hint=f"Known policies: {', '.join(POLICIES)}.")
        return wanted
    parameters = dict(wanted)
    name = parameters.pop("name")
    if name not in POLICIES:
        raise _unknown("there is no policy", name, POLICIES)
    kind, combination = POLICIES[name]
    if mixed := sorted(set(_KINDS) & parameters.keys()):
        raise UsageError(
            f"the policy {name!r} is a combination already and takes no {', '.join(mixed)}",
            hint="Leave out its name to combine filters, scorers and a picker.",
        )
    if not parameters:
        return combination
    if kind == "picker":
        return {**combination, kind: {"name": combination[kind], **parameters}}
    first, *others = combination[kind]
    first = {"name": first} if isinstance(first, str) else first
    return {**combination, kind: [{**first, **parameters}, *others]}


def _list(table: Mapping[str, Any], kind: str) -> list[Any]:
    entries = table.get(kind, [])
    if not isinstance(entries, list):
        raise UsageError(f"the policy's {kind} must be a list")
    names = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise UsageError(f"the policy's {kind} have {twice[0]!r} twice")
    return entries


def _entry(what: str, known: Mapping[str, _Part], entry: Any) -> tuple[str, float, dict[str, Any]]:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise UsageError(f"a {what} of the policy has no name", hint=f"Known: {', '.join(known)}.")
    parameters = dict(entry)
    name = parameters.pop("name")
    if name not in known:
        raise _unknown(f"the policy has the unknown {what}", name, known)
    weight: Any = parameters.pop("weight", 1.0) if what == "scorer" else 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UsageError(f"the weight of the policy's {name!r} must be a number above 0, not {weight!r}")
    return name, float(weight), parameters


def _parameters(what: str, name: str, part: _Part, given: dict[str, Any]) -> Section:
    known = [field.name for field in msgspec.structs.fields(part.parameters)]
    for key in given:
        if key not in known:
            raise _unknown(f"the policy's {what} {name!r} has the unknown parameter", key, known or ["none"])
    try:
        return converted(given, part.parameters)
    except msgspec.ValidationError as error:
        raise UsageError(f"the policy's {what} {name!r} is wrong: {error}") from None


def _header(name: str) -> bytes:
    if not name.isascii() or not all(char.isalnum() or char in "-_" for char in name):
        raise UsageError(f"{name!r} is not the name of a header")
    return name.lower().encode()


def _unknown(what: str, name: Any, known: Iterable[str]) -> UsageError:
    close = difflib.get_close_matches(str(name), known := list(known), 1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return UsageError(f"{what} {name!r}", hint=f"{guess}Known: {', '.join(known)}.")
