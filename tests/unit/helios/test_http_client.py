"""The blocking client against real sockets, with a server that misbehaves on demand."""

import re
import socket
import threading
import time
from contextlib import closing, contextmanager

import pytest

from helios.errors import DeadlineExceeded, IntegrityError, NotFound, Unavailable
from helios.http.client import HttpClient


@contextmanager
def server(*scripts, unix=None):
    """Each script is (bytes to send, close afterwards?) for one request; gives the base URL and the requests seen."""
    listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    listener.bind(str(unix) if unix else ("127.0.0.1", 0))
    listener.listen()
    seen: list[bytes] = []
    stop = threading.Event()
    queue = list(scripts)

    def run():
        while queue and not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with closing(connection):
                connection.settimeout(10)
                while queue:
                    data = b""
                    try:
                        while b"\r\n\r\n" not in data:
                            got = connection.recv(65536)
                            if not got:
                                break
                            data += got
                    except OSError:
                        break
                    head, _, body = data.partition(b"\r\n\r\n")
                    length = re.search(rb"content-length: (\d+)", head.lower())
                    while length and len(body) < int(length[1]):
                        body += connection.recv(65536)
                    if not data:
                        break
                    seen.append(data)
                    answer, close = queue.pop(0)
                    if answer is None:
                        stop.wait(10)
                        return
                    connection.sendall(answer)
                    if close:
                        break

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield (f"unix:{unix}" if unix else f"http://127.0.0.1:{listener.getsockname()[1]}"), seen
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(15)
        assert not thread.is_alive()


def answer(body: bytes, status="200 OK", length=None):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def test_a_unix_socket_and_a_kept_alive_connection(tmp_path):
    with server((answer(b"[1]"), False), (answer(b"[2]"), False), unix=tmp_path / "s") as (base, seen):
        with closing(HttpClient(base)) as client:
            assert client.json("GET", "/a", params={"repo": "models/a/b"}) == [1]
            assert client.json("PUT", "/b", body={"x": 1}) == [2]
    assert seen[0].startswith(b"GET /a?repo=models%2Fa%2Fb HTTP/1.1")
    assert len(seen) == 2


def test_a_prefix_in_the_base_is_kept():
    with server((answer(b"1"), False)) as (base, seen), closing(HttpClient(base + "/t/acme")) as client:
        client.json("GET", "/api")
    assert seen[0].startswith(b"GET /t/acme/api ")


def test_bytes_land_in_the_callers_buffer():
    buffer = bytearray(6)
    with server((answer(b"abcdef"), False)) as (base, _), closing(HttpClient(base)) as client:
        with client.request("GET", "/") as response:
            response.read_into(memoryview(buffer))
    assert buffer == b"abcdef"


def test_a_short_body_is_an_error():
    with server((answer(b"abc", length=6), True)) as (base, _), closing(HttpClient(base)) as client:
        with client.request("GET", "/") as response, pytest.raises((IntegrityError, Unavailable)):
            response.read_into(memoryview(bytearray(6)))


def test_a_stall_ends_at_the_deadline():
    with server((answer(b"abc", length=6), False), (None, True)) as (base, _), closing(HttpClient(base)) as client:
        with client.request("GET", "/", timeout_s=0.3) as response, pytest.raises(DeadlineExceeded):
            response.read_into(memoryview(bytearray(6)))
    with server((None, True)) as (base, _), closing(HttpClient(base)) as client, pytest.raises(DeadlineExceeded):
        client.request("GET", "/", timeout_s=0.3)


@pytest.mark.parametrize(
    ("at_once", "then"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x-filler: " + b"y" * 1000),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b"y" * 1000),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"3e8; " + b"y" * 1000),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3e8\r\n", b"y" * 1000),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"y" * 1000),
    ],
    ids=["head", "body", "length of a chunk", "chunk", "body without a length"],
)
def test_a_trickle_ends_at_the_deadline(at_once, then):
    """Each byte comes soon after the one before, and all of them would take far too long."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def trickle():
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(at_once)
            for byte in then:
                if over.wait(0.05):
                    return
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return  # the client left

    thread = threading.Thread(target=trickle)
    thread.start()
    begin = time.monotonic()
    with closing(listener), closing(HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}")) as client:
        with pytest.raises(DeadlineExceeded):
            client.bytes("GET", "/", timeout_s=0.5)
        assert time.monotonic() - begin < 10
        over.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_connection_that_the_server_closed_is_replaced():
    with server((answer(b"1"), True), (answer(b"2"), False)) as (base, _), closing(HttpClient(base)) as client:
        assert client.json("GET", "/") == 1
        assert client.json("GET", "/") == 2


def test_a_post_is_never_sent_on_a_connection_that_may_be_stale():
    with server((answer(b"1"), False), (answer(b"2"), False)) as (base, _), closing(HttpClient(base)) as client:
        assert client.json("GET", "/") == 1
        idle = client._idle[0]
        with pytest.raises(DeadlineExceeded):  # the server is still busy with the first connection
            client.json("POST", "/", body={}, timeout_s=0.2)
        assert client._idle == [idle]


def test_an_error_answer_becomes_the_error_it_describes():
    body = b'{"error": {"code": "RepoNotFound", "message": "no a/b", "hint": "helios push"}}'
    with server((answer(body, "404 Not Found"), False)) as (base, _), closing(HttpClient(base)) as client:
        with pytest.raises(NotFound) as caught:
            client.json("GET", "/")
    assert (caught.value.code, caught.value.hint) == ("RepoNotFound", "helios push")


def test_nobody_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(Unavailable, match="can't be reached"):
        HttpClient(base).json("GET", "/")


def test_an_answer_that_comes_before_all_of_the_body_says_why():
    """Who refuses a body answers, and closes without reading on: the refusal counts, not the broken connection."""
    refusal = b'{"error": {"code": "NoSpace", "message": "no room", "hint": null}}'
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        connection, _ = listener.accept()
        with closing(connection):
            connection.recv(65536)
            connection.sendall(answer(refusal, "507 Insufficient Storage"))

    class Body:
        left = 64 << 20

        def read(self, count=-1):
            data = bytes(min(count, self.left))
            self.left -= len(data)
            return data

    thread = threading.Thread(target=refuse)
    thread.start()
    with closing(listener), closing(HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}")) as client:
        headers = {"content-length": str(Body.left)}
        with client.request("PUT", "/x", headers=headers, body=Body()) as response:
            assert (response.status, response.read()) == (507, refusal)
        assert client.idle == 0
        thread.join(10)
