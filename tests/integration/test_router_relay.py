"""What the router passes on, what it changes, and what it never lets through."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.fakes.vllm.verify import ADMINISTRATION
from tests.support.routing import CHAT, RouterProcess, StartRouter, address_of, converse, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
HOT_PATH = os.environ.get("HELIOS_TEST_HOT_PATH", "interpreted")
"""What routers are here; read before ``helios_home`` clears such settings away."""


@pytest.fixture
def fake(fake_vllm: Start) -> Control:
    return fake_vllm("tiny", created=1)


@pytest.fixture
def router(fake: Control, start_router: StartRouter) -> RouterProcess:
    return start_router(fake)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_streams_and_whole_answers_come_byte_for_byte(fake: Control, router: RouterProcess) -> None:
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "max_tokens": 200, "stream": True, "n": 3}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 200}),
        ("/v1/responses", {"input": "hi", "stream": True}),
        ("/v1/messages", {**CHAT, "max_tokens": 20, "stream": True}),
        ("/v1/embeddings", {"input": ["a", "b"]}),
    ):
        got = []
        for address in (address_of(fake.url), router.address):
            sock, answer = stream(address, path, {"model": "tiny", **body}, {"x-request-id": "same"})
            with sock, answer:
                got.append((answer.status, answer.headers["content-type"], sha256(answer.read())))
        assert got[0] == got[1], path
        assert fake.journal(path)[-1]["sent_sha256"] == got[1][2]


def test_the_log_says_whether_the_hot_path_is_compiled(router: RouterProcess) -> None:
    """scripts/compiled_tests.py says when it has to be."""
    lines = [json.loads(line) for line in router.log.read_text().splitlines()]
    (first,) = [line for line in lines if line["message"] == "the router starts"]
    assert (first["hot_path"], first["processes"]) == (HOT_PATH, 1)


def test_headers_of_an_answer_are_the_workers(fake: Control, router: RouterProcess) -> None:
    kept = []
    for address in (address_of(fake.url), router.address):
        sock, answer = stream(address, "/v1/completions", {"model": "tiny", "prompt": "x"}, {"x-request-id": "same"})
        with sock, answer:
            answer.read()
            kept.append([(k.lower(), v) for k, v in answer.getheaders() if k.lower() != "date"])
            assert len(answer.headers.get_all("date") or []) == 1
    assert kept[1] == [*kept[0], ("x-request-id", "same")]


def test_each_event_arrives_before_the_next_is_made(fake_vllm: Start, start_router: StartRouter) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake)
    fake.fault("stall", after_bytes=600)  # the worker never sends more than these
    sock, answer = stream(router.address, "/v1/completions", {"model": "tiny", "prompt": "x", "stream": True})
    with sock, answer:
        assert len(answer.read(600)) == 600


def test_bodies_arrive_as_they_were_sent(fake: Control, router: RouterProcess) -> None:
    odd = b'  {"model" : "tiny",\n\t"prompt":"\\u00e9\xc3\xa9", "max_tokens":1, "prompt":"twice", "bogus": 1e400 }\n'
    assert router.request("POST", "/v1/completions", odd).status == 200
    assert fake.journal()[-1]["body_sha256"] == sha256(odd)
    ten = json.dumps({"model": "tiny", "prompt": ["x", "y"], "max_tokens": 1, "pad": "é" * 5_000_000}).encode()
    assert len(ten) > 10_000_000
    assert router.request("POST", "/v1/completions", ten).status == 200
    assert fake.journal()[-1]["body_sha256"] == sha256(ten)


def test_request_headers_pass_without_those_of_the_connection(fake: Control, router: RouterProcess) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    head = (
        "POST /v1/completions?beta=true&a=%2F HTTP/1.1\r\nHost: public.example\r\nContent-Type: application/json\r\n"
        "Connection: close, X-Secret, Keep-Alive\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\n"
        "Proxy-Authorization: Basic x\r\nProxy-Connection: keep-alive\r\nTrailer: x\r\n"
        f"Authorization: Bearer client-key\r\nTraceparent: 00-{'a' * 32}-{'b' * 16}-01\r\nTracestate: v=1\r\n"
        "Accept-Encoding: zstd\r\n"
        "X-Prefiller-Host-Port: 10.0.0.9:22\r\n"
        f"X-Two: 1\r\nX-Two: 2\r\nX-Name: käse\r\nX-Request-Id: abc-1\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer = converse(router.address, head.encode() + body)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"\r\nx-request-id: abc-1\r\n" in answer
    record = fake.journal()[-1]
    assert record["target"] == "/v1/completions?beta=true&a=%2F"
    (parent,) = (value for name, value in record["headers"] if name == "traceparent")
    assert re.fullmatch(f"00-{'a' * 32}-(?!{'b' * 16})[0-9a-f]{{16}}-01", parent)
    assert sorted(map(tuple, record["headers"])) == sorted(
        [
            ("host", fake.url.removeprefix("http://")), ("content-type", "application/json"),
            ("authorization", "Bearer client-key"), ("tracestate", "v=1"), ("accept-encoding", "zstd"),
            ("x-two", "1"), ("x-two", "2"), ("x-name", "käse".encode().decode("latin-1")), ("x-request-id", "abc-1"),
            ("content-length", str(len(body))), ("traceparent", parent),
        ]
    )  # fmt: skip


def test_chunked_and_expecting_clients(fake: Control, router: RouterProcess) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\n"
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:5], body[5:]))
    chunked = converse(router.address, head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
    assert chunked.startswith(b"HTTP/1.1 200")
    expecting = converse(
        router.address, head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip
    assert expecting.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert [r["body_sha256"] for r in fake.journal()] == [sha256(body)] * 2


def test_client_that_offers_h2c_is_answered_in_http_1(fake: Control, router: RouterProcess) -> None:
    """Java's client does so with every first request."""
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAA\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    last = head.replace(b"Upgrade, HTTP2-Settings", b"close").replace(b"Upgrade: h2c\r\n", b"")
    with socket.create_connection(router.address, timeout=10) as sock:
        sock.sendall(head + body)
        first = http.client.HTTPResponse(sock)
        first.begin()
        assert (first.status, len(first.read()) > 100) == (200, True)
        sock.sendall(last + body)
        second = http.client.HTTPResponse(sock)
        second.begin()
        assert second.status == 200
    assert converse(router.address, head + body + last + body).count(b"HTTP/1.1 200 OK") == 2  # pipelined
    assert [r["body_sha256"] for r in fake.journal()] == [sha256(body)] * 4


def test_request_id_is_kept_when_sound_and_made_when_not(fake: Control, router: RouterProcess) -> None:
    for given, kept in (("req_1-2.3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)):
        answer = router.chat() if not given else router.request(
            "POST", "/v1/chat/completions", {"model": "tiny", **CHAT}, {"X-Request-Id": given}
        )  # fmt: skip
        seen = dict(fake.journal()[-1]["headers"])["x-request-id"]
        assert answer.header("x-request-id") == seen
        assert (seen == given) is kept
        assert seen


def test_nothing_but_inference_reaches_a_worker(fake: Control, router: RouterProcess) -> None:
    smuggled = [
        *ADMINISTRATION, "/", "/v1", "/docs", "/openapi.json", "/health", "/version", "/load", "/ping",
        "/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/V1/chat/completions",
        "/v1/chat/Completions", "/v1%2Fchat%2Fcompletions", "/v1/chat/%63ompletions", "/v1/chat/completions%00",
        "/v1/chat/completions%2F..%2F..%2Fsleep", "/v1/chat/completions/../../../sleep", "/v1/./chat/completions",
        "/v1/chat/completions;/sleep", "/v1/chat/completions%3F", "/v1/completions%20", "/%2e%2e/sleep", "/sleep%20",
        "/v1/chat/completions/render", "/v1/chat/completions/batch", "/v1/completions/derender", "/v2/embed",
        "/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/cohere/v2/chat", "/generative_scoring",
        "http://127.0.0.1/sleep", "http://h/v1%2Fcompletions", "/v1\\completions", "/v1/completions%23", "*",
    ]  # fmt: skip
    body = json.dumps({"model": "tiny", "prompt": "x", **CHAT}).encode()
    for target in smuggled:
        for method in ("POST", "PUT") if target.startswith("/v1/chat") else ("POST", "GET"):
            head = f"{method} {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\n"
            answer = converse(router.address, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status = int(answer.split(b" ", 2)[1])
            assert status in (400, 404), (method, target, answer)
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert {"message", "type", "param", "code"} == error.keys()
    assert fake.journal() == []
    assert router.metric("helios_router_requests_total", route="other", model="unknown") > 50


def test_wrong_methods_say_which_is_right(fake: Control, router: RouterProcess) -> None:
    for method, path, allow in (
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
    ):
        answer = router.request(method, path)
        assert answer.status == 405
        assert sorted((answer.header("allow") or "").split(", ")) == sorted(allow.split(", "))
        assert answer.json()["error"]["code"] == "method_not_allowed"
    assert fake.journal() == []


@pytest.mark.parametrize(
    "malformed",
    [
        b"NONSENSE\r\n\r\n",
        b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nX-A: a\x01b\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/completions?a=\xff HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/compl\xc3\xa9tions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_malformed_http_is_refused(fake: Control, router: RouterProcess, malformed: bytes) -> None:
    answer = converse(router.address, malformed)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert fake.journal() == []


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"[]", 400, "invalid_type", None),
        (b'{"model":"tiny"} x', 400, "invalid_json", None),
        (b'{"model":5}', 400, "invalid_type", "model"),
        (b'{"model":"\xff"}', 400, "invalid_json", None),
        (b'{"model":"tiny","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json", None),
        ('{"model":"tiny","prompt":"x"}'.encode("utf-16"), 400, "invalid_json", None),
        (b"{}", 404, "model_not_found", "model"),
        (b'{"model":null}', 404, "model_not_found", "model"),
        (b'{"model":"other"}', 404, "model_not_found", "model"),
        (b'{"model":"TINY"}', 404, "model_not_found", "model"),
        (b'{"model":"tiny","kv_transfer_params":{}}', 400, "forbidden_parameter", "kv_transfer_params"),
        (b'{"model":"tiny","kv\\u005ftransfer_params":1}', 400, "forbidden_parameter", "kv_transfer_params"),
        (b'{"model":"tiny","ec_transfer_params":{"x":1}}', 400, "forbidden_parameter", "ec_transfer_params"),
        (
            b'{"model":"tiny","vllm_xargs":{"kv_transfer_params":"x"}}',
            400, "forbidden_parameter", "vllm_xargs.kv_transfer_params",
        ),
        (
            b'{"model":"tiny","sampling_params":{"extra_args":{"kv_transfer_params":{}}}}',
            400, "forbidden_parameter", "sampling_params.extra_args.kv_transfer_params",
        ),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(
    fake: Control, router: RouterProcess, body: bytes, status: int, code: str, param: str | None
) -> None:
    answer = router.request("POST", "/v1/completions", body)
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert ("Available models: tiny" in error["message"]) == (status == 404)
    assert fake.journal() == []
    assert answer.header("x-request-id")


def test_metric_labels_are_bounded_by_the_configuration(router: RouterProcess) -> None:
    for number in range(30):
        router.chat(model=f"made-up-{number}")
        router.request("POST", f"/made/up/{number}", {})
    text = router.request("GET", "/metrics").body.decode()
    assert "made" not in text
    assert router.metric("helios_router_requests_total", model="unknown", status="404") == 60


def test_compressed_bodies_are_refused(fake: Control, router: RouterProcess) -> None:
    packed = gzip.compress(json.dumps({"model": "tiny", "prompt": "x"}).encode())
    answer = router.request("POST", "/v1/completions", packed, {"content-encoding": "gzip"})
    assert (answer.status, answer.json()["error"]["code"]) == (415, "unsupported_content_encoding")
    assert fake.journal() == []


def test_too_large_bodies_are_refused_whether_announced_or_not(fake: Control, start_router: StartRouter) -> None:
    router = start_router(fake, max_body_mib=1)
    start = b'{"model": "tiny", "prompt": "x", "pad": "'
    fits = start + b"p" * (2**20 - len(start) - 2) + b'"}'
    assert router.request("POST", "/v1/completions", fits).status == 200
    answer = router.request("POST", "/v1/completions", fits + b" ")
    assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")
    for body, status in ((fits, 200), (fits + b" ", 413)):
        chunked = http.client.HTTPConnection(*router.address, timeout=10)
        chunked.request(
            "POST", "/v1/completions", iter([body[:1000], body[1000:]]), {"content-type": "application/json"}
        )
        assert chunked.getresponse().status == status
        chunked.close()
    unannounced = http.client.HTTPConnection(*router.address, timeout=10)
    unannounced.request("POST", "/v1/completions", iter([b"x" * 65536] * 20))
    assert unannounced.getresponse().status == 413
    unannounced.close()
    assert len(fake.journal()) == 2


def test_without_a_setting_bodies_of_64_mib_are_taken(router: RouterProcess) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    for size, says in ((64 << 20, b"HTTP/1.1 100 "), ((64 << 20) + 1, b"HTTP/1.1 413 ")):
        with socket.create_connection(router.address, timeout=10) as sock:
            sock.sendall(head % size)
            assert sock.recv(65536).startswith(says)


def form(*parts: tuple[str, bytes, str | None], boundary: str = "xYz") -> tuple[bytes, dict[str, str]]:
    """A multipart form of (name, value, file name or None)."""
    out = b""
    for name, value, file in parts:
        named = f'; filename="{file}"' if file is not None else ""
        out += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value + b"\r\n"
        )
    return out + f"--{boundary}--\r\n".encode(), {"content-type": f"multipart/form-data; boundary={boundary}"}


def test_forms_pass_verbatim_wherever_the_model_stands(fake: Control, router: RouterProcess) -> None:
    for size in (10, 3 << 20):
        sound = os.urandom(size)
        for parts in (
            [("model", b"tiny", None), ("file", sound, "a.wav")],
            [("file", sound, "a.wav"), ("language", b"en", None), ("model", b"tiny", None)],
        ):
            body, headers = form(*parts)
            answer = router.request("POST", "/v1/audio/transcriptions", body, headers)
            assert answer.status == 200, answer.body
            record = fake.journal()[-1]
            assert record["body_sha256"] == sha256(body)
            assert record["files"] == {"file": sha256(sound)}


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([("file", b"x", "a.wav")], 404, "model_not_found"),
        ([("model", b"nope", None), ("file", b"x", "a.wav")], 404, "model_not_found"),
        ([("model", b"tiny", "a.txt"), ("file", b"x", "a.wav")], 404, "model_not_found"),
        ([("model", b"tiny", None), ("model", b"tiny", None)], 400, "invalid_form"),
        ([("model", b"t" * 70_000, None)], 400, "invalid_form"),
        ([("model", b"tiny", None), ("vllm_xargs", b'{"kv_transfer_params":"x"}', None)], 400, "forbidden_parameter"),
        ([("model", b"tiny", None), ("kv_transfer_params", b"{}", None)], 400, "forbidden_parameter"),
    ],
)
def test_forms_that_are_refused(fake: Control, router: RouterProcess, parts: list[Any], status: int, code: str) -> None:
    body, headers = form(*parts)
    answer = router.request("POST", "/v1/audio/transcriptions", body, headers)
    assert (answer.status, answer.json()["error"]["code"]) == (status, code)
    assert fake.journal() == []


def test_broken_forms_are_refused(fake: Control, router: RouterProcess) -> None:
    body, headers = form(("model", b"tiny", None), ("file", b"x" * 5000, "a.wav"))
    for content, changed in (
        (body[:-20], headers),
        (body, {"content-type": "multipart/form-data"}),
        (body, {"content-type": "application/json"}),
        (b"not a form", headers),
    ):
        answer = router.request("POST", "/v1/audio/translations", content, changed)
        assert answer.status == 400, content[:30]
    assert fake.journal() == []


def test_a_large_upload_is_not_held_in_memory(fake: Control, start_router: StartRouter) -> None:
    router = start_router(fake, max_buffered_mib=4, max_body_mib=64)
    before = router.metric("helios_rss_anon_shmem_bytes")
    body, headers = form(("file", os.urandom(40 << 20), "a.wav"), ("model", b"tiny", None))
    answer = router.request("POST", "/v1/audio/transcriptions", body, headers)
    assert answer.status == 200, answer.body
    assert fake.journal()[-1]["body_sha256"] == sha256(body)
    assert router.metric("helios_rss_anon_shmem_bytes") - before < 20 << 20


def test_bodies_beyond_the_memory_of_all_are_refused_for_now(fake: Control, start_router: StartRouter) -> None:
    router = start_router(fake, max_buffered_mib=1, max_body_mib=8)
    big = json.dumps({"model": "tiny", "prompt": "x", "pad": "p" * (2 << 20)}).encode()
    answer = router.request("POST", "/v1/completions", big)
    assert (answer.status, answer.json()["error"]["code"]) == (503, "router_overloaded")
    assert answer.header("retry-after") == "1"
    for _ in range(5):  # what was counted is given back
        assert router.request("POST", "/v1/completions", big[:200_000] + b'"}').status == 200
