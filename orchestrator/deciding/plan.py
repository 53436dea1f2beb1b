"""What a service's spec means to the scaling policy. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from orchestrator.api.model import ModelSpec
from orchestrator.api.service import Scaling, ServiceSpec
from orchestrator.reconcile import names
from orchestrator.reconcile.fleet import answering, roles, scaling
from orchestrator.scaling.settings import ForecastSettings, ScalingSettings

UNTARGETED: Final = 1e9
"""Requests in flight that a worker may have where they are no target."""
STALE_S: Final = 60.0
"""The least age, in seconds, at which a sample counts as not known."""
PRIORITIES: Final = {"pinned": 3, "critical": 2, "normal": 1, "scratch": 0}
"""Of Models: who gets accelerators first where there are too few."""


class RolePlan(msgspec.Struct, frozen=True):
    """``units``: accelerators of a worker; ``kinds``: what they are called, by type and by resource; ``pool``: whose
    ceiling counts (``Plan.ceilings``); ``margin``: by so much what is expected is raised."""

    settings: ScalingSettings
    units: int
    kinds: tuple[str, str]
    pool: str
    margin: float


class Plan(msgspec.Struct, frozen=True):
    """``names``: those by which requests ask for it; ``main``: the role that answers; ``fixed``: people say how many
    workers there are, and nothing is decided."""

    names: tuple[str, ...]
    main: str
    roles: Mapping[str, RolePlan]
    ceilings: Mapping[str, int]
    priority: int
    fixed: bool


def plan_of(spec: ServiceSpec, model: ModelSpec | None, look_s: float, *, heard: bool) -> Plan:
    """``model`` None: there is none yet. ``heard``: routers say what is asked for; where none do nothing would ever
    wake a service, so it has a worker at least."""
    found, ceilings = {}, {}
    for role in roles(spec):
        its, settings = getattr(spec, names.ROLES[role]), scaling(spec, role)
        pool = role if its.scaling is not None else ""
        if settings.max_cost is not None:
            ceilings[pool] = settings.max_cost
        accelerator = its.accelerator
        found[role] = RolePlan(
            settings_of(settings, look_s, heard=heard), accelerator.count,
            (accelerator.type or "", accelerator.resource), pool, 1 + settings.forecast.margin_percent / 100,
        )  # fmt: skip
    return Plan(
        asked_as(spec, model), answering(spec), found, ceilings,
        PRIORITIES[model.priority] if model is not None else 0, spec.replicas is not None,
    )  # fmt: skip


def asked_as(spec: ServiceSpec, model: ModelSpec | None) -> tuple[str, ...]:
    """Names by which requests ask for a service's model; none while that is not known."""
    if spec.served_name is not None:
        return (spec.served_name,)
    return () if model is None else (model.source.repo,)


def settings_of(said: Scaling, look_s: float, *, heard: bool) -> ScalingSettings:
    """The policy's settings. A target that is not named does not count."""
    targets, least = said.targets, said.min_replicas if heard else max(1, said.min_replicas)
    return ScalingSettings(
        min_replicas=min(least, said.max_replicas),
        max_replicas=said.max_replicas,
        in_flight_per_replica=float(targets.in_flight or UNTARGETED),
        held_per_replica=float(targets.queued or 0),
        tokens_per_replica=float(targets.tokens or 0),
        kv_usage=(targets.kv_usage_percent or 0) / 100,
        ttft_s=(targets.ttft_milliseconds or 0) / 1000,
        itl_s=(targets.itl_milliseconds or 0) / 1000,
        extra_replicas=said.overprovision.replicas,
        extra_percent=float(said.overprovision.percent),
        idle_s=float(said.idle_seconds),
        warm_s=float(said.warm_seconds),
        up_window_s=float(said.up_window_seconds),
        down_window_s=float(said.down_window_seconds),
        interval_s=look_s,
        stale_s=max(STALE_S, 4 * look_s),
        forecast=ForecastSettings(mode=_MODES[said.forecast.mode]),
    )


_MODES: Final[Mapping[str, Literal["off", "observe", "act"]]] = {"Off": "off", "Observe": "observe", "Act": "act"}
