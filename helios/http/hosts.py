"""Hosts as they are written in URLs."""

from __future__ import annotations

from typing import Final

from helios.errors import UsageError

WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - these are looked for, not listened at
"""Addresses that mean all of a machine's, and one of them."""


def bracketed(host: str) -> str:
    """The host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def here(host: str) -> str:
    """What listens at ``host`` is reached at this from its own machine, as a URL has it."""
    return bracketed(WILDCARDS.get(host, host))


def split_listen(address: str, setting: str) -> tuple[str, int]:
    """Host (IPv6 without its brackets) and port of ``host:port``, which a setting says. Raises UsageError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 65535:
        raise UsageError(f"{setting} is {address!r}: write host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
