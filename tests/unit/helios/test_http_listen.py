"""Listening sockets: answers leave at once, a taken port is said, a unix socket is its owner's."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from helios.errors import Unavailable
from helios.http.server import listen_tcp, listen_unix, url_of


def test_answers_are_not_held_back_by_nagle() -> None:
    """Otherwise a small answer after another waits 40 ms for the client's delayed acknowledgement."""

    async def main() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            accepted.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = listen_tcp("127.0.0.1", 0)
        async with await asyncio.start_server(serve, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            nodelay = await asyncio.wait_for(accepted, 10)
            writer.close()
            await writer.wait_closed()
        return nodelay

    assert asyncio.run(main()) != 0


def test_a_taken_port_names_the_flag() -> None:
    with listen_tcp("127.0.0.1", 0) as taken, pytest.raises(Unavailable) as found:
        listen_tcp("127.0.0.1", taken.getsockname()[1], "--metrics-port")
    assert "--metrics-port" in str(found.value)


def test_urls() -> None:
    with listen_tcp("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock, "127.0.0.1") == url_of(sock, "0.0.0.0") == f"http://127.0.0.1:{port}"
        assert url_of(sock, "::") == f"http://[::1]:{port}"


def test_a_unix_socket_replaces_a_stale_one_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listen_unix(path).close()
    with listen_unix(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
