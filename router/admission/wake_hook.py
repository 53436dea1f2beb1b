"""The hook that wakes a model over HTTP: what the operator, or a script, serves.

``POST <wake_url>`` with ``{"model": "org/name"}``, and ``"commit"`` and ``"revision"`` where the registry was asked
(equal where clients ask for the commit itself), again every ``AGAIN_S`` until a worker of it is up, so that whoever
serves it need remember nothing. 200 or 202: it is on its way; an object in the answer may say how far, as
``{"progress": "loading weights, 40%"}``. 404 and 409: it can't be; ``{"message": …}`` says why. After all else it is
asked again, too.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from helios.config import AdmissionSettings
from helios.decoding import from_json
from helios.errors import UsageError
from helios.http.bodies import at_most
from router.admission.waking import Report, WakeFailed

log = logging.getLogger("helios.router")

AGAIN_S: Final = 2.0
TIMEOUT_S: Final = 10.0
MAX_BYTES: Final = 65536
MAX_TEXT: Final = 200


class _Told(msgspec.Struct):
    progress: str = ""
    message: str = ""


class WakeHook:
    """A ``Waker``. Raises UsageError for an address that is none."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"router.admission.wake_url is {url!r}", hint="Write http://HOST:PORT/PATH.")
        self._url = url

    async def wake(self, model: str, report: Report, commit: str = "", revision: str = "") -> None:
        """See ``Waker``; ``commit`` is to be served, where that is known, which ``revision`` stands for."""
        document = {"model": model} | ({"commit": commit, "revision": revision} if commit else {})
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            while True:
                try:
                    await self._ask(session, document, report)
                except (TimeoutError, aiohttp.ClientError) as error:
                    reason = str(error) or type(error).__name__
                    log.warning("who wakes models can't be reached", extra={"model": model, "reason": reason})
                await asyncio.sleep(AGAIN_S)

    async def _ask(self, session: aiohttp.ClientSession, document: dict[str, str], report: Report) -> None:
        async with session.post(self._url, json=document, allow_redirects=False) as response:
            told = _told(await at_most(response.content, MAX_BYTES))
            if response.status in (404, 409):
                raise WakeFailed(told.message[:MAX_TEXT] or f"the hook answered {response.status}")
            if response.status in (200, 202):
                report(told.progress[:MAX_TEXT])
            else:
                log.warning("a model is not woken yet", extra={**document, "status": response.status})


class Unasked:
    """A ``Waker`` that asks nobody: whoever scales sees who waits (``GET /demand/watch``), and starts workers."""

    async def wake(self, model: str, report: Report, commit: str = "", revision: str = "") -> None:
        """See ``Waker``: until it is cancelled."""
        await asyncio.Event().wait()


def hook_of(settings: AdmissionSettings) -> WakeHook | Unasked | None:
    """Who is asked to wake models, as the settings say; None: nobody can. Raises UsageError."""
    if settings.wake_url:
        return WakeHook(settings.wake_url)
    return Unasked() if settings.hold else None


def _told(document: bytes) -> _Told:
    try:
        return from_json(document, _Told)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _Told()
