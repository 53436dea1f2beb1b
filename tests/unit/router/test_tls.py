"""The certificate that clients see is renewed when its files change, and never to half of a new one."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from helios.config import RouterSettings
from helios.errors import UsageError
from router.tls import Certificate, certificate
from tests.support.certificates import Authority


def shown(context: ssl.SSLContext, authority: Authority) -> bytes:
    """What a client is shown, without a socket."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = ssl.create_default_context(cafile=authority.path).wrap_bio(to_client, to_server, server_hostname="h")
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = client.getpeercert(binary_form=True)
    assert certificate
    return certificate


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("router", "h")
    one = Certificate(pair.cert, pair.key, "router.tls")
    before = shown(one.context, authority)
    assert not one.refresh()
    authority.issue("router", "h")
    assert one.refresh()
    assert not one.refresh()
    assert shown(one.context, authority) != before


def test_half_of_a_new_pair_changes_nothing(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, new = authority.issue("router", "h"), authority.issue("new", "h")
    one = Certificate(pair.cert, pair.key, "router.tls")
    before = shown(one.context, authority)
    os.replace(new.cert, pair.cert)
    for _ in range(2):
        with pytest.raises(UsageError, match="mismatch"):
            one.refresh()
        assert shown(one.context, authority) == before
    os.replace(new.key, pair.key)  # the other half comes
    assert one.refresh()
    assert shown(one.context, authority) != before


def test_without_settings_there_is_none() -> None:
    assert certificate(RouterSettings()) is None
