"""The endpoints that a gateway allows for a request: what is chosen has to be one of them, and where none of them can
be, nothing is (metadata ``envoy.lb.subset_hint`` of the Gateway API inference extension's endpoint picker protocol)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MOST: Final = 10_000
"""Endpoints that are looked at."""


class Subset:
    """``ip:port`` each; an ``ip`` alone allows all its ports."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        named = (one.strip() for one in endpoints)
        self._allowed = frozenset(one for _, one in zip(range(MOST), named, strict=False) if one)

    def __len__(self) -> int:
        return len(self._allowed)

    def has(self, endpoint: str) -> bool:
        """Whether ``ip:port`` is allowed; nothing is not."""
        host = endpoint.rpartition(":")[0]
        return bool(endpoint) and (
            endpoint in self._allowed or host in self._allowed or host.strip("[]") in self._allowed
        )
