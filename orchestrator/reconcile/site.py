"""What holds for all services of a cluster, as the operator's settings say it, checked."""

from __future__ import annotations

from urllib.parse import urlsplit

from helios.config import OperatorSettings, Peer, SecretKey, SiteSettings, without_credentials
from helios.errors import UsageError
from helios.http.hosts import split_listen
from orchestrator.api.common import FreeForm

__all__ = ["Peer", "SecretKey", "Site", "allowed", "site_of"]


class Site(SiteSettings, frozen=True):
    """With what follows from other settings."""

    external_metrics: bool = False
    """Whether the operator serves the cluster's external metrics: then HPAs can be made."""
    scaler_tls: bool = False
    """Whether its external scaler, which KEDA asks, speaks TLS."""


def allowed(peer: Peer) -> FreeForm:
    """As a NetworkPolicy has it."""
    return {"namespaceSelector": {"matchLabels": peer.namespace}, "podSelector": {"matchLabels": peer.pods}}


def site_of(settings: OperatorSettings) -> Site:
    """Raises UsageError for settings that can't work."""
    its, where = settings.site, "operator.site"
    for name in ("routers", "registry_urls"):
        for url in getattr(its, name):
            without_credentials(url, f"{where}.{name}")
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UsageError(f"{where}.{name}: {url!r} is no address", hint="Write http://HOST:PORT.")
    for name in ("registrar", "registry_token", "compile_key"):
        needs = "routers" if name == "registrar" else "registry_urls"
        if getattr(its, name) is not None and not getattr(its, needs):
            raise UsageError(f"{where}.{name} is for {where}.{needs}, which is empty")
    if its.keda_scaler:
        if not settings.signals.scaler_listen:
            raise UsageError(f"{where}.keda_scaler needs operator.signals.scaler_listen: nobody would answer there")
        split_listen(its.keda_scaler, f"{where}.keda_scaler")
    tls = bool(settings.signals.scaler_tls.cert)
    if its.keda_authentication and not (its.keda_scaler and tls):
        raise UsageError(f"{where}.keda_authentication needs {where}.keda_scaler and operator.signals.scaler_tls")
    fields = {name: getattr(its, name) for name in its.__struct_fields__}
    return Site(**fields, external_metrics=bool(settings.signals.external_listen), scaler_tls=tls)
