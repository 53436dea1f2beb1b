"""TLS on both sides: towards clients a certificate of ours, towards workers their certificate checked."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from typing import Final

from helios.config import RouterSettings
from helios.errors import UsageError

LOOK_S: Final = 10.0
"""How often the files of the certificate are looked at for a change."""


class Certificate:
    """The certificate that clients see. ``context`` stays the same object; what it shows is renewed by ``refresh``."""

    def __init__(self, cert: str, key: str, names: tuple[str, str] = ("router.tls_cert", "router.tls_key")) -> None:
        """``names``: of the settings that say the files. Raises UsageError when these can't be read or don't belong
        together."""
        self._cert, self._key, self._names = cert, key, names
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._looks()
        _load(self.context, cert, key, *names)

    def refresh(self) -> bool:
        """Read the files again if they are others now; says whether. Connections that there are go on as they are.

        Raises UsageError when they can't be used; then the earlier certificate stays.
        """
        looks = self._looks()
        if looks == self._seen:
            return False
        # Tried on another context: half of a pair that does not belong together must not get into this one.
        _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._cert, self._key, *self._names)
        self._seen = looks
        _load(self.context, self._cert, self._key, *self._names)
        return True

    def _looks(self) -> list[tuple[int, int, int]]:
        """What tells versions of the files apart; whoever renews them may put other files in their place."""
        found = []
        for path in (self._cert, self._key):
            try:
                stat = os.stat(path)
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return found


def certificate(settings: RouterSettings) -> Certificate | None:
    """The certificate of the settings, if clients come by TLS; raises UsageError."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise UsageError("router.tls_cert and router.tls_key go together", hint="Give both, or none for plain HTTP.")
    return Certificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None


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
            f"router.worker_ca={ca} can't be used: {_why(error)}", hint="It holds certificates in PEM form."
        ) from None
    if settings.worker_cert:
        key = settings.worker_key or settings.worker_cert
        _load(context, settings.worker_cert, key, "router.worker_cert", "router.worker_key")
    return context


def _load(context: ssl.SSLContext, cert: str, key: str, cert_name: str, key_name: str) -> None:
    def no_password() -> str:
        raise UsageError(f"{key_name}={key} is encrypted", hint="Give a key without a password, readable to us only.")

    password: Callable[[], str] = no_password
    try:
        context.load_cert_chain(cert, key, password)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"{cert_name}={cert} and {key_name}={key} can't be used: {_why(error)}",
            hint="Both are in PEM form, and the key belongs to the first certificate.",
        ) from None


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it is no PEM").lower().replace("_", " ")
    return error.strerror or str(error)
