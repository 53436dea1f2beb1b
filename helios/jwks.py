"""Where an issuer's keys come from: an address that is asked now and then, or a file that is watched.

Stale while they are fetched again: the keys known last count until others are here, however long the issuer is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from helios.config import IssuerSettings
from helios.errors import UsageError
from helios.http.bodies import at_most
from helios.jwts import ASK_AGAIN_S, KeySet, TokenVerifier
from helios.tokens import read_token
from helios.watched import LOOK_AGAIN_S, WatchedFile

log = logging.getLogger("helios.jwks")

MAX_BYTES: Final = 1 << 20
"""Longest document, in bytes."""
TIMEOUT_S: Final = 5.0
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def check(settings: IssuerSettings, where: str) -> None:
    """Raises UsageError for a file that can't be read, or an address over which anybody could send other keys.

    ``where`` names the settings in messages.
    """
    text = settings.jwks
    if settings.ca_file:
        _trusting(settings.ca_file)
    if settings.token_file:
        read_token(Path(settings.token_file))
    if "://" not in text:
        _read(Path(text))
        return
    parts = urlsplit(text)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme != "http" or parts.hostname not in LOOPBACK:
        raise UsageError(f"{where}.jwks is {text!r}", hint="Write https://…, or the path of a file.")


class Jwks:
    """Keeps a verifier's keys fresh; ``run`` is owned by its maker's task group."""

    def __init__(self, settings: IssuerSettings, verifier: TokenVerifier[Any]) -> None:
        """The settings went through ``check``; raises UsageError for a file that can't be read any more."""
        self._settings, self._verifier = settings, verifier
        self._wanted, self._looked = asyncio.Event(), asyncio.Event()
        self._file: WatchedFile[KeySet] | None = None
        if "://" in settings.jwks:
            verifier.on_wanted = self._wanted.set
        else:
            self._file = WatchedFile(Path(settings.jwks), _read, "file of an issuer's keys")
            verifier.learn(self._file.get())

    async def looked(self, timeout_s: float) -> None:
        """Wait until they were asked for once more, whatever came of it, or for so long, in seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._looked.wait()

    async def run(self) -> None:
        """Until cancelled."""
        if self._file is not None:
            await self._watch(self._file)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            while True:
                fetched = await self._fetch(session)
                self._wanted.clear()
                self._looked.set()
                self._looked = asyncio.Event()
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

    def _headers(self) -> dict[str, str]:
        """Read each time: a service account's token is renewed."""
        file = self._settings.token_file
        return {"authorization": f"Bearer {read_token(Path(file))}"} if file else {}

    def _trust(self) -> ssl.SSLContext | bool:
        return _trusting(self._settings.ca_file) if self._settings.ca_file else True

    async def _fetch(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(
                self._settings.jwks, allow_redirects=False, headers=self._headers(), ssl=self._trust()
            ) as response:
                if response.status != 200:
                    raise ValueError(f"the answer is {response.status}")
                document = await at_most(response.content, MAX_BYTES)
            keys = KeySet(document)
        except (TimeoutError, aiohttp.ClientError, ValueError, UsageError) as error:
            reason = str(error) or type(error).__name__
            log.warning("an issuer's keys can't be fetched; those known count", extra={"reason": reason})
            return False
        self._verifier.learn(keys)
        return True


def _trusting(file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        raise UsageError(f"the certificates in {file} can't be read: {error.strerror or error}") from None


def _read(path: Path) -> KeySet:
    try:
        return KeySet(path.read_bytes())
    except OSError as error:
        raise UsageError(f"the file of an issuer's keys {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
