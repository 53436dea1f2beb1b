"""What the registry's routes work with: made once by the daemon, handed to every group of routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from helios.config import Config
from helios.home import Home
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.objects import ObjectStore
from registry.access import Tenants
from registry.addresses import Addresses
from registry.catalog import Catalog
from registry.fresh import Fresh
from registry.gc.mending import Mender
from registry.pods import PodTokens
from registry.pushes import Pushes
from registry.seals import Seals
from registry.sessions import Sessions
from registry.threads import Threads


class CheckOwn(Protocol):
    """Raises Conflict for a ref that follows an upstream, and what the upstream says to a caller (his Authorization)
    who may not read the repository; ``trusted``: whom it is not asked about."""

    async def __call__(self, repo: RepoId, ref: str, authorization: str | None, *, trusted: bool) -> None: ...


@dataclass(frozen=True)
class Services:
    """The registry's parts."""

    config: Config
    home: Home
    store: ObjectStore
    catalog: Catalog
    sessions: Sessions
    pushes: Pushes
    fresh: Fresh
    metrics: RegistryMetrics
    addresses: Addresses
    tenants: Tenants
    pods: PodTokens
    let_in: Callable[[RepoId, str | None], Awaitable[None]]
    """Raises what the upstream says to a caller (his Authorization) who may not read a restricted repository."""
    check_own: CheckOwn
    restricted: Callable[[], set[str]]
    """The canonical names of restricted repositories; blocks."""
    seals: Seals
    mender: Mender
    long: Threads
    """For calls that take long."""
    pieces: Threads
    """For reading what a cloud store sends piece by piece."""
