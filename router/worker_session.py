"""What asks workers anything beside the relay: one kind of session, whose owner closes it."""

from __future__ import annotations

import ssl

import aiohttp


def worker_session(
    tls: ssl.SSLContext | None, timeout_s: float, connections: int = 0, *, keeps: bool = False
) -> aiohttp.ClientSession:
    """``tls``: how workers with https are met; None: as the system's certificates say. ``timeout_s``: longest that a
    question takes, in seconds; ``connections``: most at a time, 0: any number. Unless it ``keeps`` them each question
    has a new one: whether the worker accepts it is then a part of the question."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, force_close=not keeps, ssl=tls or True),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
    )
