"""Where a server may send its clients: an address in an answer must not lead into the client's own machine.

A registry says where objects lie, by absolute addresses if they are in an object store. One that is hostile, or was
deceived, could name what only the reader reaches: its loopback, or the cloud's metadata service, which hands out
credentials. Private networks are where many object stores are, so they are allowed.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

METADATA: Final = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")))
"""Metadata services that are not at a link-local address: EC2's over IPv6, Alibaba Cloud's, Azure's wire server."""


def sent_by(base: str) -> Callable[[str], bool]:
    """Tells of an IP address whether whoever is at ``base`` (a URL, or ``unix:…``) may send us there."""

    def admits(address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if ip.is_link_local or ip.is_multicast or ip in METADATA:
            return False
        return not ip.is_loopback or _is_here(base)

    return admits


def _is_here(base: str) -> bool:
    """Whether the server is on this machine itself."""
    if base.startswith("unix:"):
        return True
    try:
        found = socket.getaddrinfo(urlsplit(base).hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(at[0]).partition("%")[0]).is_loopback for *_, at in found)
