"""Clients of several servers share a bound."""

from __future__ import annotations

import pytest

from helios.errors import InvalidInput
from helios.http.client import HttpClient
from helios.http.clients import Clients


def test_the_client_used_longest_ago_makes_room_and_is_closed() -> None:
    closed: list[str] = []

    class Noting(HttpClient):
        def __init__(self, address: str) -> None:
            super().__init__(address)
            self.address = address

        def close(self) -> None:
            closed.append(self.address)
            super().close()

    clients = Clients(Noting, 2)
    one = clients.get("http://one")
    clients.get("http://two")
    assert clients.get("http://one") is one
    clients.get("http://three")
    assert closed == ["http://two"]
    assert clients.get("http://one") is one
    clients.close()
    assert closed == ["http://two", "http://three", "http://one"]
    assert clients.get("http://one") is not one


def test_an_address_that_makes_no_client_takes_no_room() -> None:
    def refuse(address: str) -> HttpClient:
        raise InvalidInput(address)

    with pytest.raises(InvalidInput, match="bad"):
        Clients(refuse, 1).get("bad")
