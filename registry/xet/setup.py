"""Puts Xet's parts together for the daemon."""

from __future__ import annotations

import secrets

from helios.config import RegistrySettings
from helios.home import Home
from helios.metrics import RegistryMetrics
from registry.catalog import Catalog
from registry.hub.verified import VerifiedReader
from registry.metadata import xet
from registry.xet.layouts import Layouts
from registry.xet.maker import Maker
from registry.xet.routes import XetService
from registry.xet.tokens import Signer

GIB = 1 << 30


def make_xet(
    settings: RegistrySettings, home: Home, catalog: Catalog, reader: VerifiedReader, metrics: RegistryMetrics
) -> tuple[XetService, Maker | None]:
    """The service, and what makes layouts in the background, unless that is switched off."""
    with catalog.database.read() as connection:
        key = xet.find_key(connection)
    if key is None:
        with catalog.database.write() as connection:
            key = xet.key(connection, secrets.token_hex(32))
    least = int(settings.xet_min_gib * GIB)
    service = XetService(Layouts(catalog, on=settings.xet, least=least), Signer(bytes.fromhex(key)), reader, metrics)
    return service, Maker(catalog, least, home.registry / "xet", metrics) if settings.xet else None
