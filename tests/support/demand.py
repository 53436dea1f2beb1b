"""A router's demand, as whoever scales reads it: over TCP, with a token for nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from helios.demand import Demand, Line, read, read_line
from tests.support.cloud_servers import free_port
from tests.support.routing import RouterProcess, StartRouter

TOKEN = "hls_scaler"


class Scaled:
    """A router whose demand can be looked at; models without a worker wait."""

    def __init__(self, router: RouterProcess, port: int) -> None:
        self.router, self.port = router, port
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str = "/demand", token: str = TOKEN) -> tuple[int, bytes]:
        with self._asked(path, token, 10) as answer:
            return answer.status, answer.read()

    def demand(self) -> Demand:
        status, body = self.get()
        assert status == 200, body
        return read(body)

    @contextmanager
    def watch(self) -> Iterator[Iterator[Line]]:
        with self._asked("/demand/watch", TOKEN, 20) as answer:
            assert answer.status == 200
            yield (read_line(line) for line in answer)

    @contextmanager
    def _asked(self, path: str, token: str, timeout_s: float) -> Iterator[HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {token}"})
            yield connection.getresponse()
        finally:
            connection.close()


def token_file(path: Path) -> str:
    path.write_text(f"{hashlib.sha256(TOKEN.encode()).hexdigest()} scaler\n")
    return str(path)


def start_scaled(
    start_router: StartRouter, tmp_path: Path, *workers: Any, queue: Any = None, **settings: Any
) -> Scaled:
    port = free_port()
    admission = json.dumps({"hold": True, "queue": queue or {}})
    router = start_router(
        *workers, demand_tokens=token_file(tmp_path / "scalers"), admin_port=port, admission=admission, **settings
    )
    return Scaled(router, port)
