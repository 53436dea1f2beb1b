"""TLS on both sides: towards clients a certificate of ours, towards workers their certificate checked."""

from __future__ import annotations

import ssl

from helios.config import RouterSettings
from helios.errors import UsageError
from helios.http.tls import LOOK_S, Certificate, load, why

__all__ = ["LOOK_S", "Certificate", "certificate", "to_workers"]


def certificate(settings: RouterSettings) -> Certificate | None:
    """The certificate of the settings, if clients come by TLS; raises UsageError."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise UsageError("router.tls_cert and router.tls_key go together", hint="Give both, or none for plain HTTP.")
    return Certificate(settings.tls_cert, settings.tls_key, "router.tls") if settings.tls_cert else None


def to_workers(settings: RouterSettings) -> ssl.SSLContext:
    """How workers with https are met: their certificate is for their name, and of an authority we know.

    Raises UsageError when the files can't be used.
    """
    if settings.worker_key and not settings.worker_cert:
        raise UsageError("router.worker_key is given without router.worker_cert", hint="Give both, or none.")
    ca = settings.worker_ca or None
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"router.worker_ca={ca} can't be used: {why(error)}", hint="It holds certificates in PEM form."
        ) from None
    if settings.worker_cert:
        key = settings.worker_key or settings.worker_cert
        load(context, settings.worker_cert, key, "router.worker_cert", "router.worker_key")
    return context
