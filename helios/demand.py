"""What a router says of the demand for its models (``GET /demand``, docs/scaling-signals.md), as it and its readers
have it.

Counts that end in ``_total`` only grow while ``epoch`` stays the same; another epoch begins them anew. Times are in
seconds. What is not known is null: it never is 0.
"""

from __future__ import annotations

from typing import Final, Literal, TypeVar

import msgspec

from helios.decoding import from_json
from helios.errors import Unavailable

T = TypeVar("T")

MAX_BYTES: Final = 16 << 20
"""Longest document, in bytes: a thousand models with ten revisions have about half of it."""
MAX_LINE: Final = 4 << 20
"""Longest line of the stream, in bytes."""
ALIVE_S: Final = 2.0
"""The stream says something at least this often, in seconds."""


class Waiting(msgspec.Struct, frozen=True):
    """Requests of a model that wait in the router. ``tokens``: their estimated tokens; ``oldest_s``: how long the first
    of them has waited; ``what``: for a worker that is up, or for one with less to do."""

    requests: int
    tokens: int
    oldest_s: float
    what: Literal["worker", "capacity"]


class Times(msgspec.Struct, frozen=True):
    """A histogram. ``counts``: not cumulative, one for each of ``bounds`` (upper ones, in seconds), and one beyond."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Answers(msgspec.Struct, frozen=True):
    """What became of requests that a revision answered ("": no worker did). ``failed_total``: with 5xx, or broken off;
    ``refused_total``: other errors; ``elsewhere_total``: attempts that failed there and were made again elsewhere.
    ``first_token``: from the request to the first byte of streams that were answered with 200."""

    revision: str
    ok_total: int
    failed_total: int
    refused_total: int
    elsewhere_total: int
    first_token: Times


class Reading(msgspec.Struct, frozen=True):
    """What a worker said of itself ``age_s`` ago: ``running`` and ``waiting`` requests, and how much of its KV cache is
    used (0 to 1). Since the reading before it generated ``tokens`` after the first ones of answers, ``token_s`` apart
    in the mean; 0 and null: none."""

    url: str
    age_s: float
    running: int
    waiting: int
    kv_usage: float
    tokens: int
    token_s: float | None


class Role(msgspec.Struct, frozen=True):
    """The workers of one model, role and revision. ``ready``: those that get requests; ``in_flight``, ``tokens``: what
    is under way at all of them, as this router counts it; ``prefill_tokens``: those of prompts to be computed yet;
    ``readings``: of those workers that could be asked lately."""

    role: Literal["both", "prefill", "decode"]
    revision: str
    workers: int
    ready: int
    in_flight: int
    tokens: int
    prefill_tokens: int
    readings: tuple[Reading, ...] = ()


class Model(msgspec.Struct, frozen=True):
    """``requests_total``: requests that came; ``idle_s``: since the last one came, null: none has; ``waiting``: null
    when nobody waits."""

    model: str
    requests_total: int
    idle_s: float | None
    waiting: Waiting | None
    roles: tuple[Role, ...]
    answers: tuple[Answers, ...]


class Demand(msgspec.Struct, frozen=True):
    """All of it. ``complete``: every process of the router has been heard of; else what is counted is too little."""

    epoch: str
    complete: bool
    draining: bool
    models: tuple[Model, ...]


class Held(msgspec.Struct, frozen=True):
    """A model of which requests wait."""

    model: str
    waiting: Waiting


class Line(msgspec.Struct, frozen=True):
    """One line of the stream: all models of which requests wait now."""

    epoch: str
    complete: bool
    held: tuple[Held, ...]


def encode(document: Demand | Line) -> bytes:
    """As JSON, without a line end in it."""
    return msgspec.json.encode(document)


def read(document: bytes) -> Demand:
    """Raises Unavailable for what is no such document."""
    return _read(document, Demand)


def read_line(line: bytes) -> Line:
    """Raises Unavailable for what is no line of the stream."""
    return _read(line, Line)


def _read(document: bytes, kind: type[T]) -> T:
    try:
        return from_json(document, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"what the router says of its demand can't be read: {error}") from None
