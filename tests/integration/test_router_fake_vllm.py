"""The fake vLLM itself: vLLM's shapes, determinism, faults, KV leases, and that it sees what it must see."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import OpenAI

from helios.http.client import HttpClient
from tests.fakes.vllm.capture import ask
from tests.fakes.vllm.cases import Case
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.contract import differences
from tests.fakes.vllm.fixtures import Allowed, allowed_violations, fake_vllm
from tests.fakes.vllm.server import Listener

__all__ = ["allowed_violations", "fake_vllm"]
Start = Callable[..., Control]


@pytest.fixture
def post() -> Callable[..., tuple[int, Any]]:
    def send(control: Control, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        answer = ask(control.url, Case("", path, body, headers=headers or {}), control.model)
        return answer["status"], answer.get("json")

    return send


@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_answers_have_the_shape_of_real_vllm(fake_vllm: Start, runner: str) -> None:
    fake = fake_vllm("tiny", runner=runner)
    assert differences(fake.url, "tiny", runner) == []


def test_same_prompt_gives_the_same_tokens_and_another_prompt_others(fake_vllm: Start) -> None:
    one, two = fake_vllm("a"), fake_vllm("b")
    body = {"prompt": "once upon a time", "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
    answers = [ask(c.url, Case("", "/v1/completions", body), c.model)["json"] for c in (one, two)]
    ids = [a["choices"][0]["token_ids"] for a in answers]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 20
    other = ask(one.url, Case("", "/v1/completions", {**body, "prompt": "twice"}), "a")["json"]
    assert other["choices"][0]["token_ids"] != ids[0]


def test_tokenize_and_detokenize_are_inverse(fake_vllm: Start, post: Any) -> None:
    fake = fake_vllm()
    text = "grüße, 世界 \n"
    _, answer = post(fake, "/tokenize", {"prompt": text})
    assert post(fake, "/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})


def test_openai_client_streams_from_it(fake_vllm: Start) -> None:
    fake = fake_vllm()
    with OpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=7,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) == 7
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_a_broken_connection_breaks_after_exactly_so_many_bytes(fake_vllm: Start, kind: str) -> None:
    fake = fake_vllm()
    fake.fault(kind, after_bytes=100)
    got = read_all(fake, {"prompt": "x", "max_tokens": 50, "stream": True})
    assert len(got) == 100
    assert fake.journal()[-1]["outcome"] == kind
    assert fake.metric("vllm:num_requests_running") == 0
    assert fake.metric("vllm:request_success_total", finished_reason="abort") == 1


def test_faults_before_the_first_byte(fake_vllm: Start) -> None:
    fake = fake_vllm()
    for kind in ("reset", "close"):
        fake.fault(kind)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            read_all(fake, {"prompt": "x"})
    fake.fault("garbage")
    with pytest.raises(http.client.BadStatusLine):
        read_all(fake, {"prompt": "x"})
    fake.fault("status", status=500)
    assert json.loads(read_all(fake, {"prompt": "x"}))["error"]["code"] == 500
    assert json.loads(read_all(fake, {"prompt": "x"}))["object"] == "text_completion"


def test_a_refusing_fake_refuses_until_it_accepts_again(fake_vllm: Start) -> None:
    fake = fake_vllm()
    fake.refuse()
    with pytest.raises(ConnectionRefusedError):
        read_all(fake, {"prompt": "x"})
    fake.accept()
    assert read_all(fake, {"prompt": "x"})


def test_client_that_leaves_a_stall_is_seen_and_its_work_ends(fake_vllm: Start, wait_for: Any) -> None:
    fake = fake_vllm()
    fake.fault("stall")
    parts = urlsplit(fake.url)
    body = b'{"prompt":"x"}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: fake.journal() and fake.journal()[-1]["outcome"] == "stall", what="the stall")
    wait_for(lambda: fake.journal()[-1]["ended_at"] is not None, what="the end of the stall")


def test_what_a_proxy_must_not_send_is_found(fake_vllm: Start, post: Any, allowed_violations: Allowed) -> None:
    fake = fake_vllm()
    for headers, found in (
        ({"te": "trailers"}, "hop-by-hop header te"),
        ({"connection": "x-secret"}, "connection: x-secret"),
        ({"host": "elsewhere"}, "host is"),
    ):
        allowed_violations(found)
        status, answer = post(fake, "/v1/completions", {"prompt": "x"}, headers)
        assert status == 400
        assert found in answer["error"]["message"]
    for path in ("/sleep", "/collective_rpc", "/v1/load_lora_adapter"):
        allowed_violations(f"{path} must never be reached")
        assert post(fake, path, {})[0] == 400
    allowed_violations("kv_transfer_params on a worker that takes no part")
    assert post(fake, "/v1/completions", {"prompt": "x", "kv_transfer_params": {"do_remote_prefill": True}})[0] == 500


def owner_asks(control: Control, path: str, body: Any = None) -> int:
    """What whoever started it hears: no proxy is between them."""
    client = HttpClient(control.url, timeout_s=10)
    try:
        content = json.dumps(body or {}).encode()
        with client.request("POST", path, body=content, headers={"content-type": "application/json"}) as answer:
            answer.read()
            return answer.status
    finally:
        client.close()


def test_one_that_sleeps_takes_no_requests_and_no_orders_of_a_proxy(
    fake_vllm: Start, post: Any, allowed_violations: Allowed
) -> None:
    fake = fake_vllm(sleep_mode=True)
    assert owner_asks(fake, "/sleep?level=2") == 200
    allowed_violations("for a model that sleeps")
    assert post(fake, "/v1/completions", {"prompt": "x"})[0] == 503
    assert owner_asks(fake, "/collective_rpc", {"method": "reload_weights"}) == 400, "there is nowhere to read them to"
    assert owner_asks(fake, "/wake_up") == 200
    allowed_violations("for a model that has no weights")
    assert post(fake, "/v1/completions", {"prompt": "x"})[0] == 503
    assert owner_asks(fake, "/collective_rpc", {"method": "reload_weights"}) == 200
    assert post(fake, "/v1/completions", {"prompt": "x"})[0] == 200
    for path in ("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc"):
        allowed_violations(f"{path} must never be reached")
        assert post(fake, path, {}, {"x-request-id": "1"})[0] == 400


def test_one_that_is_in_use_is_not_put_to_sleep(
    fake_vllm: Start, post: Any, wait_for: Any, allowed_violations: Allowed
) -> None:
    fake = fake_vllm(sleep_mode=True, token_s=0.05)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(post, fake, "/v1/completions", {"prompt": "x", "max_tokens": 60, "ignore_eos": True})
        wait_for(lambda: fake.metric("vllm:num_requests_running") == 1.0, what="a request under way")
        allowed_violations("while 1 requests are under way")
        assert owner_asks(fake, "/sleep") == 400
        assert asked.result()[0] == 200


PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


def test_blocks_go_from_prefill_to_decode_once(fake_vllm: Start, post: Any, allowed_violations: Allowed) -> None:
    prefill, decode, alone = fake_vllm(role="prefill"), fake_vllm(role="decode"), fake_vllm()
    body = {"prompt": "x" * 100, "max_tokens": 5}
    _, leg = post(prefill, "/v1/completions", {**body, "max_tokens": 1, "kv_transfer_params": PREFILL})
    assert prefill.kv() == {"held": 7, "stranded": 0, "claimed": 0}
    status, answer = post(decode, "/v1/completions", {**body, "kv_transfer_params": leg["kv_transfer_params"]})
    assert status == 200
    _, expected = post(alone, "/v1/completions", body)
    assert answer["choices"] == expected["choices"]
    assert prefill.kv() == {"held": 0, "stranded": 0, "claimed": 1}
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == 100
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0
    allowed_violations("used before")
    assert post(decode, "/v1/completions", {**body, "kv_transfer_params": leg["kv_transfer_params"]})[0] == 500


def test_altered_or_late_parameters_are_refused_and_late_blocks_are_stranded(
    fake_vllm: Start, post: Any, allowed_violations: Allowed
) -> None:
    prefill, decode = fake_vllm(role="prefill", lease_s=30.0), fake_vllm(role="decode")
    body = {"prompt": "y" * 32, "max_tokens": 5}
    _, leg = post(prefill, "/v1/completions", {**body, "max_tokens": 1, "kv_transfer_params": PREFILL})
    params = leg["kv_transfer_params"]
    for change in ({"fake_opaque": "z"}, {"new": 1}, {"remote_block_ids": [[1]]}):
        allowed_violations(f"differ from those minted in {next(iter(change))}")
        assert post(decode, "/v1/completions", {**body, "kv_transfer_params": {**params, **change}})[0] == 500
    allowed_violations("the prompt has 3 tokens")
    assert post(decode, "/v1/completions", {**body, "prompt": "abc", "kv_transfer_params": params})[0] == 500
    assert prefill.kv()["held"] == 2
    prefill.skip_time(31)
    assert prefill.kv() == {"held": 0, "stranded": 2, "claimed": 0}
    allowed_violations("lease ran out")
    assert post(decode, "/v1/completions", {**body, "kv_transfer_params": params})[0] == 500


@pytest.mark.parametrize("wrong", [{"max_tokens": 2}, {"stream": True}, {"kv_transfer_params": {**PREFILL, "x": 1}}])
def test_a_wrong_prefill_leg_is_refused(fake_vllm: Start, allowed_violations: Allowed, wrong: dict[str, Any]) -> None:
    allowed_violations("a prefill leg")
    fake = fake_vllm(role="prefill")
    body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": PREFILL, **wrong}
    assert b"a prefill leg" in read_all(fake, body)
    assert fake.kv()["held"] == 0


def test_it_runs_as_a_process_and_can_be_told_to_die() -> None:
    command = [sys.executable, "-m", "tests.fakes.vllm", "--model", "m", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        urls = json.loads(process.stdout.readline())
        control = Control(urls["url"], urls["control"], "m")
        assert json.loads(read_all(control, {"prompt": "x"}))["model"] == "m"
        control.fault("die", after_bytes=10)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            read_all(control, {"prompt": "x"}, partial=False)
        assert process.wait(10) == -9


def read_all(control: Control, body: Any, partial: bool = True) -> bytes:
    """POST a completion and return what comes of its body; ``partial``: also when it breaks off."""
    parts = urlsplit(control.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if not partial:
            return response.read()
        got = b""
        try:
            while data := response.read1(65536):
                got += data
        except (http.client.IncompleteRead, ConnectionResetError) as error:
            got += getattr(error, "partial", b"")
        return got
    finally:
        connection.close()


@pytest.mark.parametrize("turns", range(5))
def test_a_port_that_closes_leaves_no_connection_however_far_it_had_got(turns: int) -> None:
    async def main(client: socket.socket) -> bytes:
        listener = Listener(None, "127.0.0.1", 0, 5, lambda text: None)
        await listener.open()
        client.connect((listener.host, listener.port))
        for _ in range(turns):
            await asyncio.sleep(0)
        await listener.close()
        await listener.drain()
        try:
            return client.recv(1)
        except ConnectionResetError:
            return b""

    with socket.socket() as client:
        client.settimeout(5)
        assert asyncio.run(main(client)) == b""
