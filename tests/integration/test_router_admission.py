"""Who may use a real router, how much, and who waits: through OpenAI's and Anthropic's clients."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import jwt
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.redis import Server, redis_server
from tests.support.routing import RouterProcess, StartRouter, start_router, stream
from tests.support.service import served
from tests.support.wake_hook import Hook, hook

__all__ = ["allowed_violations", "fake_vllm", "hook", "redis_server", "start_router"]
Start = Callable[..., Control]
MESSAGES: Any = [{"role": "user", "content": "hello"}]
CHAT = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def fake(fake_vllm: Start) -> Control:
    return fake_vllm("org/tiny")


@pytest.fixture
def key(helios: Any, tmp_path: Path) -> Callable[..., str]:
    """``key("acme", "--model", "x")`` makes a key in ``tmp_path/keys``."""

    def make(tenant: str, *options: str) -> str:
        made = helios("router", "keys", "create", tenant, "--file", str(tmp_path / "keys"), *options)
        return str(made.out).strip()

    return make


def admission(**settings: Any) -> str:
    return json.dumps(settings)


def client_of(router: RouterProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{router.url}/v1", api_key=key, max_retries=0)


def ask(client: openai.OpenAI, model: str = "org/tiny", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, **more)


def until(what: Callable[[], object], timeout_s: float = 15) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_keys(fake: Control, start_router: StartRouter, key: Any, helios: Any, tmp_path: Path) -> None:
    """401 without a key or with a wrong one, 403 for what a key may not use, 404 for what there is not."""
    good, narrow = key("acme"), key("beta", "--model", "other/*", "--route", "/v1/chat/*")
    worker_key = tmp_path / "worker-key"
    worker_key.write_text("of-the-worker\n")
    router = start_router(
        fake, admission=admission(keys=str(tmp_path / "keys")), aliases='{"fast": "org/tiny"}',
        worker_key_file=worker_key,
    )  # fmt: skip
    with client_of(router, good) as client, client_of(router, narrow) as other, client_of(router, "hk-wrong") as wrong:
        answer = ask(client)
        assert answer.usage.completion_tokens == 4
        assert ask(client, "fast").model == "org/tiny"
        assert [model.id for model in client.models.list()] == ["fast", "org/tiny"]
        assert client.models.retrieve("fast").id == "fast"
        assert list(other.models.list()) == []
        for call in (lambda: ask(wrong), lambda: wrong.models.list()):
            with pytest.raises(openai.AuthenticationError, match="unknown, revoked or expired") as unknown:
                call()
            assert unknown.value.code == "invalid_api_key"
            assert unknown.value.response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'org/tiny'"):
            ask(other)
        with pytest.raises(openai.PermissionDeniedError, match="may not use /v1/embeddings"):
            other.embeddings.create(model="other/x", input="a")
        with pytest.raises(openai.NotFoundError, match="Available models: fast, org/tiny"):
            ask(client, "none")
        with pytest.raises(openai.NotFoundError) as hidden:
            ask(other, "none")
        assert "org/tiny" not in hidden.value.message
    with anthropic.Anthropic(base_url=router.url, api_key=good, max_retries=0) as client:
        assert client.messages.create(model="org/tiny", max_tokens=3, messages=MESSAGES).usage.output_tokens > 0
    with anthropic.Anthropic(base_url=router.url, api_key="sk-no", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError, match="not accepted"):
            client.messages.create(model="org/tiny", max_tokens=3, messages=MESSAGES)
    refused = router.request("POST", "/v1/chat/completions", CHAT)
    assert (refused.status, refused.header("www-authenticate")) == (401, "Bearer")
    assert router.request("GET", "/healthz").status == 200
    sent = [dict(record["headers"]) for record in fake.journal()]
    assert len(sent) == 3
    for headers in sent:
        assert headers["authorization"] == "Bearer of-the-worker"
        assert "x-api-key" not in headers
    ranked = {"model": "fast", "query": "a", "documents": ["b", "c"]}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):  # an alias is one on every route
        answer = router.request("POST", path, ranked, {"authorization": f"Bearer {good}"})
        assert (answer.status, answer.json()["model"]) == (200, "org/tiny")
    listed = json.loads(helios("router", "keys", "list", "--json", "--file", str(tmp_path / "keys")).out)
    helios("router", "keys", "revoke", listed[0]["id"], "--file", str(tmp_path / "keys"))
    headers = {"authorization": f"Bearer {good}"}
    until(lambda: router.request("POST", "/v1/chat/completions", CHAT, headers).status == 401)
    assert router.metric("helios_router_refused_total", reason="invalid_api_key") >= 3
    assert good not in router.log.read_text()


class Issuer:
    """An OpenID Connect issuer's keys."""

    url = ""

    def __init__(self) -> None:
        self.keys = {"1": ec.generate_private_key(ec.SECP256R1())}
        self.up = True

    def answer(self, body: bytes) -> tuple[int, Any]:
        ec256 = jwt.get_algorithm_by_name("ES256")
        listed = [{**ec256.to_jwk(k.public_key(), as_dict=True), "kid": kid} for kid, k in self.keys.items()]
        return (200 if self.up else 500), {"keys": listed}

    def token(self, kid: str = "1", **claims: Any) -> str:
        content = {"iss": "https://i", "aud": "helios", "exp": time.time() + 60, "tenant": "acme", **claims}
        return jwt.encode(content, self.keys[kid], "ES256", {"kid": kid})


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    with served(issuer):
        yield issuer


def test_json_web_tokens(fake: Control, start_router: StartRouter, issuer: Issuer) -> None:
    ours = {"jwks": issuer.url, "issuer": "https://i", "audience": "helios", "refresh_s": 600}
    roles = {"user": {"models": ["org/*"]}}
    router = start_router(fake, admission=admission(jwt=ours, roles=roles))
    until(lambda: _status(router, issuer.token(roles=["user"])) == 200)
    issuer.up = False
    assert _status(router, issuer.token(roles=["user"], tenant="beta")) == 200
    assert _status(router, issuer.token()) == 403
    assert _status(router, issuer.token(roles=["user"], exp=time.time() - 60)) == 401
    assert _status(router, issuer.token(roles=["user"], aud="other")) == 401
    assert _status(router, "hk-nothing") == 401
    with client_of(router, issuer.token(roles=["user"])) as client:
        assert ask(client).usage.completion_tokens == 4


def _status(router: RouterProcess, token: str) -> int:
    return router.request("POST", "/v1/chat/completions", CHAT, {"authorization": f"Bearer {token}"}).status


def test_limits_per_key_and_in_tokens(fake: Control, start_router: StartRouter, key: Any, tmp_path: Path) -> None:
    few, tokens = key("acme", "--requests-per-minute", "2"), key("acme", "--tokens-per-minute", "200")
    router = start_router(fake, admission=admission(keys=str(tmp_path / "keys")))
    with client_of(router, few) as client:
        ask(client), ask(client)
        with pytest.raises(openai.RateLimitError, match="2 requests per minute of the key") as limited:
            ask(client)
        assert 25 <= int(limited.value.response.headers["retry-after"]) <= 30
        assert limited.value.type == "requests"
    with client_of(router, tokens) as client:
        with pytest.raises(openai.BadRequestError, match="lower max_tokens"):
            client.chat.completions.create(model="org/tiny", messages=MESSAGES, max_tokens=1000)
        # Each reserves 100 and more, and uses few: the second passes because the first was settled.
        options: Any = {"include_usage": True}
        chunks = list(ask(client, max_completion_tokens=100, stream=True, stream_options=options))
        assert chunks[-1].usage.total_tokens < 40
        until(lambda: router.metric("helios_router_tokens_total", source="reported"))  # the client left with [DONE]
        more = ask(client, extra_body={"max_completion_tokens": 100, "ignore_eos": True})
        assert more.usage.total_tokens > 50
        with pytest.raises(openai.RateLimitError, match="200 tokens per minute of the key") as spent:
            ask(client, max_completion_tokens=100)
        assert spent.value.type == "tokens"
    used = chunks[-1].usage.total_tokens + more.usage.total_tokens
    assert router.metric("helios_router_tokens_total", source="reported") == used


def test_a_tenant_s_limits_are_those_of_all_its_keys(
    fake: Control, start_router: StartRouter, key: Any, tmp_path: Path
) -> None:
    one, other, stranger = key("acme"), key("acme"), key("beta")
    limits = {"acme": {"limits": {"requests_per_minute": 3}}}
    router = start_router(fake, admission=admission(keys=str(tmp_path / "keys"), tenants=limits))
    with client_of(router, one) as first, client_of(router, other) as second, client_of(router, stranger) as third:
        for client in (first, second, first):
            assert ask(client)
        for client in (first, second):
            with pytest.raises(
                openai.RateLimitError, match="limit of 3 requests per minute of the tenant acme"
            ) as full:
                ask(client)
            assert int(full.value.response.headers["retry-after"]) > 0
        for _ in range(4):
            assert ask(third)
    assert len(fake.journal()) == 7


def test_two_routers_share_limits(fake: Control, start_router: StartRouter, redis_server: Server) -> None:
    model = {"org/tiny": {"requests_per_minute": 3}}
    name = f"org/{secrets.token_hex(4)}"
    ours = admission(models={name: model["org/tiny"]}, shared={"url": redis_server.url, "timeout_s": 5})
    routers = [start_router(fake, f"{name}={fake.url}", admission=ours, wait_up=False) for _ in range(2)]
    for router in routers:
        until(lambda router=router: router.up() == 2)  # type: ignore[misc]
    codes = [router.chat(name).status for _ in range(3) for router in routers]
    assert codes.count(429) == 3
    assert set(codes) == {404, 429}  # the fake does not know the name, which shows that it was asked
    assert routers[0].metric("helios_router_shared_limits_up") == 1


def test_who_waits_is_served(fake: Control, start_router: StartRouter) -> None:
    fake.fault("stall", times=1)
    router = start_router(fake, admission=admission(queue={"per_worker": 1}))
    busy = router_stream(router)
    until(lambda: router.in_flight() == 1)
    with ThreadPoolExecutor(5) as pool, client_of(router, "any") as client:
        answers = [pool.submit(ask, client) for _ in range(5)]
        until(lambda: router.metric("helios_router_queued") == 5)
        assert len(fake.journal()) == 1
        busy.close()
        assert [answer.result(30).usage.completion_tokens for answer in answers] == [4] * 5
    assert router.metric("helios_router_queue_seconds_count", outcome="served") == 5
    assert (router.metric("helios_router_queued"), router.in_flight()) == (0, 0)


def test_saturated_is_429_and_a_stream_is_told_meanwhile(fake: Control, start_router: StartRouter) -> None:
    fake.fault("stall", times=1)
    queue = {"per_worker": 1, "max_requests": 1, "saturated_s": 1.5, "comment_after_s": 0.3}
    router = start_router(fake, admission=admission(queue=queue))
    busy = router_stream(router)
    until(lambda: router.in_flight() == 1)
    with client_of(router, "any") as client:
        chunks = client.chat.completions.create(model="org/tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.RateLimitError, match="wait already") as full:
            ask(client)
        assert full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) > 0
        with pytest.raises(openai.APIError, match=r"were busy for 1\.\d+ s"):
            list(chunks)
        busy.close()
        until(lambda: router.in_flight() == 0)
        assert ask(client).usage.completion_tokens == 4


def test_limits_of_a_model_are_those_of_all_processes_and_change_with_the_file(
    fake: Control, start_router: StartRouter, tmp_path: Path
) -> None:
    """As the operator says them on Services: here a file does."""
    file = tmp_path / "workers.toml"

    def say(limits: str) -> None:
        text = f'[[workers]]\nmodel = "org/tiny"\nurl = "{fake.url}"\n{limits}'
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)

    say("max_in_flight = 1\nmax_queued = 1\n")
    fake.fault("stall", times=1)
    found = json.dumps({"file": str(file), "file_poll_s": 0.1})
    router = start_router(processes=2, discovery=found)
    until(lambda: router.up() == 1)
    busy = router_stream(router)
    until(lambda: router.in_flight() == 1)
    with ThreadPoolExecutor(1) as pool, client_of(router, "any") as client:
        waits = pool.submit(ask, client)
        until(lambda: router.metric("helios_router_queued") == 1)
        for _ in range(4):  # whichever process it comes to
            answer = router.chat("org/tiny")
            assert answer.status == 429
            error = json.loads(answer.body)["error"]
            assert error["code"] == "model_limit_reached"
            assert "no more than 1 wait for it" in error["message"]
            assert int(dict(answer.headers)["retry-after"]) > 0
        assert len(fake.journal()) == 1
        say("max_in_flight = 2\nmax_queued = 1\n")
        assert waits.result(30).usage.completion_tokens == 4
    busy.close()
    until(lambda: router.in_flight() == 0)
    assert router.metric("helios_router_refused_total", reason="model_limit_reached") == 4


def router_stream(router: RouterProcess) -> Any:
    """A connection on which a request was sent; closing it is how a client leaves."""
    import socket

    body = json.dumps({**CHAT, "stream": True}).encode()
    sock = socket.create_connection(router.address)
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    return sock


def test_who_leaves_the_queue_reaches_no_worker(fake: Control, start_router: StartRouter) -> None:
    fake.fault("stall", times=1)
    router = start_router(fake, admission=admission(queue={"per_worker": 1}))
    busy = router_stream(router)
    until(lambda: router.in_flight() == 1)
    waits = [router_stream(router) for _ in range(5)]
    until(lambda: router.metric("helios_router_queued") == 5)
    assert router.metric("helios_router_queued_bytes") > 0
    for sock in waits:
        sock.close()
    until(lambda: router.metric("helios_router_queued") == 0)
    busy.close()
    until(lambda: router.in_flight() == 0)
    assert router.metric("helios_router_queued_bytes") == 0
    assert len(fake.journal()) == 1


def test_a_sleeping_model_is_woken_and_all_who_wait_are_served(
    fake: Control, start_router: StartRouter, hook: Hook
) -> None:
    fake.refuse()
    ours = admission(wake_url=hook.url, queue={"comment_after_s": 0.2})
    router = start_router(fake, admission=ours, wait_up=False)
    with ThreadPoolExecutor(5) as pool, client_of(router, "any") as client:
        whole = [pool.submit(ask, client) for _ in range(4)]
        streamed = pool.submit(lambda: list(ask(client, stream=True)))
        sock, raw = stream(router.address, "/v1/chat/completions", {**CHAT, "stream": True})
        lines = [raw.readline() for _ in range(3)]
        until(lambda: router.metric("helios_router_queued") == 6)
        assert lines[0].startswith(b": waking")
        assert hook.asked[0] == "org/tiny"
        fake.accept()
        assert [future.result(30).usage.completion_tokens for future in whole] == [4] * 4
        assert streamed.result(30)
        assert b"data: [DONE]" in raw.read()
        sock.close()
    until(lambda: router.metric("helios_router_wakes_total", result="up") == 1)
    assert len(hook.asked) <= 3  # again every 2 s, not for each who waits


def test_a_model_that_can_not_be_woken_is_503(fake: Control, start_router: StartRouter, hook: Hook) -> None:
    fake.refuse()
    hook.says = 409, {"message": "no GPU is free"}
    router = start_router(fake, admission=admission(wake_url=hook.url), wait_up=False)
    with client_of(router, "any") as client:
        with pytest.raises(openai.InternalServerError, match="no GPU is free") as down:
            ask(client)
        assert down.value.status_code == 503
        assert int(down.value.response.headers["retry-after"]) > 0
