"""A relay between a worker that answers and one that computes prompts, both of which are the test's."""

from __future__ import annotations

import json
from typing import Any, cast

from helios.config import DisaggregationSettings
from router.disaggregation.connectors import Learns
from router.disaggregation.splits import Splits
from router.relay.upstream import Connection
from router.workers import Worker
from tests.support.relaying import FakeConnection, Scene

WORKERS = ("m=http://d:1,role=decode", "m=http://p:1,role=prefill")
BLOCKS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "e"}
PUSHED = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1]], "remote_engine_id": "e",
    "remote_request_id": "chatcmpl-1", "remote_host": "10.0.0.5", "remote_port": 5600, "tp_size": 1, "dcp_size": 1,
    "pp_size": 1, "remote_num_tokens": 64, "transfer_mode": "push",
}  # fmt: skip
"""What a worker answers that writes its blocks."""
LONG = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 7}).encode()


def answer(document: Any, status: bytes = b"200 OK") -> bytes:
    content = json.dumps(document).encode()
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(content)) + content


PREFILLED = answer({"choices": [], "kv_transfer_params": BLOCKS})
ANSWER = answer({"choices": ["a"]})


class Split(Scene):
    """A relay with a worker that answers and one that computes prompts."""

    def __init__(
        self,
        *,
        workers: Any = WORKERS,
        lease_s: float = 30.0,
        warm: bool = True,
        connector: Any = "nixl",
        min_tokens: int = 256,
        **more: Any,
    ) -> None:
        super().__init__(workers=workers, **more)
        settings = DisaggregationSettings(connector=connector, min_tokens=min_tokens, timeout_s=20, lease_s=lease_s)
        splits = self.relay.splits = Splits(settings, self.relay)
        for worker in self.workers.all:
            worker.health.succeeded()
        for prefill, decode, _ in splits.pairs.due(self.workers) if warm else ():
            splits.pairs.done(prefill, decode)
            match splits.connector.learns:
                case Learns.QUERY:
                    splits.peers.queried(prefill, json.dumps({"0": {"engine_id": "e-0", "worker_addr": {}}}).encode())
                case Learns.ANSWER:
                    splits.peers.answered(prefill, json.dumps(PUSHED).encode())

    def asks(self, body: bytes = LONG) -> Split:
        self.exchange.begin()
        self.exchange.feed(body)
        self.exchange.complete()
        return self

    def results(self) -> dict[str, float]:
        """How often which thing was counted."""
        found = {}
        for family in self.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == "helios_router_prefills_total" and sample.value:
                    found[sample.labels["result"]] = sample.value
        return found

    def load(self, url: str) -> tuple[int, int]:
        """Requests at a worker, and tokens that are to be computed there."""
        worker = self.workers.at(url)
        assert worker is not None
        return worker.in_flight, worker.load.prefill


def asked(connection: FakeConnection) -> tuple[bytes, dict[str, bytes], dict[str, Any]]:
    """The request line, headers and body that a worker got."""
    head, _, body = connection.asked.partition(b"\r\n\r\n")
    line, *lines = head.split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines)
    return line, {name.decode(): value for name, value in headers.items()}, json.loads(body)


def joins(scene: Split, host: bytes) -> FakeConnection:
    """The connection to a worker that is being made is there."""
    for one in scene.pool.connecting:
        worker = getattr(one.asker, "worker", None)
        if isinstance(worker, Worker) and worker.address.authority == host:
            asker, one.asker = one.asker, None
            assert asker is not None
            connection = scene.pool.connection(reused=False)
            asker.connected(cast(Connection, connection))
            return connection
    raise AssertionError(f"nobody connects to {host!r}")


def both(scene: Split) -> tuple[FakeConnection, FakeConnection]:
    """The two connections: to the one that computes the prompt, and to the one that answers."""
    return joins(scene, b"p:1"), joins(scene, b"d:1")
