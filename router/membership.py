"""What sources say of workers: read, checked, and put together without I/O.

Several sources may name one worker: the configuration, a file, Kubernetes, a registration. It is one worker, which
serves the models that all of them name. Where they contradict each other (role, revision, weight, key, bootstrap) the
source that stands first in ``RANK`` counts, whoever came first, so that every process and every start comes to the
same; the other is told so. What is wrong is said in a text and left out: one bad entry must not take the good ones
down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal
from urllib.parse import urlsplit

from helios.config import WorkerSettings
from helios.errors import UsageError
from router.disaggregation.bootstrap import wrong_with as wrong_bootstrap
from router.kv.publishers import UNSAID, Said, wrong_with
from router.model_limits import UNLIMITED, Limits, least
from router.worker import Role

CONFIGURATION: Final = "configuration"
RANK: Final = (CONFIGURATION, "file", "kubernetes", "registration")
"""Sources in the order in which they count; others follow by name."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What one source says of one worker, or all of them together."""

    role: Role
    revision: str
    weight: float
    models: tuple[str, ...]
    adapters: frozenset[str]
    cordoned: bool = False
    key_file: str = ""
    kv: Said = UNSAID
    """Where it publishes KV events."""
    bootstrap: str = ""
    """Where those meet it that take blocks from it."""
    limits: Limits = UNLIMITED
    """Of its models, at this router."""


def rank(source: str) -> tuple[int, str]:
    """The key by which sources are sorted."""
    return (RANK.index(source) if source in RANK else len(RANK)), source


def spec_of(url: str, settings: Sequence[WorkerSettings]) -> tuple[Spec | None, list[str]]:
    """Put together what one source says of one URL; also what is wrong with it, in words."""
    problems = []
    first: WorkerSettings | None = None
    models: list[str] = []
    adapters: set[str] = set()
    key_file = ""
    for one in settings:
        if not one.model:
            problems.append(f"the worker {url} has no model name")
        elif not 0 < one.weight < math.inf:
            problems.append(f"the worker {url} has the weight {one.weight:g}, which must be more than 0")
        elif first is not None and (told := _contradiction(first, one)):
            problems.append(f"{url} is configured with two {told}")
        elif wrong := wrong_with(said_of(one)) or wrong_bootstrap(one.bootstrap):
            problems.append(f"the worker {url}: {wrong}")
        elif one.model in models:
            problems.append(f"{one.model}={url} is configured twice")
        else:
            first = first or one
            models.append(one.model)
            key_file = key_file or one.key_file
            adapters.update(name for name in one.adapters if name)
    if first is None:
        return None, problems
    cordoned = any(one.cordoned for one in settings)
    kv = next((said for said in map(said_of, settings) if said != UNSAID and not wrong_with(said)), UNSAID)
    bootstrap = next((one.bootstrap for one in settings if one.bootstrap and not wrong_bootstrap(one.bootstrap)), "")
    limits = least(Limits(one.max_in_flight, one.max_queued) for one in settings)
    spec = Spec(
        first.role, first.revision, first.weight, tuple(models), frozenset(adapters), cordoned, key_file, kv,
        bootstrap, limits,
    )  # fmt: skip
    return spec, problems


def said_of(worker: WorkerSettings) -> Said:
    """What settings say of the worker's KV events."""
    return Said(worker.kv_events, worker.kv_replay, worker.kv_ranks)


def together(url: str, told: Sequence[tuple[str, Spec]]) -> tuple[Spec, list[tuple[str, str]]]:
    """What sources say of one URL, in the order of their rank; also what does not count: (source, in words)."""
    (first, spec), *others = told
    models, adapters, problems = dict.fromkeys(spec.models), set(spec.adapters), []
    key_file, kv, bootstrap, limits = spec.key_file, spec.kv, spec.bootstrap, [spec.limits]
    for source, other in others:
        contradiction = _contradiction(spec, other)
        if contradiction:
            problems.append((source, f"{url}: {first} counts, since {source} and it name two {contradiction}"))
        else:
            models.update(dict.fromkeys(other.models))
            adapters |= other.adapters
            key_file = key_file or other.key_file
            kv = other.kv if kv == UNSAID else kv
            bootstrap = bootstrap or other.bootstrap
            limits.append(other.limits)
    both = Spec(
        spec.role, spec.revision, spec.weight, tuple(models), frozenset(adapters), spec.cordoned, key_file, kv,
        bootstrap, least(limits),
    )  # fmt: skip
    return both, problems


def _contradiction(one: WorkerSettings | Spec, other: WorkerSettings | Spec) -> str:
    if one.role != other.role:
        return f"roles: {one.role} and {other.role}"
    if one.revision != other.revision:
        return f"revisions: {one.revision or 'none'} and {other.revision or 'none'}"
    if one.weight != other.weight:
        return f"weights: {one.weight:g} and {other.weight:g}"
    if one.key_file and other.key_file and one.key_file != other.key_file:
        return f"files of keys: {one.key_file} and {other.key_file}"
    if one.bootstrap and other.bootstrap and one.bootstrap != other.bootstrap:
        return f"bootstraps: {one.bootstrap} and {other.bootstrap}"
    return ""


def touched(settings: Iterable[WorkerSettings]) -> set[str]:
    """The URLs of settings, each in its one form; those that are none are left out."""
    return {url for one in settings if (url := _normal(one.url)[0])}


def by_url(settings: Iterable[WorkerSettings], wanted: set[str]) -> tuple[dict[str, list[WorkerSettings]], list[str]]:
    """Settings of the ``wanted`` URLs; also what is wrong with any URL, in words. Settings without one say only that
    there is such a model."""
    found: dict[str, list[WorkerSettings]] = {}
    problems = []
    for one in settings:
        if not one.url:
            continue
        url, problem = _normal(one.url)
        if problem:
            problems.append(problem)
        elif url in wanted:
            found.setdefault(url, []).append(one)
    for url in sorted(wanted - found.keys()):
        found[url] = []
    return found, problems


_HOST: Final = re.compile(r"[\w.:%-]+")
"""A name, also one in letters beyond ASCII, or an address (IPv6 with its colons and zone)."""


@lru_cache(maxsize=1 << 15)
def _normal(text: str) -> tuple[str, str]:
    """The URL in its one form, or what is wrong with it. Remembered: a source tells all of its workers each time."""
    try:
        return check_url(text), ""
    except UsageError as error:
        return "", f"{error.message}. {error.hint}" if error.hint else error.message


def check_url(text: str) -> str:
    """A worker's base URL without a final slash; raises UsageError."""
    try:
        parts = urlsplit(text)
        port = parts.port
        parts.netloc.encode("ascii" if parts.netloc.isascii() else "idna")
    except ValueError:
        raise UsageError(f"{text!r} is not a worker's URL", hint="Write http://HOST:PORT.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"{text!r} is not a worker's URL", hint="Write http://HOST:PORT.")
    if not _HOST.fullmatch(parts.hostname):
        raise UsageError(
            f"{text!r} names no host: {parts.hostname!r} is none that can be connected to",
            hint="Write the name or the address under which the router reaches the worker, http://HOST:PORT; "
            "'*' and the like are what a server listens at.",
        )
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise UsageError(f"a worker's URL has no query, fragment or credentials: {parts.hostname}:{port}")
    path = parts.path.rstrip("/")
    if path == "/v1" or path.endswith("/v1"):
        raise UsageError(
            f"{text!r} ends with /v1, which the router adds itself", hint=f"Write {text.rstrip('/')[:-3]}."
        )
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


_ROLES: Final[dict[str, Literal["both", "prefill", "decode"]]] = {
    "both": "both", "prefill": "prefill", "decode": "decode",
}  # fmt: skip


def parse_worker(text: str) -> WorkerSettings:
    """Read ``MODEL=URL[,role=ROLE][,revision=R][,weight=W][,adapter=NAME][,kv_events=PLACE][,kv_replay=PLACE]
    [,bootstrap=PLACE]…`` of the command line; raises UsageError."""
    model, equals, rest = text.partition("=")
    url, *options = rest.split(",")
    if not equals or not model or not url:
        raise UsageError(f"{text!r} is not a worker", hint="Write MODEL=http://HOST:PORT[,role=prefill|decode].")
    role: Role = "both"
    revision, weight, adapters, bootstrap = "", 1.0, [], ""
    places = {"kv_events": "", "kv_replay": ""}
    for option in options:
        key, _, value = option.partition("=")
        if key == "role" and value in _ROLES:
            role = _ROLES[value]
        elif key == "revision" and value:
            revision = value
        elif key == "adapter" and value:
            adapters.append(value)
        elif key == "weight" and (number := _weight(value)):
            weight = number
        elif key in places and value and not wrong_with(Said(value)):
            places[key] = value
        elif key == "bootstrap" and value and not wrong_bootstrap(value):
            bootstrap = value
        else:
            raise UsageError(
                f"{option!r} is not an option of a worker",
                hint="Known: role=prefill, role=decode, revision=NAME, weight=NUMBER (more than 0), adapter=NAME, "
                "kv_events=PLACE, kv_replay=PLACE (tcp://HOST:PORT, PORT or none), bootstrap=PLACE (PORT or "
                "HOST:PORT).",
            )
    return WorkerSettings(
        model=model,
        url=check_url(url),
        role=role,
        revision=revision,
        weight=weight,
        adapters=adapters,
        kv_events=places["kv_events"],
        kv_replay=places["kv_replay"],
        bootstrap=bootstrap,
    )


def _weight(text: str) -> float:
    """The number, or 0 for what is no weight."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < math.inf else 0.0
