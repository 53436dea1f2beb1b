"""A plain download of a part of a file: the Hub's resolve URL with Range, as any client would ask.

Nothing of ours is in the way: no recipe, no chunk, no placement, no cache, no pool. Only the HTTP client is shared.
Redirects are followed, because a registry may send clients to its object store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import quote, urljoin, urlsplit

from helios.errors import IntegrityError, Unavailable
from helios.http.client import HttpClient
from helios.http.places import sent_by
from helios.tokens import Token, no_token
from heliosfs.fetch.source import BlobRef

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS: Final = 4


class PlainDownload:
    """Asks the registries at ``urls`` in order. Threads may share it; every call blocks."""

    def __init__(self, urls: Sequence[str], timeout_s: float, token: Token = no_token) -> None:
        self._clients = [HttpClient(url, timeout_s=timeout_s, max_idle=4, token=token) for url in urls]
        self._timeout_s = timeout_s

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def fetch(self, want: BlobRef, offset: int, count: int) -> bytearray:
        """``count`` bytes from ``offset``, none where the file is shorter. Raises Unavailable (DeadlineExceeded)."""
        failure: Unavailable | None = None
        for client in self._clients:
            try:
                return self._follow(client, path_of(want), want, offset, count)
            except Unavailable as error:
                failure = error
        raise failure or Unavailable("no registry is configured")

    def _follow(self, client: HttpClient, path: str, want: BlobRef, offset: int, count: int) -> bytearray:
        headers = {"range": f"bytes={offset}-{offset + count - 1}", "accept-encoding": "identity"}
        other: HttpClient | None = None
        try:
            for _ in range(MAX_REDIRECTS + 1):
                with (other or client).request("GET", path, headers=headers) as response:
                    where = response.headers.get("location")
                    if response.status in REDIRECTS and where:
                        base = (other or client).base
                        target = urlsplit(where if base.startswith("unix:") else urljoin(base + path, where))
                        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
                        if target.netloc:
                            if other is not None:
                                other.close()
                            host = f"{target.scheme}://{target.netloc}"
                            admits = sent_by(client.base)
                            other = HttpClient(host, timeout_s=self._timeout_s, max_idle=1, admits=admits)
                        continue
                    if response.status == 416:  # there the file is shorter
                        return bytearray()
                    whole = response.status == 200 and (offset, count) == (0, want.size)
                    length = response.headers.get("content-length")
                    if (response.status != 206 and not whole) or length != str(count):
                        raise Unavailable(f"{path}: asked for {count} bytes: {response.status} with {length} bytes")
                    data = bytearray(count)
                    try:
                        response.read_into(memoryview(data))
                    except IntegrityError as error:  # the body broke off
                        raise Unavailable(f"{path}: {error.message}") from error
                    return data
            raise Unavailable(f"{path_of(want)} is redirected more than {MAX_REDIRECTS} times")
        finally:
            if other is not None:
                other.close()


def path_of(want: BlobRef) -> str:
    """The path of a file on a Hub, of exactly this commit."""
    kind = "" if want.repo.kind == "models" else f"/{want.repo.kind}"
    return f"{kind}/{quote(want.repo.id)}/resolve/{want.commit}/{quote(want.path)}"
