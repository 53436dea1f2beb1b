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
