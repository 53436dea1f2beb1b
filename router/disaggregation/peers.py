"""What is known of prefill workers before they answer: where they are met, and who they are there.

    SGLang      host and port of the bootstrap server: the worker's setting
    Mooncake    the same, and the engines that are registered there, one a data-parallel rank, which it is asked
    NIXL push   the side channel's host and port, engine and sizes, as an answer of the worker has them

What was learned is that of one start of the worker (``Worker.home``): another one has other engines. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Final

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder
from helios.http.hosts import bracketed
from router.disaggregation.bodies import Values
from router.disaggregation.bootstrap import bootstrap_of, query_url
from router.disaggregation.connectors import Connector, Learns
from router.worker import Worker

NOTHING: Final[Values] = {}


class _Engine(msgspec.Struct):
    engine_id: str


_OBJECT: Final = json_decoder(dict[str, Raw])
_ENGINES: Final = json_decoder(dict[str, _Engine])
"""By rank (vLLM 0.32.0, mooncake_utils.py, ``GET /query``)."""


class _Met:
    """One worker's. ``ranks``: what is known, for each rank of it; they are used in turn."""

    __slots__ = ("at", "ranks", "turn")

    def __init__(self, worker: Worker, ranks: list[Values]) -> None:
        self.at, self.ranks, self.turn = (worker.home, worker.bootstrap), ranks, 0


class Peers:
    """Of one process."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._met: dict[str, _Met] = {}

    def of(self, worker: Worker) -> Values | None:
        """What is known of the worker; None: not enough for a request to it."""
        match self._connector.learns:
            case Learns.NOTHING:
                return NOTHING
            case Learns.ADDRESS:
                host, port = bootstrap_of(worker)
                return {"bootstrap_host": _text(bracketed(host)), "bootstrap_port": b"%d" % port}
        met = self._met.get(worker.url)
        if met is None or met.at != (worker.home, worker.bootstrap):
            return None
        met.turn = (met.turn + 1) % len(met.ranks)
        return met.ranks[met.turn]

    def answered(self, worker: Worker, params: bytes) -> bool:
        """Learn from what a worker answered; whether that was possible. Raises msgspec.DecodeError."""
        found = self._own(params)
        if not {"remote_engine_id", "remote_host", "remote_port", "tp_size"} <= found.keys():
            return False
        self._met[worker.url] = _Met(worker, [found])
        return True

    def still(self, worker: Worker, params: bytes) -> bool:
        """Whether the worker that answered so is the one that is known; else it has to be met anew."""
        if self._connector.learns is not Learns.ANSWER:
            return True
        met = self._met.get(worker.url)
        try:
            same = met is not None and self._own(params) == met.ranks[0]
        except msgspec.DecodeError:
            same = False
        if not same:
            self._met.pop(worker.url, None)
        return same

    def queried(self, worker: Worker, content: bytes) -> bool:
        """Learn what a bootstrap server answered; whether any engine is there. Raises msgspec.DecodeError."""
        address = _text(query_url(worker))
        ranks: list[Values] = [
            {"bootstrap_addr": address, "engine_id": _text(engine.engine_id), "rank": rank.encode()}
            for rank, engine in sorted(_ENGINES.decode(content).items())
            if rank.isascii() and rank.isdigit()
        ]
        if ranks:
            self._met[worker.url] = _Met(worker, ranks)
        return bool(ranks)

    def keep(self, urls: Collection[str]) -> None:
        """Forget the workers that are gone."""
        if len(self._met) > len(urls):
            self._met = {url: met for url, met in self._met.items() if url in urls}

    def _own(self, params: bytes) -> Values:
        fields = _OBJECT.decode(params)
        own = self._connector.identity
        return {name: bytes(value) for name, value in fields.items() if name in own and bytes(value) != b"null"}


def _text(text: str) -> bytes:
    return json.dumps(text).encode()
