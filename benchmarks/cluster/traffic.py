"""Seeded traffic of many models over weeks: when each request comes and how long a worker is busy with it.

Every trace has 100 models of very different popularity (Zipf). A model's rate is a product: its share, its users' hours
(their region's clock, days off), the day's luck, and noise that lasts for about an hour; requests are a Poisson process
at that rate. A request takes a time of its own (lognormal), whatever else runs. The traces:

- ``diurnal``: that, and nothing else. One model in five is used by programs, day and night;
- ``bursty``: users come as often, but with some eight requests each, half a minute between them;
- ``flash``: ``diurnal``, and a dozen times a week a model, whichever, suddenly gets some requests a second for a while;
- ``tail``: like ``diurnal``, but far more uneven: most models get a few requests a day.

What was here was written before the forecast was, and was not changed after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

DAY: Final = 86_400.0
WEEK: Final = 7 * DAY
MONDAY: Final = 1_767_571_200.0
"""2026-01-05 00:00 UTC, when traces begin: a Monday, in Unix seconds."""
NOISE_S: Final = 600.0
"""Rates are steady for so long, in seconds."""
KINDS: Final = ("diurnal", "bursty", "flash", "tail")

Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a replica takes. Sizes are bytes."""

    name: str
    gpus: int
    size: float
    service_s: float
    """How long a request keeps a worker busy, on average, in seconds."""
    slots: int = 8
    """Requests that a replica works at a time. Few, so that a simulated week has few requests: one stands for several.
    """


@dataclass(frozen=True, slots=True)
class Stream:
    """One model's requests: when they come, in seconds since the beginning, ascending, and how long each takes."""

    model: ModelSpec
    at: Times
    takes: Times


def traffic(kind: str, seed: int, weeks: int, models: int = 100, rate: float = 3.0) -> list[Stream]:
    """``rate``: requests a second of all models together, on average. Raises ValueError for another kind."""
    random, specs, rates = _planned(kind, seed, weeks, models, rate)
    streams = [_sessions(steps, random, weeks) if kind == "bursty" else _poisson(steps, random) for steps in rates]
    if kind == "flash":
        for _ in range(12 * weeks):
            number, crowd = int(random.integers(models)), _crowd(weeks, random)
            streams[number] = np.sort(np.concatenate([streams[number], crowd]))
    return [
        Stream(spec, at, spec.service_s * random.lognormal(-0.32, 0.8, len(at)))
        for spec, at in zip(specs, streams, strict=True)
    ]


def planned(kind: str, seed: int, weeks: int, models: int = 100, rate: float = 3.0) -> list[tuple[ModelSpec, Times]]:
    """Of each model of the same ``traffic``, the requests a second that it gets on average in each ``NOISE_S``: what
    nobody can know who doesn't know the future, but for when requests come."""
    _, specs, rates = _planned(kind, seed, weeks, models, rate)
    return list(zip(specs, rates, strict=True))


def _planned(
    kind: str, seed: int, weeks: int, models: int, rate: float
) -> tuple[np.random.Generator, list[ModelSpec], list[Times]]:
    if kind not in KINDS:
        raise ValueError(f"no such trace: {kind}; there are {', '.join(KINDS)}")
    random = np.random.default_rng([seed, KINDS.index(kind)])
    shares = 1.0 / np.arange(1, models + 1) ** (1.8 if kind == "tail" else 1.1)
    shares /= shares.sum()
    specs = [_spec(number, random) for number in range(models)]
    return random, specs, [rate * share * _shape(weeks, random) for share in shares]


def _spec(number: int, random: np.random.Generator) -> ModelSpec:
    """8B, 32B or 70B in bf16."""
    gpus, size, service_s = ((1, 16e9, 12.0), (2, 65e9, 20.0), (4, 140e9, 30.0))[
        int(random.choice(3, p=(0.6, 0.25, 0.15)))
    ]
    return ModelSpec(f"org/model-{number:03}", gpus, size, service_s)


def _shape(weeks: int, random: np.random.Generator) -> Times:
    """A model's rate in each step of NOISE_S, beside its average."""
    steps = int(weeks * WEEK / NOISE_S)
    at = np.arange(steps) * NOISE_S
    offset = float(random.choice([-8, -6, -5, 0, 1, 2, 8, 9], p=[0.15, 0.1, 0.1, 0.1, 0.2, 0.1, 0.15, 0.1]))
    local = at / 3600 + offset
    hour, day = local % 24, np.floor(local / 24).astype(int) % 7
    bumps = np.exp(-(((hour - 10.8) / 1.9) ** 2)) + 0.9 * np.exp(-(((hour - 15.2) / 2.3) ** 2))
    machine = random.random() < 0.2
    base = random.uniform(0.4, 0.8) if machine else random.uniform(0.01, 0.08)
    shape = base + bumps
    weekend = random.uniform(0.6, 1.0) if machine else random.uniform(0.1, 0.5)
    shape = shape * np.where(day >= 5, weekend, 1.0)
    luck = random.lognormal(0.0, 0.15, weeks * 7 + 3)
    shape = shape * luck[np.floor(local / 24).astype(int) + 1]
    shape = shape * (1 + random.normal(0.0, 0.1)) ** (at / WEEK)
    kept = np.exp(-NOISE_S / 3600)
    noise = np.empty(steps)
    level, kicks = 0.0, random.normal(0.0, 0.25 * np.sqrt(1 - kept**2), steps)
    for number in range(steps):
        level = kept * level + kicks[number]
        noise[number] = level
    shape = shape * np.exp(noise)
    return np.asarray(shape / shape.mean())


def _poisson(steps: Times, random: np.random.Generator) -> Times:
    counts = random.poisson(steps * NOISE_S)
    at = np.repeat(np.arange(len(steps)) * NOISE_S, counts) + random.random(int(counts.sum())) * NOISE_S
    return np.sort(at)


def _sessions(steps: Times, random: np.random.Generator, weeks: int) -> Times:
    """As many requests, but by users who come with eight on average."""
    starts = _poisson(steps / 8, random)
    lengths = random.geometric(1 / 8, len(starts))
    gaps = random.exponential(30.0, int(lengths.sum()))
    first = np.cumsum(lengths) - lengths
    gaps[first] = 0.0
    along = np.cumsum(gaps)
    at = np.repeat(starts - along[first], lengths) + along
    return np.sort(at[at < weeks * WEEK])


def _crowd(weeks: int, random: np.random.Generator) -> Times:
    """One flash crowd: within a minute to its height of 1 to 4 requests a second, gone bit by bit over half an hour."""
    start, height = random.uniform(0, weeks * WEEK - 7200), random.uniform(1.0, 4.0)
    count = random.poisson(height * (30 + 900))
    rising = random.random(count) < 30 / 930
    at = np.where(rising, 60 * np.sqrt(random.random(count)), 60 + random.exponential(900.0, count))
    return np.asarray(start + at[at < 7000])
