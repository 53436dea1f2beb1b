"""Where a prefill worker is met by those that take blocks from it: SGLang's and Mooncake's bootstrap server. No I/O.

It is said of a worker as ``PORT``, on the worker's own host, or as ``HOST:PORT``, an IPv6 address in brackets.
"""

from __future__ import annotations

from typing import Final, Protocol

from helios.http.hosts import bracketed

PORT: Final = 8998
"""Where nobody says: the default of vLLM's VLLM_MOONCAKE_BOOTSTRAP_PORT and of SGLang's
``--disaggregation-bootstrap-port``."""


class At(Protocol):
    @property
    def host(self) -> str: ...


class Met(Protocol):
    """A worker."""

    @property
    def bootstrap(self) -> str: ...

    @property
    def address(self) -> At: ...


def bootstrap_of(worker: Met) -> tuple[str, int]:
    """Host and port of a worker's server: as is said of it, else on its host."""
    host, _, port = worker.bootstrap.rpartition(":")
    return (host.strip("[]") or worker.address.host), int(port or PORT)


def query_url(worker: Met) -> str:
    """The server as Mooncake names it."""
    host, port = bootstrap_of(worker)
    return f"http://{bracketed(host)}:{port}"


def wrong_with(bootstrap: str) -> str:
    """Why no server can be there, in words; empty: one can, or nothing is said."""
    host, colon, port = bootstrap.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() else 0
    bare = host.removeprefix("[").removesuffix("]")
    in_brackets = host == f"[{bare}]"
    spelled = (bool(bare) or not colon) and (":" in bare) == in_brackets and not set(bare) & set("[]*/@ ")
    if bootstrap and not (spelled and 0 < number < 65536):
        return f"its bootstrap is {bootstrap!r}: it must be PORT or HOST:PORT"
    return ""
