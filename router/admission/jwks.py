"""Where an issuer's keys come from: an address that is asked now and then, or a file that is watched.

Stale while they are fetched again: the keys known last count until others are here, however long the issuer is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from helios.config import JwtSettings
from helios.errors import UsageError
from helios.watched import LOOK_AGAIN_S, WatchedFile
from router.admission.jwt import ASK_AGAIN_S, KeySet, Verifier

log = logging.getLogger("helios.router")

MAX_BYTES: Final = 1 << 20
"""Longest document, in bytes."""
TIMEOUT_S: Final = 5.0
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def check(settings: JwtSettings) -> None:
    """Raises UsageError for a file that can't be read, or an address over which anybody could send other keys."""
    text = settings.jwks
    if "://" not in text:
        _read(Path(text))
        return
    parts = urlsplit(text)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme != "http" or parts.hostname not in LOOPBACK:
        raise UsageError(f"router.admission.jwt.jwks is {text!r}", hint="Write https://…, or the path of a file.")


class Jwks:
    """Keeps a verifier's keys fresh; ``run`` is owned by the router's task group."""

    def __init__(self, settings: JwtSettings, verifier: Verifier) -> None:
        """The settings went through ``check``; raises UsageError for a file that can't be read any more."""
        self._settings, self._verifier = settings, verifier
        self._wanted = asyncio.Event()
        self._file: WatchedFile[KeySet] | None = None
        if "://" in settings.jwks:
            verifier.on_wanted = self._wanted.set
        else:
            self._file = WatchedFile(Path(settings.jwks), _read, "file of an issuer's keys")
            verifier.learn(self._file.get())

    async def run(self) -> None:
        """Until cancelled."""
        if self._file is not None:
            await self._watch(self._file)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            while True:
                fetched = await self._fetch(session)
                self._wanted.clear()
                await asyncio.sleep(ASK_AGAIN_S)  # whatever strangers send meanwhile
                if fetched:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(max(0.0, self._settings.refresh_s - ASK_AGAIN_S)):
                            await self._wanted.wait()

    async def _watch(self, file: WatchedFile[KeySet]) -> None:
        version = file.version
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            keys = file.get()
            if file.version != version:
                version = file.version
                self._verifier.learn(keys)

    async def _fetch(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(self._settings.jwks, allow_redirects=False) as response:
                if response.status != 200:
                    raise ValueError(f"the answer is {response.status}")
                document = await response.content.read(MAX_BYTES)
                while len(document) < MAX_BYTES and (more := await response.content.read(MAX_BYTES)):
                    document += more
            keys = KeySet(document)
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            reason = str(error) or type(error).__name__
            log.warning("an issuer's keys can't be fetched; those known count", extra={"reason": reason})
            return False
        self._verifier.learn(keys)
        return True


def _read(path: Path) -> KeySet:
    try:
        return KeySet(path.read_bytes())
    except OSError as error:
        raise UsageError(f"the file of an issuer's keys {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
