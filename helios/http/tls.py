"""Certificates that a server shows, renewed while it runs."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from typing import Final

from helios.errors import UsageError

LOOK_S: Final = 10.0
"""How often the files of a certificate are looked at for a change, in seconds."""


class Certificate:
    """What a server shows. ``context`` stays the same object; what it shows is renewed by ``refresh``."""

    def __init__(self, cert: str, key: str, setting: str) -> None:
        """``setting``: what the files are called in messages, ``router.tls``: its ``_cert`` and ``_key``.

        Raises UsageError when the files can't be read or don't belong together."""
        self._cert, self._key, self._setting = cert, key, setting
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = looks(cert, key)
        self._load(self.context)

    def refresh(self) -> bool:
        """Read the files again if they are others now; says whether. Connections that there are go on as they are.

        Raises UsageError when they can't be used; then the earlier certificate stays.
        """
        now = looks(self._cert, self._key)
        if now == self._seen:
            return False
        # Tried on another context: half of a pair that does not belong together must not get into this one.
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self._seen = now
        self._load(self.context)
        return True

    def _load(self, context: ssl.SSLContext) -> None:
        load(context, self._cert, self._key, f"{self._setting}_cert", f"{self._setting}_key")


def looks(*paths: str) -> list[tuple[int, int, int]]:
    """What tells versions of files apart; whoever renews them may put other files in their place."""
    found = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return found


def load(context: ssl.SSLContext, cert: str, key: str, cert_name: str, key_name: str) -> None:
    """Have a context show a certificate. Raises UsageError when the files can't be used."""

    def no_password() -> str:
        raise UsageError(f"{key_name}={key} is encrypted", hint="Give a key without a password, readable to us only.")

    password: Callable[[], str] = no_password
    try:
        context.load_cert_chain(cert, key, password)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"{cert_name}={cert} and {key_name}={key} can't be used: {why(error)}",
            hint="Both are in PEM form, and the key belongs to the first certificate.",
        ) from None


def why(error: OSError) -> str:
    """What is wrong with a file, in words."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it is no PEM").lower().replace("_", " ")
    return error.strerror or str(error)
