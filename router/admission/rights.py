"""What somebody may do: models and routes by pattern (role-based access control), limits, weight and priority.

A right is a pair of patterns; somebody has several, from roles, and needs one that allows both the model and the
route. What a tenant may do bounds all of its keys and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from helios.config import AdmissionSettings, LimitSettings, Priority, RouterTenantSettings
from helios.errors import UsageError
from helios.names import TENANT

NO_LIMITS: Final = LimitSettings()
RANKS: Final[Mapping[Priority, int]] = {"high": 0, "normal": 1, "low": 2}
"""Lower is served first."""
BACKGROUND: Final = 3
"""What nobody waits for comes after all of them."""
REMEMBERED: Final = 4096
"""Decisions that are kept of each principal."""


@dataclass(frozen=True, slots=True)
class Right:
    models: tuple[str, ...] = ("*",)
    routes: tuple[str, ...] = ("*",)

    def allows(self, model: str, route: str) -> bool:
        return _fits(model, self.models) and _fits(route, self.routes)

    def names(self, model: str) -> bool:
        """Whether the model may be used on some route."""
        return _fits(model, self.models)


EVERYTHING: Final = Right()


@dataclass(frozen=True, slots=True, eq=False)
class Principal:
    """Who asks. ``key`` is an API key's id, "" for others; ``rights``: any of them is enough."""

    tenant: str
    bound: Right = EVERYTHING
    rights: tuple[Right, ...] = (EVERYTHING,)
    rank: int = RANKS["normal"]
    weight: float = 1.0
    key: str = ""
    key_limits: LimitSettings = NO_LIMITS
    tenant_limits: LimitSettings = NO_LIMITS
    _known: dict[tuple[str, str], bool] = field(default_factory=dict)
    _routes: dict[str, bool] = field(default_factory=dict)

    def may(self, model: str, route: str) -> bool:
        """Whether the model may be used at the path."""
        asked = model, route
        known = self._known.get(asked)
        if known is None:
            known = self.bound.allows(model, route) and any(right.allows(model, route) for right in self.rights)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[asked] = known
        return known

    def may_use(self, route: str) -> bool:
        """Whether the path may be used for any model at all."""
        known = self._routes.get(route)
        if known is None:  # as many as there are routes
            known = _fits(route, self.bound.routes) and any(_fits(route, right.routes) for right in self.rights)
            self._routes[route] = known
        return known


ANYBODY: Final = Principal("")
"""Who asks a router without keys and tokens."""


class Tenants:
    """The configured tenants, and the defaults of others. Raises UsageError for one that can't be."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._tenants = settings.tenants
        self._roles = settings.roles
        for name, tenant in settings.tenants.items():
            if not TENANT.match(name):
                raise UsageError(f"router.admission.tenants: {name!r} is not a name: use a-z, 0-9 and - (at most 63)")
            if not 0.001 <= tenant.weight <= 1000:
                raise UsageError(f"router.admission.tenants.{name}.weight must be 0.001 to 1000, not {tenant.weight}")
            check_limits(tenant.limits, f"router.admission.tenants.{name}.limits")

    def principal(
        self,
        tenant: str,
        rights: tuple[Right, ...],
        priority: Priority,
        key: str = "",
        limits: LimitSettings = NO_LIMITS,
    ) -> Principal:
        """Somebody of a tenant."""
        its = self._tenants.get(tenant) or RouterTenantSettings()
        bound = Right(tuple(its.models), tuple(its.routes))
        return Principal(tenant, bound, rights, RANKS[priority], its.weight, key, limits, its.limits)

    def with_roles(self, tenant: str, roles: Sequence[str]) -> Principal:
        """Somebody with roles: he has the rights of each, and the best priority."""
        if not self._roles:
            return self.principal(tenant, (EVERYTHING,), "normal")
        mine = [self._roles[role] for role in roles if role in self._roles]
        rights = tuple(Right(tuple(role.models), tuple(role.routes)) for role in mine)
        best: Priority = "normal"
        if mine:
            best = min((role.priority for role in mine), key=RANKS.__getitem__)
        return self.principal(tenant, rights, best)


def check_limits(limits: LimitSettings, where: str) -> None:
    """Raises UsageError for limits below 0, or so low that no request ever passes."""
    for name, value in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
        if value < 0 or 0 < value < 1:
            raise UsageError(f"{where}.{name}_per_minute must be 0 (no limit) or at least 1, not {value}")


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(pattern == "*" or fnmatchcase(name, pattern) for pattern in patterns)
