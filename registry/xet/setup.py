"""Puts Xet's parts together for the daemon."""

from __future__ import annotations

import secrets

from helios.config import RegistrySettings
from helios.home import Home
from helios.metrics import RegistryMetrics
from registry.catalog import Catalog
from registry.hub.verified import VerifiedReader
from registry.metadata import xet
from registry.usage.telling import Told, nobody
from registry.xet.layouts import GB, Layouts, Listed
from registry.xet.maker import Maker
from registry.xet.routes import XetService
from registry.xet.tokens import Signer

GIB = 1 << 30


def make_signer(catalog: Catalog) -> Signer:
    """What signs with the key that all processes of the registry share."""
    with catalog.database.read() as connection:
        key = xet.find_key(connection)
    if key is None:
        with catalog.database.write() as connection:
            key = xet.key(connection, secrets.token_hex(32))
    return Signer(bytes.fromhex(key))


def make_xet(
    settings: RegistrySettings,
    home: Home,
    catalog: Catalog,
    reader: VerifiedReader,
    metrics: RegistryMetrics,
    listed: Listed,
    told: Told = nobody,
) -> tuple[XetService, Maker | None]:
    """The service, and what makes layouts in the background, unless that is switched off."""
    least = int(settings.xet_min_gib * GIB)
    most = int(settings.xet_http_gb * GB)
    layouts = Layouts(catalog, on=settings.xet, least=least, most=most, listed=listed)
    service = XetService(layouts, make_signer(catalog), reader, metrics, told)
    return service, Maker(catalog, least, home.registry / "xet", metrics) if settings.xet else None
