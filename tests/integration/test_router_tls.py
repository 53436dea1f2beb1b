"""TLS on both sides: what clients are shown, and which workers are believed."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.certificates import Authority, Pair
from tests.support.plain_worker import Speaking
from tests.support.routing import CHAT, RouterProcess, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certificates")


# --- towards clients -------------------------------------------------------------------------------------------------


def secure(
    start_router: StartRouter, authority: Authority, pair: Pair, *fakes: Control, **settings: Any
) -> RouterProcess:
    router = start_router(*fakes, wait_up=False, tls_cert=pair.cert, tls_key=pair.key, **settings)
    router.tls = ssl.create_default_context(cafile=authority.path)
    return router


def serial(router: RouterProcess) -> str:
    """The number of the certificate that a new connection is shown."""
    assert router.tls is not None
    with (
        socket.create_connection(router.address, timeout=10) as sock,
        router.tls.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        shown = tls.getpeercert()
        assert shown
        return str(shown["serialNumber"])


def test_clients_come_by_tls(fake_vllm: Start, start_router: StartRouter, authority: Authority, wait_for: Any) -> None:
    fake = fake_vllm("tiny", token_s=0.002)
    router = secure(start_router, authority, authority.issue("router", "127.0.0.1"), fake, processes=2)
    assert router.url.startswith("https://127.0.0.1:")
    wait_for(lambda: router.up() == 1, what="the worker")
    assert router.chat().status == 200
    connection = router.connection()
    for _ in range(3):  # one connection, streams and what Starlette answers
        body = json.dumps({"model": "tiny", "stream": True, "max_tokens": 200, **CHAT})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        connection.request("GET", "/healthz")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.close()
    with socket.create_connection(router.address, timeout=10) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"200" not in plain.recv(1000)
    assert router.chat().status == 200
    assert router.stop() == 0


def test_a_new_certificate_is_shown_after_sighup(
    fake_vllm: Start, start_router: StartRouter, authority: Authority, wait_for: Any
) -> None:
    pair = authority.issue("router", "127.0.0.1")
    router = secure(start_router, authority, pair, fake_vllm("tiny"))
    before = serial(router)
    authority.issue("router", "127.0.0.1")
    assert serial(router) == before
    router.process.send_signal(signal.SIGHUP)
    wait_for(lambda: serial(router) != before, what="the new certificate")
    assert router.request("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"TLS_CERT": "{cert}"}, "go together"),
        ({"TLS_CERT": "{cert}", "TLS_KEY": "/no/such"}, "can't be used: No such file"),
        ({"TLS_CERT": "{cert}", "TLS_KEY": "{other}"}, "key values mismatch"),
        ({"WORKER_CA": "{key}"}, "router.worker_ca="),
        ({"WORKER_KEY": "{key}"}, "without router.worker_cert"),
    ],
)
def test_files_that_cannot_work_exit_2(helios: Any, authority: Authority, settings: dict[str, str], part: str) -> None:
    pair, other = authority.issue("router", "127.0.0.1"), authority.issue("other", "127.0.0.1")
    env = {
        f"HELIOS_ROUTER__{name}": value.format(cert=pair.cert, key=pair.key, other=other.key)
        for name, value in settings.items()
    }
    assert part in helios("router", "--worker", "m=http://127.0.0.1:9", env=env, code=2).err


# --- towards workers -------------------------------------------------------------------------------------------------

ANSWER = json.dumps({"object": "chat.completion", "model": "m"}).encode()


class Worker(Speaking):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.say(ANSWER)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    tls: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The handshake is made in the connection's thread."""
        try:
            with self.tls.wrap_socket(request, server_side=True) as sock:
                super().finish_request(sock, client_address)
        except OSError:
            request.close()  # the router did not like the certificate, or showed none


@contextmanager
def worker(pair: Pair, clients_of: str | None = None) -> Iterator[int]:
    """A worker with TLS; its port."""
    with Server(("127.0.0.1", 0), Worker) as server:
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(pair.cert, pair.key)
        if clients_of is not None:
            server.tls.verify_mode = ssl.CERT_REQUIRED
            server.tls.load_verify_locations(clients_of)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_worker_is_believed_by_its_name_and_authority(
    start_router: StartRouter, authority: Authority, tmp_path: Path, wait_for: Any
) -> None:
    stranger = Authority(tmp_path / "stranger", "stranger")
    with ExitStack() as stack:
        good = stack.enter_context(worker(authority.issue("good", "localhost")))
        wrong_name = stack.enter_context(worker(authority.issue("name", "elsewhere")))
        wrong_authority = stack.enter_context(worker(stranger.issue("authority", "localhost")))
        router = start_router(
            f"m=https://localhost:{good}", f"name=https://localhost:{wrong_name}",
            f"authority=https://localhost:{wrong_authority}", wait_up=False, worker_ca=authority.path,
        )  # fmt: skip
        wait_for(lambda: router.up() == 1, what="the worker")
        for _ in range(5):
            answer = router.chat(model="m")
            assert (answer.status, answer.body) == (200, ANSWER)
        for model in ("name", "authority"):
            answer = router.chat(model=model)
            assert (answer.status, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
            assert "certificate" in answer.json()["error"]["message"]
        assert router.stop() == 0


def test_a_worker_that_wants_a_certificate_gets_ours(
    start_router: StartRouter, authority: Authority, wait_for: Any
) -> None:
    ours = authority.issue("router", "router")
    with worker(authority.issue("worker", "127.0.0.1"), clients_of=authority.path) as port:
        url = f"m=https://127.0.0.1:{port}"
        router = start_router(url, worker_ca=authority.path, worker_cert=ours.cert, worker_key=ours.key)
        assert router.chat(model="m").status == 200
        bare = start_router(url, wait_up=False, worker_ca=authority.path)
        wait_for(lambda: bare.chat(model="m").status == 503, what="the worker to refuse us")
        assert bare.up() == 0
        assert (router.stop(), bare.stop()) == (0, 0)


def test_an_endpoint_that_is_no_worker_is_met_by_the_systems_authorities(
    start_router: StartRouter, authority: Authority, wait_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router's own authority is for its workers: it must not stand for the whole world, nor the reverse."""
    with worker(authority.issue("endpoint", "localhost")) as port:
        rule = [{"model": "m", "to": [{"model": "m", "url": f"https://localhost:{port}/v1"}]}]
        fallbacks, nobody = json.dumps(rule), "m=http://127.0.0.1:9"
        router = start_router(nobody, wait_up=False, worker_ca=authority.path, fallbacks=fallbacks)
        wait_for(lambda: router.chat(model="m").status == 503, what="the worker to be down")
        answer = router.chat(model="m")
        assert (answer.status, answer.header("x-helios-fallback")) == (503, None)
        assert router.stop() == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
        router = start_router(nobody, wait_up=False, fallbacks=fallbacks)
        wait_for(lambda: router.chat(model="m").status == 200, what="the endpoint to be believed")
        assert router.stop() == 0
