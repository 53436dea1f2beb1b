"""Traces of model loads for replaying cache policies: fixed before a policy was tuned on them, every one from a seed.

A load opens all files of a model: two small ones and its shards. Sizes are in bytes, times in seconds. What the shapes
stand for: popularity that stays (``zipf``), that moves (``drift``), with evaluations that touch a model once
(``scans``), with versions that replace each other (``releases``), with days and nights (``seasonal``), and a round that
is larger than the cache (``loop``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LOAD_S = 300.0
"""Time between two loads."""

TUNING = tuple(range(3))
"""Seeds that a policy may be chosen by."""

HELD_OUT = (101, 102)
"""Seeds that it is judged by."""


@dataclass(frozen=True, slots=True)
class Access:
    """One file is opened."""

    at: float
    key: str
    size: int
    group: str


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    files: tuple[tuple[str, int], ...]


def model(rng: random.Random, name: str) -> Model:
    """A model of 0.3 to about 150 GiB: config, tokenizer, shards of at most 5 GiB."""
    total = int(min(150, max(0.3, rng.lognormvariate(2.3, 1.1))) * GIB)
    count = -(-total // (5 * GIB))
    shards = [(f"{name}/shard-{i}", total // count) for i in range(count)]
    return Model(name, ((f"{name}/config", 2 * KIB), (f"{name}/tokenizer", rng.randrange(1, 12) * MIB), *shards))


def zipf(seed: int, loads: int = 700) -> Iterator[Access]:
    rng = random.Random(seed)
    models = [model(rng, f"m{i}") for i in range(60)]
    return _play(_weighted(rng, models, 0.9) for _ in range(loads))


def drift(seed: int, loads: int = 700) -> Iterator[Access]:
    """Every 100 loads a sixth of the models changes places."""
    rng = random.Random(seed)
    models = [model(rng, f"m{i}") for i in range(60)]

    def pick() -> Iterator[Model]:
        for number in range(loads):
            if number and number % 100 == 0:
                for _ in range(10):
                    a, b = rng.randrange(60), rng.randrange(60)
                    models[a], models[b] = models[b], models[a]
            yield _weighted(rng, models, 1.0)

    return _play(pick())


def scans(seed: int, loads: int = 700) -> Iterator[Access]:
    """A third of the loads is of models that nobody loads again, in runs of 20."""
    rng = random.Random(seed)
    models = [model(rng, f"m{i}") for i in range(40)]

    def pick() -> Iterator[Model]:
        for number in range(loads):
            if number % 60 >= 40:
                yield model(rng, f"once{number}")
            else:
                yield _weighted(rng, models, 0.9)

    return _play(pick())


def releases(seed: int, loads: int = 700) -> Iterator[Access]:
    """Every 25 loads one model gets a new version with other shards; the old one is not loaded any more."""
    rng = random.Random(seed)
    models = [model(rng, f"m{i}-v0") for i in range(40)]

    def pick() -> Iterator[Model]:
        for number in range(loads):
            if number and number % 25 == 0:
                which = rng.randrange(40)
                models[which] = model(rng, f"m{which}-v{number}")
            yield _weighted(rng, models, 0.8)

    return _play(pick())


def seasonal(seed: int, loads: int = 1200) -> Iterator[Access]:
    """Day and night have models of their own, and some are always wanted; 60 loads each."""
    rng = random.Random(seed)
    always, day, night = ([model(rng, f"{kind}{i}") for i in range(20)] for kind in ("always", "day", "night"))

    def pick() -> Iterator[Model]:
        for number in range(loads):
            own = day if (number // 60) % 2 == 0 else night
            yield _weighted(rng, always if rng.random() < 0.4 else own, 0.9)

    return _play(pick())


def loop(seed: int, loads: int = 600) -> Iterator[Access]:
    """One round after another over 24 models."""
    rng = random.Random(seed)
    models = [model(rng, f"m{i}") for i in range(24)]
    return _play(models[number % 24] for number in range(loads))


TRACES: dict[str, Callable[[int], Iterator[Access]]] = {
    "zipf": zipf,
    "drift": drift,
    "scans": scans,
    "releases": releases,
    "seasonal": seasonal,
    "loop": loop,
}


def _weighted(rng: random.Random, models: list[Model], skew: float) -> Model:
    return rng.choices(models, [1 / (rank + 1) ** skew for rank in range(len(models))])[0]


def _play(models: Iterator[Model]) -> Iterator[Access]:
    for number, chosen in enumerate(models):
        for step, (key, size) in enumerate(chosen.files):
            yield Access(number * LOAD_S + step, key, size, chosen.name)
