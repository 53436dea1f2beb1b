"""Who is asked for a registry's objects: itself, and the hosts that its placements name; over how many connections.

Threads share it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from helios.errors import DeadlineExceeded, Unavailable
from helios.http.client import HttpClient
from helios.http.clients import Clients
from helios.http.response import Response, Watch

MAX_HOSTS: Final = 8
"""Hosts of absolute (presigned) URLs whose connections are kept."""

PIECE: Final = 32 << 10
"""What is urgent is asked for in pieces of at least so many bytes, each on a connection of its own: two round trips."""

NEW_PIECES: Final = 32
"""Most pieces over connections that may be new. TCP starts with some 14 KB a round trip and doubles: 4 MiB take eight
round trips on one connection, three or four on 32."""

WARM_PIECES: Final = 4
"""Most pieces where connections carried a lot a moment ago."""

WARM_BYTES: Final = 64 << 20
WARM_S: Final = 10.0
"""Connections count as used for so many seconds after the source has sent that many bytes."""

DISTANT_S: Final = 0.003
"""With a shorter round trip, in seconds, pieces gain nothing."""


class Hosts:
    """``client`` is the registry's own; others get ``connections`` and ``timeout_s`` as it has.

    ``admits`` tells of an IP address whether the registry may send us there (helios/http/places.py).
    ``revive`` is called when it can't be reached, and may start it again; then it is asked once more.
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        timeout_s: float,
        connections: int,
        admits: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
        revive: Callable[[], None] | None = None,
    ) -> None:
        self.own = client
        self._clock, self._revive = clock, revive
        self._lock = threading.Lock()
        make = partial(HttpClient, timeout_s=timeout_s, max_idle=connections, admits=admits)
        self._others = Clients(make, MAX_HOSTS)
        self._sent = 0
        self._sent_at = -math.inf
        self._latency_s = math.inf

    @property
    def latency_s(self) -> float:
        """The shortest time seen from a request to the head of its answer, in seconds; 0 at first."""
        return 0.0 if math.isinf(self._latency_s) else self._latency_s

    def close(self) -> None:
        """Close idle connections."""
        self.own.close()
        self._others.close()

    def route(self, url: str) -> tuple[HttpClient, str]:
        """The client and the path for an object's URL."""
        if url.startswith("/"):
            return self.own, url
        parts = urlsplit(url)
        host = f"{parts.scheme}://{parts.netloc}"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return self._others.get(host), path

    def send(
        self,
        client: HttpClient,
        path: str,
        timeout_s: float,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        watch: Watch | None = None,
    ) -> Response:
        """A GET, once the head of its answer is here. Raises Unavailable."""
        asked = self._clock()
        try:
            response = client.request("GET", path, params=params, headers=headers, timeout_s=timeout_s, watch=watch)
        except DeadlineExceeded:
            raise
        except Unavailable:
            if self._revive is None or client is not self.own:
                raise
            self._revive()
            response = client.request("GET", path, params=params, headers=headers, timeout_s=timeout_s, watch=watch)
        self._latency_s = min(self._latency_s, self._clock() - asked)
        return response

    def pieces(self, client: HttpClient) -> int:
        """Over how many connections to ask for something urgent: open ones only."""
        if self.latency_s < DISTANT_S:
            return 1
        used = self._sent >= WARM_BYTES and self._clock() - self._sent_at < WARM_S
        return min(client.idle, WARM_PIECES if used else NEW_PIECES)

    def sent(self, count: int) -> None:
        """So many bytes of objects came."""
        now = self._clock()
        with self._lock:
            self._sent = count + (self._sent if now - self._sent_at < WARM_S else 0)
            self._sent_at = now
