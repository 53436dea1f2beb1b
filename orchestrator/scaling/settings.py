"""How one model, or one role of it, is scaled (docs/scaling.md says what for)."""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from helios.config import Section

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Rate(Section, frozen=True):
    """Most that may change within ``period_s`` seconds: ``replicas`` or ``percent`` of what was there at its beginning,
    whichever is more. Both 0: no limit."""

    replicas: Count = 0
    percent: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    period_s: Positive = 60.0


class ForecastSettings(Section, frozen=True):
    """What is expected, from what the same hour of the week has brought."""

    mode: Literal["off", "observe", "act"] = "observe"
    """``observe``: it is made and shown, and nothing follows."""
    worth_s: Positive = 900.0
    """A sleeping model is kept up ahead of its requests where one comes in so many seconds, or more of them: how long a
    replica may idle to spare one request a cold start."""
    margin: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """What is added to the expected load, in standard deviations."""
    prefetch_s: Seconds = 1800.0
    """How long before replicas are expected nodes get the model, in seconds; 0: not at all."""
    history_s: Annotated[float, msgspec.Meta(ge=86_400)] = 86_400.0
    """It acts after so much of it was seen, in seconds: a day at least."""
    timezone: str = "UTC"
    """Whose hours and days: ``Europe/Berlin``. In UTC a habit of people who set their clocks moves by an hour."""

    def __post_init__(self) -> None:
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"timezone: there is no {self.timezone!r}; use a name such as Europe/Berlin") from None


class ScalingSettings(Section, frozen=True):
    """Replicas are set so that each has about the load that is aimed at, by whichever measure says most."""

    min_replicas: Count = 0
    max_replicas: Annotated[int, msgspec.Meta(ge=1)] = 8

    in_flight_per_replica: Positive = 32.0
    """Requests a replica should have at a time."""
    held_per_replica: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """One more replica for so many requests that are held; 0: as ``in_flight_per_replica``."""
    tokens_per_replica: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Tokens in flight and held that a replica should have at a time; 0: they are not looked at."""
    kv_usage: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8
    """Part of the KV cache that should be in use, 0 to 1; 0: it is not looked at."""
    ttft_s: Seconds = 0.0
    """Objective for the first token, at the percentile that is measured; 0: none."""
    itl_s: Seconds = 0.0
    """Objective for the time between tokens; 0: none."""
    latency_hold_s: Positive = 1800.0
    """How slowly it is forgotten that replicas with the load that is aimed at missed an objective, in seconds."""
    tolerance: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """Load may be so much above or below what is aimed at before anything changes, as a part of it."""
    extra_replicas: Count = 0
    """For bursts: so many more than the load asks for, while there is any..."""
    extra_percent: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """...and so much more."""

    idle_s: Seconds = 300.0
    """Without a request for so long the last replica goes, in seconds, where ``min_replicas`` is 0."""
    warm_replicas: Annotated[int, msgspec.Meta(ge=1)] = 1
    """A model that wakes gets at least so many..."""
    warm_s: Seconds = 300.0
    """...and keeps them for so long after the first is ready, in seconds."""
    up_window_s: Seconds = 0.0
    """Load must last so long before replicas are added, in seconds; the first ones are never waited with."""
    down_window_s: Seconds = 300.0
    """Replicas go down to the most that was asked for within so long, in seconds."""
    up: Rate = Rate()
    """How fast it may go up; from 0 there is no limit."""
    down: Rate = Rate()
    startup_s: Positive = 120.0
    """How long a replica takes until it is ready, in seconds, until that has been seen."""
    interval_s: Positive = 15.0
    """How often is looked, in seconds; what a router holds for a sleeping model is told at once."""
    stale_s: Positive = 60.0
    """What is older counts as not known, in seconds. Longer without a look: what is there stays for a whole window."""
    forecast: ForecastSettings = ForecastSettings()

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.warm_replicas > self.max_replicas:
            raise ValueError(f"warm_replicas {self.warm_replicas} is more than max_replicas {self.max_replicas}")
        if self.interval_s >= self.stale_s:
            raise ValueError(f"stale_s {self.stale_s:g} has to be longer than interval_s {self.interval_s:g}")
