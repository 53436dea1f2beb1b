"""Faults of an API server, at any request: refused, slow, hanging, cut off before or after it was performed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.kubernetes.errors import Refusal

REASONS = {
    403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired", 429: "TooManyRequests",
    500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
WRITES = frozenset({"create", "update", "patch", "apply", "delete"})


@dataclass(frozen=True)
class Call:
    """A request as it is meant. ``verb``: get, list, watch, create, update, patch, apply or delete."""

    verb: str
    kind: str
    namespace: str
    name: str
    subresource: str
    query: dict[str, str]
    body: Any = None
    user: str = ""
    """Whose token it came with."""

    @property
    def write(self) -> bool:
        return self.verb in WRITES


@dataclass
class Fault:
    """What happens to calls that ``when`` is true of, ``times`` times (None: always)."""

    when: Callable[[Call], bool]
    times: int | None = 1
    status: int | None = None
    message: str = "as told"
    retry_after: int | None = None
    delay_s: float = 0.0
    hang: bool = False
    """Neither performed nor answered until the server ends."""
    lost: bool = False
    """Performed, and the connection is cut before the answer."""
    cut: bool = False
    """Not performed; the connection is cut."""
    run: Callable[[Call], None] | None = None
    """Called before all else: the world changes between two requests."""
    met: int = 0

    def takes(self, call: Call) -> bool:
        if (self.times is not None and self.met >= self.times) or not self.when(call):
            return False
        self.met += 1
        return True


class Cut(Exception):
    """The connection is to be closed without an answer."""


@dataclass
class Faults:
    """In the order in which they were added; the first that takes a call is the one."""

    planned: list[Fault] = field(default_factory=list)
    refuse: list[int] = field(default_factory=list)
    """A status for each of the next requests, whatever they are."""

    def add(self, when: Callable[[Call], bool] = lambda call: True, **how: Any) -> Fault:
        fault = Fault(when, **how)
        self.planned.append(fault)
        return fault

    async def before(self, call: Call) -> Fault | None:
        """Raises Refusal or Cut where the call is not to be performed."""
        if self.refuse:
            code = self.refuse.pop(0)
            raise Refusal(code, REASONS.get(code, "InternalError"), "as told")
        fault = next((one for one in self.planned if one.takes(call)), None)
        if fault is None:
            return None
        if fault.run is not None:
            fault.run(call)
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.hang:
            await asyncio.Event().wait()
        if fault.cut:
            raise Cut
        if fault.status is not None:
            reason = REASONS.get(fault.status, "InternalError")
            raise Refusal(fault.status, reason, fault.message, retry_after=fault.retry_after)
        return fault
