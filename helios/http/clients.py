"""Clients of several servers, a bounded number of them: the one used longest ago makes room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from helios.http.client import HttpClient


class Clients:
    """Clients by address. ``make`` makes one for an address; threads may share them. Close them when done."""

    def __init__(self, make: Callable[[str], HttpClient], most: int) -> None:
        self._make, self._most = make, most
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, HttpClient] = OrderedDict()

    def get(self, address: str) -> HttpClient:
        """The client for an address. Raises what ``make`` raises."""
        gone = None
        with self._lock:
            client = self._clients.get(address)
            if client is None:
                client = self._clients[address] = self._make(address)
                if len(self._clients) > self._most:
                    gone = self._clients.popitem(last=False)[1]
            self._clients.move_to_end(address)
        if gone is not None:
            gone.close()
        return client

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            clients, self._clients = self._clients, OrderedDict()
        for client in clients.values():
            client.close()
