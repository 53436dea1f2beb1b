"""A publisher of KV events over real ZMQ sockets, which works as vLLM's does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import zmq

from router.kv.publishers import Publisher
from tests.support.kv_events import Log

ENDED: Final = (-1).to_bytes(8, "big", signed=True)


class Server:
    """vLLM's publisher in a thread of its own: PUB and ROUTER, messages numbered from 0, the last ``kept`` kept."""

    def __init__(self, port: int = 0, replay_port: int = 0, *, kept: int = 1000, replays: bool = True) -> None:
        self.log = Log(kept=kept)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind(f"tcp://127.0.0.1:{port or '*'}")
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"tcp://127.0.0.1:{replay_port or '*'}")
        self.port, self.replay_port = (int(s.LAST_ENDPOINT.rpartition(b":")[2]) for s in (self._pub, self._router))
        self._answers, self._lock, self._stop = replays, threading.Lock(), False
        self.ends = True
        self.asked: list[int] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def publisher(self, worker: str = "w", *, replay: bool = True) -> Publisher:
        again = f"tcp://127.0.0.1:{self.replay_port}" if replay else None
        return Publisher(worker, f"tcp://127.0.0.1:{self.port}", again)

    def publish(self, payload: bytes | None, *, lost: bool = False) -> None:
        assert payload is not None
        with self._lock:
            number, payload = self.log.publish(payload)
            if not lost:
                self._pub.send_multipart([b"kv@w", number.to_bytes(8, "big"), payload])

    def send(self, *frames: bytes) -> None:
        with self._lock:
            self._pub.send_multipart(frames)

    def _serve(self) -> None:
        while not self._stop:
            if not self._router.poll(20):
                continue
            client, _, first = self._router.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            if not self._answers:
                continue
            with self._lock:
                for number, payload in self.log.replay(self.asked[-1]):
                    self._router.send_multipart([client, b"", b"kv@w", number.to_bytes(8, "big"), payload])
            if self.ends:
                self._router.send_multipart([client, b"", b"", ENDED, b""])

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self._context.destroy(linger=0)


@contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[Server]:
    server = Server(*args, **kwargs)
    try:
        yield server
    finally:
        server.close()
