"""Clients as people have them (OpenAI's, Anthropic's, curl) need nothing but the router's address and a key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import RouterProcess, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
MESSAGES: Any = [{"role": "user", "content": "hello"}]
CHAT = {"model": "org/tiny", "messages": MESSAGES, "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "org/tiny", "prompt": "a", "max_tokens": 4},
    "/v1/embeddings": {"model": "org/tiny", "input": "a"},
    "/v1/responses": {"model": "org/tiny", "input": "hi", "max_output_tokens": 4},
    "/v1/messages": CHAT,
}
LIMITED = 3
"""Requests per minute of the limited key."""


@pytest.fixture
def fake(fake_vllm: Callable[..., Control]) -> Control:
    return fake_vllm("org/tiny")


@pytest.fixture
def keys(helios: Any, tmp_path: Path) -> tuple[str, str]:
    """One without limits, and one that may ask ``LIMITED`` times a minute."""
    create = ("router", "keys", "create", "acme", "--file", str(tmp_path / "keys"))
    limited = helios(*create, "--requests-per-minute", str(LIMITED))
    return str(helios(*create).out).strip(), str(limited.out).strip()


@pytest.fixture
def router(fake: Control, start_router: StartRouter, tmp_path: Path, keys: tuple[str, str]) -> RouterProcess:
    batches = {"store": str(tmp_path / "store"), "lease_s": 1.5, "poll_s": 0.2}
    return start_router(fake, admission=json.dumps({"keys": str(tmp_path / "keys")}), batches=json.dumps(batches))


def test_errors_are_what_each_client_makes_of_the_services_own(router: RouterProcess, keys: tuple[str, str]) -> None:
    good, limited = keys
    with contextlib.ExitStack() as stack:

        def clients(key: str) -> Iterator[tuple[Any, Callable[..., Any]]]:
            ours = stack.enter_context(openai.OpenAI(base_url=f"{router.url}/v1", api_key=key, max_retries=0))
            theirs = stack.enter_context(anthropic.Anthropic(base_url=router.url, api_key=key, max_retries=0))
            yield openai, lambda **change: ours.chat.completions.create(**{**CHAT, **change})
            yield anthropic, lambda **change: theirs.messages.create(**{**CHAT, **change})

        for library, ask in clients("hk-wrong"):
            with pytest.raises(library.AuthenticationError, match="not accepted") as refused:
                ask()
            assert refused.value.status_code == 401
        for library, ask in clients(good):
            with pytest.raises(library.NotFoundError, match="'nope' does not exist"):
                ask(model="nope")
            with pytest.raises(library.BadRequestError, match="kv_transfer_params is set by the router"):
                ask(extra_body={"kv_transfer_params": {}})
        for library, ask in clients(limited):
            with contextlib.suppress(library.RateLimitError):
                for _ in range(LIMITED):
                    ask()
            with pytest.raises(library.RateLimitError) as over:
                ask()
            assert 1 <= int(over.value.response.headers["retry-after"]) <= 60
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key=good, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as field:
            client.chat.completions.create(**CHAT, extra_body={"kv_transfer_params": {}})
        assert (field.value.param, field.value.code) == ("kv_transfer_params", "forbidden_parameter")
        with pytest.raises(openai.BadRequestError) as made:
            client.chat.completions.create(**{**CHAT, "max_tokens": 0})
        assert made.value.param == "max_tokens"  # the worker's own error, as it came


def test_what_the_other_tests_of_clients_leave_out(router: RouterProcess, keys: tuple[str, str]) -> None:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key=keys[0], max_retries=0) as client:
        text = client.completions.create(model="org/tiny", prompt="a", max_tokens=4)
        assert text.usage is not None
        assert (text.choices[0].finish_reason, text.usage.completion_tokens > 0) == ("length", True)
        as_floats = client.embeddings.create(model="org/tiny", input="a", encoding_format="float").data[0].embedding
        assert client.embeddings.create(model="org/tiny", input="a").data[0].embedding == pytest.approx(as_floats)
        with client.responses.stream(model="org/tiny", input="hi", max_output_tokens=4) as stream:
            assert stream.get_final_response().output_text
    with anthropic.Anthropic(base_url=router.url, api_key=keys[0], max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["org/tiny"]
        assert client.models.retrieve("org/tiny").id == "org/tiny"


class Curl:
    """curl, with a key."""

    def __init__(self, router: RouterProcess, key: str) -> None:
        self._url, self._key = router.url, key

    def __call__(self, path: str, *options: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and content."""
        command = ["curl", "-sS", "-i", "--max-time", "30", "-H", f"Authorization: Bearer {self._key}"]
        done = subprocess.run([*command, *options, self._url + path], capture_output=True, check=True, timeout=60)
        rest = done.stdout
        while True:  # 100 Continue comes before the answer
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            if (status := int(first.split()[1])) != 100:
                return status, {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, rest

    def json(self, path: str, *options: str) -> Any:
        status, _, content = self(path, *options)
        assert status == 200, content
        return json.loads(content)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
def test_curl(router: RouterProcess, fake: Control, keys: tuple[str, str], tmp_path: Path) -> None:
    """What READMEs show: JSON with -d, streams with -N, uploads with -F."""
    curl, kind = Curl(router, keys[0]), ("-H", "Content-Type: application/json")
    for path, body in BODIES.items():
        assert "model" in curl.json(path, *kind, "-d", json.dumps(body)), path
        if path == "/v1/embeddings":
            continue
        status, headers, content = curl(path, "-N", *kind, "-d", json.dumps({**body, "stream": True}))
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream"), path
        last = {"/v1/responses": b"response.completed", "/v1/messages": b"message_stop"}.get(path, b"[DONE]")
        assert last in content.rstrip().rsplit(b"\n\n", 1)[-1], path
    assert [model["id"] for model in curl.json("/v1/models")["data"]] == ["org/tiny"]
    sound = tmp_path / "a.wav"
    sound.write_bytes(bytes(range(256)) * 8192)  # curl asks whether to go on (Expect) before it sends 2 MiB
    heard = curl.json("/v1/audio/transcriptions", "-F", f"file=@{sound}", "-F", "model=org/tiny")
    assert heard["text"] == f"heard {hashlib.sha256(sound.read_bytes()).hexdigest()[:16]}"
    # A batch.
    lines = tmp_path / "input.jsonl"
    one = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    lines.write_text(json.dumps(one) + "\n")
    file = curl.json("/v1/files", "-F", "purpose=batch", "-F", f"file=@{lines}")
    assert curl("/v1/files/" + file["id"] + "/content")[2] == lines.read_bytes()
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = curl.json("/v1/batches", *kind, "-d", json.dumps(wanted))
    end = time.monotonic() + 60
    while (batch := curl.json("/v1/batches/" + batch["id"]))["status"] != "completed":
        assert time.monotonic() < end, batch
        time.sleep(0.1)
    (answer,) = curl("/v1/files/" + batch["output_file_id"] + "/content")[2].splitlines()
    assert json.loads(answer)["response"]["status_code"] == 200
    # Errors.
    chat = ("/v1/chat/completions", *kind, "-d")
    status, headers, content = Curl(router, "hk-wrong")(*chat, json.dumps(CHAT))
    assert (status, headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert json.loads(content)["error"]["code"] == "invalid_api_key"
    assert curl(*chat, json.dumps({**CHAT, "model": "nope"}))[0] == 404
    status, _, content = curl(*chat, json.dumps({**CHAT, "max_tokens": 0}))
    assert (status, json.loads(content)["error"]["param"]) == (400, "max_tokens")
    limited = Curl(router, keys[1])
    for _ in range(LIMITED + 1):
        status, headers, _ = limited(*chat, json.dumps(CHAT))
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 60
