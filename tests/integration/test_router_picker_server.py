"""The picker's gRPC server, asked by gRPC's own client: TLS, health, bad settings, several processes, the end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from helios.rpc.health import NAME, NOT_SERVING, SERVING, Request, Response
from router.picker.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from router.picker.wire import SERVICE
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.certificates import Authority
from tests.support.gateway import picker_of
from tests.support.picking import body, destination, head
from tests.support.routing import RouterStarter, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
BODY = json.dumps({"model": "tiny", "max_tokens": 1, "prompt": "hello"}).encode()


def ask(channel: grpc.Channel, messages: Iterator[Any]) -> Any:
    return channel.stream_stream(
        f"/{SERVICE}/Process", ProcessingRequest.SerializeToString, ProcessingResponse.FromString
    )(messages, timeout=20)


def health(channel: grpc.Channel, service: str) -> int:
    call = channel.unary_unary(
        f"/{NAME}/Check", request_serializer=Request.SerializeToString, response_deserializer=Response.FromString
    )
    status: int = call(Request(service=service), timeout=10).status
    return status


def test_health_and_the_end_in_order(fake_vllm: Start, start_router: StartRouter, wait_for: Any) -> None:
    """A request that waits when the router ends has its answer, and liveness outlives readiness."""
    fake = fake_vllm("tiny", token_s=0.05)
    queue = json.dumps({"queue": {"per_worker": 1}})
    router = start_router(fake, args=("--picker", "127.0.0.1:0"), admission=queue, drain_s=1)
    with grpc.insecure_channel(picker_of(router)) as channel:
        for service in ("", "liveness", "readiness", SERVICE):
            assert health(channel, service) == SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health(channel, "another")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream(
            f"/{NAME}/Watch", request_serializer=Request.SerializeToString, response_deserializer=Response.FromString
        )(Request(service=SERVICE), timeout=60)
        assert next(watch).status == SERVING
        first = list(ask(channel, iter([head(), body(BODY)])))
        assert destination(first) == fake.url.partition("//")[2]
        waits = ask(channel, iter([head(), body(BODY)]))
        wait_for(lambda: router.metric("helios_router_queued", model="tiny") == 1, what="it to wait")
        router.process.send_signal(signal.SIGTERM)
        (only,) = list(waits)
        assert only.immediate_response.status.code == 503
        assert next(watch).status == NOT_SERVING
        watch.cancel()
    assert router.process.wait(20) == 0


def test_tls_with_files_that_change(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    authority, next_one = Authority(tmp_path / "one"), Authority(tmp_path / "two")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def shown(by: Authority) -> None:
        pair = by.issue("picker", "localhost", "127.0.0.1")
        shutil.copy(pair.cert, cert)
        shutil.copy(pair.key, key)

    shown(authority)
    settings = json.dumps({"listen": "127.0.0.1:0", "tls_cert": str(cert), "tls_key": str(key)})
    router = start_router(fake_vllm("tiny"), picker=settings)
    address = picker_of(router)

    def asked(by: Authority) -> Any:
        trusted = grpc.ssl_channel_credentials(Path(by.path).read_bytes())
        with grpc.secure_channel(address, trusted) as channel:
            return list(ask(channel, iter([head(), body(BODY)])))

    assert destination(asked(authority))
    shown(next_one)
    assert destination(asked(next_one))
    with pytest.raises(grpc.RpcError):
        asked(authority)
    # What Istio does with insecureSkipVerify: any certificate will do.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=10)) as sock:
        assert sock.selected_alpn_protocol() == "h2"


def test_several_processes_share_the_port_and_the_counts(fake_vllm: Start, start_router: StartRouter) -> None:
    fakes = [fake_vllm("tiny") for _ in range(4)]
    settings = json.dumps({"listen": "127.0.0.1:0", "hold_s": 60})
    router = start_router(
        *fakes, picker=settings, processes=2, scrape_interval_s=60, args=("--policy", "least-requests")
    )
    chosen = []
    for _ in range(16):  # a connection each, so both processes are asked
        with grpc.insecure_channel(picker_of(router), [("grpc.use_local_subchannel_pool", 1)]) as channel:
            chosen.append(destination(list(ask(channel, iter([head(), body(BODY)])))))
    assert sorted(chosen.count(one) for one in set(chosen)) == [4, 4, 4, 4]
    assert router.in_flight() == 16


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"listen": "nowhere"}, "write host:port"),
        ({"listen": "127.0.0.1:0", "tls_cert": "/nothing.pem"}, "go together"),
        ({"listen": "127.0.0.1:0", "tls_cert": "/nothing.pem", "tls_key": "/nothing.key"}, "can't be used"),
        ({"listen": "127.0.0.1:0", "hold_s": 0}, "hold_s must be more than 0"),
        ({"listen": "127.0.0.1:0", "response": "both"}, "response"),
        ({"listen": "127.0.0.1:0", "endpoints": 9}, "endpoints"),
    ],
)
def test_settings_that_cannot_work_are_named(helios: Any, settings: dict[str, Any], part: str) -> None:
    env = {"HELIOS_ROUTER__PICKER": json.dumps(settings)}
    done = helios("router", "--port", "0", "--worker", "m=http://127.0.0.1:1", env=env, code=2)
    assert part in done.err


def test_a_port_that_is_taken_is_named(helios: Any, start_router: RouterStarter, fake_vllm: Start) -> None:
    router = start_router(fake_vllm("tiny"), args=("--picker", "127.0.0.1:0"))
    taken = picker_of(router)
    done = helios("router", "--port", "0", "--worker", "m=http://127.0.0.1:1", "--picker", taken, code=1)
    assert taken in done.err


def test_whoever_does_not_ask_for_it_does_not_load_grpc() -> None:
    script = (
        "import sys; import helios.cli.router, router.daemon; "
        "sys.exit('grpc' in sys.modules or 'google.protobuf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
