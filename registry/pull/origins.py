"""Connections to the upstream and to the hosts it redirects to, and where a token may go.

A redirect is followed only to hosts that are allowed: the upstream's own (any port), those of the Hub's storage, and
what ``registry.upstream_redirects`` names; never from https to http. A token goes to the upstream's own origin alone
(scheme, host and port, RFC 6454).
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import urljoin, urlsplit

from helios.errors import IntegrityError
from helios.http.client import HttpClient
from helios.http.clients import Clients

HUB_HOSTS: Final = ("huggingface.co", "*.huggingface.co", "hf.co", "*.hf.co")
"""Where the Hub keeps what it redirects to."""
MOST: Final = 16
"""Origins whose connections are kept."""
IDLE: Final = 32
"""Connections kept open for each."""
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
HOPS: Final = 5


@dataclass(frozen=True, slots=True)
class Target:
    """A place to ask: ``origin`` (scheme://host[:port]) and the path with its query."""

    origin: str
    path: str

    @property
    def url(self) -> str:
        return self.origin + self.path


def target_of(url: str) -> Target:
    """The parts of an absolute http or https URL; raises IntegrityError for anything else.

    Errors show neither a user's name and password nor the query, which in a signed address is a permission.
    """
    shown = repr(url.rpartition("@")[2].partition("?")[0][:200])
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 raises for one that is no number
    except ValueError:
        raise IntegrityError(f"the upstream leads to {shown}, which is no URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise IntegrityError(f"the upstream leads to {shown}; http or https without credentials expected")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii() or any(c <= " " for c in path):
        raise IntegrityError(f"the upstream leads to a malformed URL: {shown}")
    return Target(f"{parts.scheme}://{parts.netloc.lower()}", path)


class Origins:
    """Clients by origin. Threads may share it."""

    def __init__(self, endpoint: str, allowed: Iterable[str] = (), *, timeout_s: float) -> None:
        self.home = target_of(endpoint)
        self._allowed = (*HUB_HOSTS, *allowed)
        self._timeout_s = timeout_s
        self._clients = Clients(self._make, MOST)

    def client(self, origin: str) -> HttpClient:
        """The client for an origin."""
        return self._clients.get(origin)

    def _make(self, origin: str) -> HttpClient:
        return HttpClient(origin, timeout_s=self._timeout_s, max_idle=IDLE, proxy=_proxy(origin))

    def trusted(self, origin: str) -> bool:
        """Whether a token may go there."""
        return origin == self.home.origin

    def follow(self, at: Target, location: str | None) -> Target:
        """Where a redirect leads. Raises IntegrityError for a place that is not allowed."""
        try:
            absolute = urljoin(at.url, location or "")
        except ValueError:
            raise IntegrityError(f"{at.origin} leads to what is no URL") from None
        target = target_of(absolute)
        here, there, home = urlsplit(at.origin), urlsplit(target.origin), urlsplit(self.home.origin)
        host = there.hostname or ""
        if here.scheme == "https" and there.scheme == "http":
            raise IntegrityError(f"{at.origin} redirects from https to {target.origin}")
        if host != home.hostname and not any(fnmatchcase(host, pattern) for pattern in self._allowed):
            raise IntegrityError(
                f"{at.origin} redirects to {host}, which is not allowed",
                hint=f"If that is where it keeps its files: add {host!r} to registry.upstream_redirects.",
            )
        return target

    def close(self) -> None:
        self._clients.close()


def _proxy(origin: str) -> str | None:
    """The proxy that the environment names for the origin (HTTPS_PROXY, HTTP_PROXY, NO_PROXY)."""
    parts = urlsplit(origin)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    found = urllib.request.getproxies().get(parts.scheme)
    return None if found is None else found if "//" in found else f"http://{found}"
