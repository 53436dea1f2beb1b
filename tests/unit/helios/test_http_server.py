"""The uvicorn seam on real sockets: sendfile, disconnects, signals."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

APP = textwrap.dedent(
    """
    import asyncio, sys
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from helios.http.server import FileRangeResponse, listen_tcp, make_server, url_of

    calls = 0

    async def file(request: Request):
        global calls
        offset, count = int(request.query_params["offset"]), int(request.query_params["count"])
        return FileRangeResponse(open(sys.argv[1], "rb"), offset, count, 200, [("x-kind", "file")])

    async def slow(request: Request):
        await asyncio.sleep(float(request.query_params["s"]))
        return PlainTextResponse("done")

    sock = listen_tcp("127.0.0.1", 0)
    app = Starlette(routes=[Route("/file", file), Route("/slow", slow)])
    server = make_server(app, grace_s=int(sys.argv[2]))
    print(url_of(sock, "127.0.0.1"), flush=True)
    asyncio.run(server.serve(sockets=[sock]))
    print("stopped by", server.stopped_by.name, flush=True)
    """
)


@pytest.fixture
def served(tmp_path):
    """(port, content, process) of a server with a 40 MB file."""
    content = os.urandom(1 << 20) * 40
    (tmp_path / "file").write_bytes(content)
    process = subprocess.Popen(
        [sys.executable, "-c", APP, str(tmp_path / "file"), "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield int(process.stdout.readline().rsplit(":", 1)[1]), content, process
    finally:
        process.kill()
        process.communicate()


def get(port, path, method="GET"):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()


def stop(process):
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert err == ""
    return out


def test_ranges_leave_whole_and_the_connection_is_kept(served):
    port, content, process = served
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        for offset, count in [(0, len(content)), (3, 5), (len(content) - 1, 1), (7, 0), (1 << 20, 9 << 20)]:
            connection.request("GET", f"/file?offset={offset}&count={count}")
            response = connection.getresponse()
            assert response.headers["content-length"] == str(count)
            assert response.read() == content[offset : offset + count]
    response, body = get(port, "/file?offset=0&count=100", "HEAD")
    assert (response.headers["content-length"], body) == ("100", b"")
    assert "stopped by SIGTERM" in stop(process)
    assert process.returncode == 0


def test_a_client_that_leaves_in_the_middle_is_no_error(served):
    port, content, process = served
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(f"GET /file?offset=0&count={len(content)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            sock.recv(1000)
    assert get(port, "/file?offset=0&count=4")[1] == content[:4]
    stop(process)


def test_a_request_in_flight_is_answered_before_the_server_ends(served):
    port, _, process = served
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", "/slow?s=1")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert connection.getresponse().read() == b"done"
    stop_out, err = process.communicate(timeout=20)
    assert "stopped by SIGTERM" in stop_out
    assert err == ""


def test_a_port_in_use_is_said_with_the_flag():
    from helios.errors import Unavailable
    from helios.http.server import listen_tcp

    with listen_tcp("127.0.0.1", 0) as taken, pytest.raises(Unavailable, match="--port 0") as caught:
        listen_tcp("127.0.0.1", taken.getsockname()[1])
    assert "in use" in caught.value.message


def test_a_file_that_is_shorter_than_announced_breaks_the_connection_instead_of_lying(served):
    port, content, process = served
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        get(port, f"/file?offset=0&count={len(content) + 1}")
    process.send_signal(signal.SIGTERM)
    assert "shorter than was announced" in process.communicate(timeout=20)[1]


def test_a_head_has_bounds_in_bytes_and_in_time(tmp_path):
    """Nobody keeps a connection, or memory, with a head that does not end; bodies and idle connections may."""
    patience = "import helios.http.protocol as h; h.HEAD_S = h.SILENT_S = 0.5\n"
    app = APP.replace("server = make_server", patience + "server = make_server")
    (tmp_path / "file").write_bytes(b"12345")
    command = [sys.executable, "-c", app, str(tmp_path / "file"), "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        port = int(process.stdout.readline().rsplit(":", 1)[1])

        def said(*parts: bytes, pause_s: float = 0.0) -> bytes:
            out = b""
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for part in parts:
                        sock.sendall(part)
                        time.sleep(pause_s)
                with contextlib.suppress(ConnectionResetError):
                    while part := sock.recv(65536):
                        out += part
            return out

        good = b"GET /file?offset=0&count=5 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        post = b"POST /slow?s=0 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        try:
            assert said(good).endswith(b"12345")
            assert said() == said(b"GET / HT") == said(good[:-2]) == b"", "cut off when it takes too long"
            assert said(*[good[i : i + 1] for i in range(len(good))], pause_s=0.02) == b"", "also when it drips"
            assert said(good.replace(b"host", b"x: " + b"y" * (300 << 10) + b"\r\nhost")).split()[1] == b"431"
            # What stands beside a body's chunks, and behind them, the parser keeps, too.
            chunked = b"GET /slow?s=9 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            for endless in (b"1;" + b"x" * (600 << 10), b"0\r\n" + b"x: y\r\n" * 100_000):
                assert said(chunked + endless).split()[1] == b"431"
            # A body is not a head, and a connection that was answered has the server's own patience.
            assert said(post + b"content-length: 2\r\n\r\n", b"{", b"}", pause_s=0.4).split()[1] == b"405"
            keep = good.replace(b"connection: close\r\n", b"")
            assert said(keep, good, pause_s=0.8).count(b"12345") == 2
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
