"""Files and batches through OpenAI's client and real routers: the whole cycle, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.cloud_servers import azurite, credentials, gcs, moto
from tests.support.routing import RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]
Start = Callable[..., Control]
CHAT = "/v1/chat/completions"
FINAL = ("completed", "failed", "expired", "cancelled")


def line(number: int, **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"number {number}"}], "max_tokens": 3}
    return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": {**body, "ignore_eos": True}, **changes}


def jsonl(*lines: Any) -> io.BytesIO:
    file = io.BytesIO("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines).encode())
    file.name = "input.jsonl"
    return file


def batches(store: str | Path, **settings: Any) -> str:
    return json.dumps({"store": str(store), "lease_s": 1.5, "poll_s": 0.2, **settings})


@contextlib.contextmanager
def client_of(router: RouterProcess, key: str = "key") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def begin(client: openai.OpenAI, *lines: Any, **more: Any) -> Any:
    file = client.files.create(file=jsonl(*lines), purpose="batch")
    endpoint: Any = more.pop("endpoint", CHAT)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def until(client: openai.OpenAI, batch: Any, what: Callable[[Any], object], timeout_s: float = 60) -> Any:
    end = time.monotonic() + timeout_s
    while not what(batch := client.batches.retrieve(batch.id)):
        assert time.monotonic() < end, f"it did not happen: {batch}"
        time.sleep(0.05)
    return batch


def over(client: openai.OpenAI, batch: Any, timeout_s: float = 60) -> Any:
    return until(client, batch, lambda b: b.status in FINAL, timeout_s)


def content(client: openai.OpenAI, file: str | None) -> list[Any]:
    if file is None:
        return []
    return [json.loads(text) for text in client.files.content(file).text.splitlines()]


def counts(batch: Any) -> tuple[int, int, int]:
    c = batch.request_counts
    return c.total, c.completed, c.failed


def record_in(store: Path) -> Any:
    """The record of the one batch that there is."""
    (record,) = (store / "v1/batches").glob("*/batch_*.json")
    return json.loads(record.read_bytes())


def owner_of(store: Path) -> int:
    """The process that has it."""
    return int(record_in(store)["owner"].split("-")[-2])


def kill(router: RouterProcess) -> None:
    """All of its processes at once, so that none has time to give back what it has."""
    pids = [*router.pids(), *router.pids("control")]
    router.process.send_signal(signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    router.stop(signal.SIGKILL)


def test_the_whole_cycle(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    """Good and bad requests, each with its answer once; lists, pages, deletion."""
    fake = fake_vllm("tiny")
    router = start_router(fake, batches=batches(tmp_path / "store"))
    wrong = line(7)
    wrong["body"]["max_tokens"] = 0
    unknown = line(8)
    unknown["body"]["model"] = "nope"
    with client_of(router) as client:
        large = jsonl("x" * (9 << 20))  # some parts
        file = client.files.create(file=large, purpose="batch")
        assert (file.bytes, file.filename) == (len(large.getvalue()), "input.jsonl")
        assert client.files.content(file.id).content == large.getvalue()
        client.files.delete(file.id)
        batch = begin(client, *(line(n) for n in range(7)), "", wrong, unknown, metadata={"a": "b"})
        assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
        assert batch.expires_at == batch.created_at + 86400
        batch = over(client, batch)
        assert (batch.status, counts(batch), batch.metadata) == ("completed", (9, 7, 2), {"a": "b"})
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        good = content(client, batch.output_file_id)
        assert sorted(one["custom_id"] for one in good) == [f"r{n}" for n in range(7)]
        for one in good:
            assert (one["response"]["status_code"], one["error"]) == (200, None)
            assert one["response"]["body"]["usage"]["completion_tokens"] == 3
        assert (batch.usage.output_tokens, batch.model) == (21, None)
        bad = {one["custom_id"]: one["response"] for one in content(client, batch.error_file_id)}
        assert {name: answer["status_code"] for name, answer in bad.items()} == {"r7": 400, "r8": 404}
        assert bad["r8"]["body"]["error"]["code"] == "model_not_found"
        # Files.
        output = client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        assert output.bytes == len(client.files.content(output.id).content)
        listed = [file.id for file in client.files.list(limit=1)]  # the client asks for page after page
        assert sorted(listed) == sorted([batch.input_file_id, batch.output_file_id, batch.error_file_id])
        assert [file.id for file in client.files.list(purpose="batch")] == [batch.input_file_id]
        assert [file.id for file in client.files.list(order="asc")] == listed[::-1]
        assert client.files.delete(output.id).deleted
        with pytest.raises(openai.NotFoundError, match="No such File"):
            client.files.content(output.id)
        assert not list((tmp_path / "store/v1/content").glob(f"*/{output.id}/*"))
        # Batches.
        others = [begin(client, line(0)) for _ in range(2)]
        assert [one.id for one in client.batches.list(limit=1)] == [others[1].id, others[0].id, batch.id]
        for one in others:
            assert over(client, one).model == "tiny"
        # Other endpoints.
        asked: dict[str, Any] = {
            "/v1/embeddings": {"input": "a"}, "/v1/completions": {"prompt": "a", "max_tokens": 2},
            "/v1/responses": {"input": "a", "max_output_tokens": 2},
        }  # fmt: skip
        made = [
            begin(client, line(0, url=path, body={"model": "tiny", **body}), endpoint=path)
            for path, body in asked.items()
        ]
        for one in made:
            assert counts(over(client, one)) == (1, 1, 0)
        with pytest.raises(openai.ConflictError, match="is over"):
            client.batches.cancel(batch.id)
        assert not list((tmp_path / "store/v1/open").glob("*/*"))
    assert router.metric("helios_router_batch_lines_total", result="completed") == 12
    assert router.metric("helios_router_batches_total", status="completed") == 6
    assert router.in_flight() == 0


def test_bad_lines_fail_the_batch_before_anything_is_asked(
    fake_vllm: Start, start_router: StartRouter, tmp_path: Path
) -> None:
    fake = fake_vllm("tiny")
    router = start_router(fake, batches=batches(tmp_path / "store", max_lines=12))
    lines = [
        line(1), "no json", line(1), line(2, custom_id=""), line(3, method="GET"), line(4, url="/v1/embeddings"),
        line(5, body=[1]), line(6, body={"messages": []}), line(7, body={"model": "tiny", "stream": True}), "[]",
    ]  # fmt: skip
    expected = [
        (2, "invalid_json_line", None), (3, "duplicate_custom_id", "custom_id"), (4, "invalid_custom_id", "custom_id"),
        (5, "invalid_method", "method"), (6, "invalid_url", "url"), (7, "invalid_body", "body"),
        (8, "missing_required_parameter", "body.model"), (9, "stream_not_supported", "body.stream"),
        (10, "invalid_json_line", None),
    ]  # fmt: skip
    with client_of(router) as client:
        batch = over(client, begin(client, *lines))
        assert batch.status == "failed"
        assert [(e.line, e.code, e.param) for e in batch.errors.data] == expected
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        batch = over(client, begin(client, *(line(n) for n in range(13))))
        assert [(e.line, e.code) for e in batch.errors.data] == [(13, "too_many_requests")]
        batch = over(client, begin(client, " ", ""))
        assert [e.code for e in batch.errors.data] == ["empty_file"]
        file = client.files.create(file=jsonl(line(1)), purpose="batch")
        for part in (tmp_path / "store/v1/content").glob(f"*/{file.id}/*"):
            part.unlink()
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert [e.code for e in over(client, batch).errors.data] == ["input_file_not_found"]
    assert fake.journal() == []


def test_errors_name_the_field(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    router = start_router(fake_vllm("tiny"), batches=batches(tmp_path / "store", max_file_mib=1, max_files=1))
    with client_of(router) as client:

        def refused(call: Callable[[], Any]) -> tuple[int, Any, Any]:
            with pytest.raises(openai.APIStatusError) as error:
                call()
            return error.value.status_code, error.value.code, error.value.param

        def upload(file: Any = None, **more: Any) -> Any:
            return client.files.create(**{"file": file or jsonl(line(1)), "purpose": "batch", **more})

        assert refused(lambda: upload(purpose="vision")) == (400, "invalid_value", "purpose")
        assert refused(lambda: upload(io.BytesIO(b""))) == (400, "empty_file", "file")
        assert refused(lambda: upload(io.BytesIO(bytes(1 << 20) + b"x"))) == (413, "file_too_large", "file")
        assert refused(lambda: upload(io.BytesIO(bytes(3 << 20)))) == (413, "file_too_large", "file")
        short: Any = {"anchor": "created_at", "seconds": 5}
        assert refused(lambda: upload(expires_after=short)) == (400, "invalid_value", "expires_after.seconds")
        assert refused(lambda: client.post("/files", body={}, cast_to=object)) == (400, "invalid_content_type", None)
        file = upload(expires_after={"anchor": "created_at", "seconds": 3600})
        assert file.expires_at == file.created_at + 3600
        assert refused(upload) == (400, "file_limit_reached", "file")

        def create(**more: Any) -> Any:
            given = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **more}
            return client.batches.create(**given)

        assert refused(lambda: create(endpoint="/v1/videos")) == (400, "invalid_value", "endpoint")
        assert refused(lambda: create(completion_window="1h")) == (400, "invalid_value", "completion_window")
        assert refused(lambda: create(input_file_id="file-" + "0" * 32)) == (404, "file_not_found", "input_file_id")
        assert refused(lambda: create(metadata={"a": "x" * 513})) == (400, "invalid_value", "metadata")
        assert refused(lambda: create(output_expires_after=short)) == (
            400, "invalid_value", "output_expires_after.seconds",
        )  # fmt: skip
        assert refused(lambda: create(extra_body={"x": 1})) == (400, "unknown_parameter", "x")
        assert refused(lambda: client.files.list(limit=0)) == (400, "invalid_value", "limit")
        for identity in ("x", "x.json", "file-" + "0" * 32):
            assert refused(lambda identity=identity: client.files.retrieve(identity))[:2] == (404, "file_not_found")
            assert refused(lambda identity=identity: client.batches.retrieve(identity))[:2] == (404, "batch_not_found")


def test_cancel(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    """What was answered stays, the rest is listed as cancelled, and the worker is asked nothing more."""
    fake = fake_vllm("tiny", token_s=0.02)
    router = start_router(fake, batches=batches(tmp_path / "store", in_flight=2))
    with client_of(router) as client:
        batch = begin(client, *(line(n) for n in range(400)))
        until(client, batch, lambda b: b.request_counts.completed)
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = over(client, batch)
        total, completed, failed = counts(batch)
        assert batch.status == "cancelled"
        assert batch.cancelling_at <= batch.cancelled_at
        assert (total, completed + failed) == (400, 400)
        assert 0 < completed < 400
        good, bad = content(client, batch.output_file_id), content(client, batch.error_file_id)
        assert len(good) == completed
        assert sorted(one["custom_id"] for one in good + bad) == sorted(f"r{n}" for n in range(400))
        assert {one["error"]["code"] for one in bad} == {"batch_cancelled"}
    assert len(fake.journal(CHAT)) < completed + 6
    assert router.in_flight() == 0


def test_expiry(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    """A day is over, in the record that the store has."""
    router = start_router(fake_vllm("tiny", token_s=0.02), batches=batches(tmp_path / "store", in_flight=2))
    with client_of(router) as client:
        batch = begin(client, *(line(n) for n in range(300)))
        until(client, batch, lambda b: b.request_counts.completed)
    router.stop()
    (record,) = (tmp_path / "store/v1/batches").glob("*/*.json")
    found = json.loads(record.read_bytes())
    assert found["owner"] == ""
    record.write_text(json.dumps({**found, "expires_at": int(time.time()) - 5}))
    router = start_router(fake_vllm("tiny"), batches=batches(tmp_path / "store"))
    with client_of(router) as client:
        batch = over(client, batch)
        total, completed, failed = counts(batch)
        assert (batch.status, total, completed + failed) == ("expired", 300, 300)
        assert batch.expired_at
        assert len(content(client, batch.output_file_id)) == completed > 0
        assert {one["error"]["code"] for one in content(client, batch.error_file_id)} == {"batch_expired"}


def test_a_killed_router_s_batch_goes_on_in_another(
    fake_vllm: Start, start_router: StartRouter, tmp_path: Path
) -> None:
    """Each request is answered in the output once; asked twice is at most what one flush and the flight held."""
    fake = fake_vllm("tiny", token_s=0.05)
    routers = [start_router(fake, batches=batches(tmp_path / "store", in_flight=2)) for _ in range(2)]
    with client_of(routers[0]) as client:
        batch = begin(client, *(line(n) for n in range(80)))
        until(client, batch, lambda b: b.request_counts.completed)
    if owner_of(tmp_path / "store") not in routers[0].pids():
        routers.reverse()
    killed, left = routers
    with client_of(left) as client:
        before = client.batches.retrieve(batch.id).request_counts.completed
        kill(killed)
        asked = len(fake.journal(CHAT))
        batch = over(client, batch)
        assert (batch.status, counts(batch)) == ("completed", (80, 80, 0))
        good = content(client, batch.output_file_id)
        assert sorted(one["custom_id"] for one in good) == sorted(f"r{n}" for n in range(80))
    assert len(fake.journal(CHAT)) - 80 <= asked - before
    assert left.metric("helios_router_batch_claims_total", **{"from": "lapsed"}) == 1


def test_one_of_two_processes_is_killed_and_the_rest_stops_cleanly(
    fake_vllm: Start, start_router: StartRouter, tmp_path: Path
) -> None:
    """The data process that has the batch dies; another has it after the lease, and gives it back when stopped."""
    fake = fake_vllm("tiny", token_s=0.02)
    router = start_router(fake, processes=2, batches=batches(tmp_path / "store", in_flight=2))
    with client_of(router) as client:
        batch = begin(client, *(line(n) for n in range(200)))
        until(client, batch, lambda b: b.request_counts.completed)
        owner = owner_of(tmp_path / "store")
        assert owner in router.pids()
        os.kill(owner, signal.SIGKILL)
    with client_of(router) as client:
        before = counts(client.batches.retrieve(batch.id))[1]
        until(client, batch, lambda b: b.request_counts.completed > before)
    assert record_in(tmp_path / "store")["epoch"] == 2
    assert router.stop() == 0
    assert record_in(tmp_path / "store")["owner"] == ""


def test_tenants_see_their_own_and_their_limits_count(
    fake_vllm: Start, start_router: StartRouter, helios: Any, tmp_path: Path
) -> None:
    keys = str(tmp_path / "keys")

    def make(tenant: str, *options: str) -> str:
        made = helios("router", "keys", "create", tenant, "--file", keys, *options)
        return str(made.out).strip()

    one, other, narrow = make("acme"), make("beta"), make("acme", "--route", "/v1/chat/*")
    gone = make("acme", "--model", "other")
    limited = make("gamma", "--requests-per-minute", "4")
    fake = fake_vllm("tiny")
    settings = {"keys": keys, "queue": {"per_worker": 4}}
    router = start_router(fake, admission=json.dumps(settings), batches=batches(tmp_path / "store"))
    with client_of(router, one) as a, client_of(router, other) as b, client_of(router, narrow) as c:
        batch = over(a, begin(a, *(line(n) for n in range(20))))
        assert counts(batch) == (20, 20, 0)
        assert list(b.batches.list()) == list(b.files.list()) == []
        for call in (
            lambda: b.batches.retrieve(batch.id), lambda: b.batches.cancel(batch.id),
            lambda: b.files.content(batch.output_file_id), lambda: b.files.delete(batch.input_file_id),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.PermissionDeniedError, match="may not use /v1/files"):
            c.files.list()
    with client_of(router, gone) as client:  # may not use the model
        batch = over(client, begin(client, line(1)))
        (bad,) = content(client, batch.error_file_id)
        assert (bad["response"]["status_code"], bad["response"]["body"]["error"]["code"]) == (403, "model_not_allowed")
    with client_of(router, limited) as client:
        assert counts(over(client, begin(client, *(line(n) for n in range(3))))) == (3, 3, 0)
        ask: Any = line(1)["body"]
        client.post("/chat/completions", body=ask, cast_to=object)
        with pytest.raises(openai.RateLimitError):
            client.post("/chat/completions", body=ask, cast_to=object)
    with client_of(router, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.files.list()


def test_interactive_requests_go_first(fake_vllm: Start, start_router: StartRouter, tmp_path: Path) -> None:
    """While a worker has enough to do nothing of a batch is begun there; then it is."""
    fake = fake_vllm("tiny", token_s=0.01)
    router = start_router(fake, batches=batches(tmp_path / "store", per_worker=1))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "stream": True}
    sock, answer = stream(router.address, CHAT, {**body, "ignore_eos": True})
    with client_of(router) as client:
        batch = begin(client, line(1))
        until(client, batch, lambda b: b.status == "in_progress")
        assert len(fake.journal(CHAT)) == 1
        answer.read()
        answer.close()
        sock.close()
        assert counts(over(client, batch)) == (1, 1, 0)
        # What no worker took is asked again.
        fake.refuse()
        batch = begin(client, line(1))
        until(client, batch, lambda b: router.metric("helios_router_batch_lines_total", result="again"))
        fake.accept()
        assert counts(over(client, batch)) == (1, 1, 0)


@pytest.mark.parametrize("cloud", [moto, azurite, gcs])
def test_in_the_cloud(fake_vllm: Start, start_router: StartRouter, tmp_path: Path, cloud: Any) -> None:
    """Two routers share a bucket; one is killed."""
    with cloud(tmp_path) as server, credentials(server):
        options = {"endpoint": server.endpoint(), "region": server.region, "account": server.account}
        settings = batches(f"{server.store}/some/where", store_options=options, in_flight=2)
        fake = fake_vllm("tiny", token_s=0.05)
        first, second = (start_router(fake, batches=settings) for _ in range(2))
        with client_of(first) as client, client_of(second) as other:
            batch = begin(client, *(line(n) for n in range(50)))
            until(client, batch, lambda b: b.request_counts.completed)
            assert other.batches.retrieve(batch.id).input_file_id == batch.input_file_id
            # Which one runs it is chance.
            mine = first.metric("helios_router_batches_running") == 1
        killed, left = (first, second) if mine else (second, first)
        kill(killed)
        with client_of(left) as client:
            batch = over(client, batch)
            assert (batch.status, counts(batch)) == ("completed", (50, 50, 0))
            good = content(client, batch.output_file_id)
            assert sorted(one["custom_id"] for one in good) == sorted(f"r{n}" for n in range(50))
            client.files.delete(batch.output_file_id)
            assert [file.id for file in client.files.list()] == [batch.input_file_id]
