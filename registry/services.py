"""What the registry's routes work with: made once by the daemon, handed to every group of routes."""

from __future__ import annotations

from dataclasses import dataclass

from helios.config import Config
from helios.home import Home
from helios.metrics import RegistryMetrics
from heliosfs.store.objects import ObjectStore
from registry.access import Tenants
from registry.addresses import Addresses
from registry.catalog import Catalog
from registry.fresh import Fresh
from registry.pushes import Pushes
from registry.sessions import Sessions


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
