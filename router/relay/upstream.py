"""Sending a request to a worker: one attempt, its failures named by what they allow.

Only a request that no worker can have begun may be sent again: the connection was never made (``NotSent``), or it
was a kept-alive one that the worker had closed meanwhile (``Stale``: it breaks at once). Whatever else breaks has
been at a worker, and a request that kills its worker must not go on to kill the next (``Broken``, ``BadAnswer``).
"""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace, TracebackType
from typing import Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from router.relay.intake import Body
from router.workers import Worker

KEEP_ALIVE_S: Final = 4.0
"""Idle connections to workers live this long: less than the 5 s after which vLLM closes its side."""
STALE_S: Final = 1.0
"""A reused connection that breaks later than this after the request was sent was not stale."""
READ_BUFFER: Final = 65536
"""Bytes of an answer read ahead of a slow client; beyond twice this the worker's connection is paused."""
LINE_MAX: Final = 65536
"""Longest header line of an answer, in bytes."""
NO_DEFAULTS: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
"""Headers aiohttp would add by itself."""


class SendFailed(Exception):
    """There is no answer; the text says why."""


class NotSent(SendFailed):
    """No connection: the request was not sent."""


class Stale(SendFailed):
    """A reused connection was closed by the worker before it can have read the request."""


class Broken(SendFailed):
    """The connection broke after the request was sent and before any byte of an answer."""


class BadAnswer(SendFailed):
    """What came back is not HTTP."""


class Upstream:
    """The connections to all workers; a context."""

    def __init__(self, connect_timeout_s: float) -> None:
        self._urls: dict[tuple[str, str], URL] = {}
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=connect_timeout_s, sock_connect=connect_timeout_s, sock_read=None
        )

    async def __aenter__(self) -> Upstream:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_reused)
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=10),
            timeout=self._timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=NO_DEFAULTS,
            read_bufsize=READ_BUFFER,
            max_line_size=LINE_MAX,
            max_field_size=LINE_MAX,
            trace_configs=[trace],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.session.close()

    async def send(
        self, worker: Worker, path: str, query: bytes, headers: CIMultiDict[str], body: Body
    ) -> aiohttp.ClientResponse:
        """POST the body and return the answer once its head is here. Raises SendFailed.

        ``path`` is one of ours; ``query`` is passed as it came. The caller closes the answer.
        """
        url = self._urls.get((worker.url, path))
        if url is None:  # as many as there are workers and routes
            url = self._urls[worker.url, path] = URL(worker.url + path, encoded=True)
        if query:
            url = URL(f"{url}?{query.decode('ascii')}", encoded=True)
        attempt = SimpleNamespace(reused=False)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await self.session.post(
                url,
                data=body.payload(),
                headers=headers,
                allow_redirects=False,
                trace_request_ctx=attempt,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise NotSent(describe(error)) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if attempt.reused and loop.time() - began < STALE_S:
                raise Stale(describe(error)) from error
            raise Broken(describe(error)) from error
        except aiohttp.ClientResponseError as error:
            raise BadAnswer(_first_line(error.message)) from error
        except aiohttp.ClientConnectionError as error:
            raise Broken(describe(error)) from error


async def _reused(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.reused = True


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(":") or "malformed"


_TEXTS: Final[dict[type, str]] = {
    aiohttp.ConnectionTimeoutError: "no connection within the deadline",
    aiohttp.ClientConnectorDNSError: "its name can't be resolved",
    aiohttp.ServerDisconnectedError: "the connection was closed without an answer",
}


def describe(error: BaseException) -> str:
    """Why, without the address, which clients need not know."""
    number = getattr(error, "errno", None)
    if number is not None and number > 0:
        return os.strerror(number).lower()
    return next((_TEXTS[kind] for kind in type(error).__mro__ if kind in _TEXTS), type(error).__name__)
