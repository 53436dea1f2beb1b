"""Which services there are, as the reconcilers have it: what metrics are about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

ROLES: Final = ("both", "prefill", "decode")


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """An InferenceService. ``names``: those by which requests ask for its model; ``roles``: of its workers;
    ``desired``: how many the scaling policy wants of each, as it decided last."""

    names: tuple[str, ...]
    roles: tuple[str, ...] = ("both",)
    desired: Mapping[str, int] = {}


class Directory(Protocol):
    """Knows the services of a cluster."""

    def find(self, namespace: str, service: str) -> Served | None: ...


class Services:
    """A ``Directory`` that is told."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Served] = {}

    def put(self, namespace: str, service: str, served: Served) -> None:
        self._known[namespace, service] = served

    def remove(self, namespace: str, service: str) -> None:
        self._known.pop((namespace, service), None)

    def find(self, namespace: str, service: str) -> Served | None:
        return self._known.get((namespace, service))
