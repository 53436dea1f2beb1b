"""The token that a client shows to its registry: from HELIOS_TOKEN, else from ``registry.token_file``.

It is sent to the configured registries alone: never to an object store or another host that one of them names, and
never logged. HF_TOKEN is another service's, so it is sent only by who says so (``HELIOS_TOKEN=$HF_TOKEN``).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from helios.errors import UsageError

ENVIRONMENT: Final = "HELIOS_TOKEN"
LOOK_AGAIN_S: Final = 10.0
"""How often a file is read again, in seconds: tokens are rotated under long-lived mounts."""
MAX_TOKEN: Final = 4096

Token = Callable[[], str | None]
"""Gives the token of this moment."""


def no_token() -> None:
    return None


class TokenFile:
    """A file with one token that may be replaced at any time. Threads may share it."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UsageError for a file that can't be read or holds anything else."""
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._token, self._read_at = read_token(path), clock()

    def __call__(self) -> str:
        with self._lock:
            if self._clock() - self._read_at >= LOOK_AGAIN_S:
                self._read_at = self._clock()
                with contextlib.suppress(UsageError):  # it is being replaced, say; if it is gone the registry will tell
                    self._token = read_token(self._path)
            return self._token


def token_of(file: str, environ: Mapping[str, str] = os.environ) -> Token:
    """Where the token comes from, as HELIOS_TOKEN and the setting say. Raises UsageError for one that can't be."""
    if text := environ.get(ENVIRONMENT, "").strip():
        token = _checked(text, ENVIRONMENT)
        return lambda: token
    return TokenFile(Path(file)) if file else no_token


def read_token(path: Path) -> str:
    """The token that a file holds. Raises UsageError, which does not show it."""
    try:
        with open(path, encoding="ascii") as file:
            return _checked(file.read(MAX_TOKEN + 2).strip(), str(path))
    except OSError as error:
        raise UsageError(f"the token file {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the token file {path} holds no token") from None


def _checked(text: str, where: str) -> str:
    if not text or len(text) > MAX_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{where} holds no token: one line of printable ASCII, without spaces, is one")
    return text
