"""Workers: what the configuration may say, who is a candidate, and counts that come back to zero."""

from __future__ import annotations

import re

import pytest

from helios.config import WorkerSettings
from helios.errors import UsageError
from router.scheduling.configured import policy_of
from router.scheduling.request import Request
from router.workers import Worker, Workers, address_of, check_url, parse_worker


def workers(*texts: str) -> Workers:
    return Workers([parse_worker(text) for text in texts], lambda: 0.0)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://H:8000/", "http://h:8000"),
        ("https://h/prefix/", "https://h/prefix"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://vllm_0.pool:8000", "http://vllm_0.pool:8000"),
        ("http://größe.example:8000", "http://größe.example:8000"),
    ],
)
def test_urls_are_brought_to_one_form(text: str, url: str) -> None:
    assert check_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "h:1", "//h:1", "http://", "http://h:0", "http://h:x", "http://h?x", "http://h#x", "http://u@h"]
)
def test_other_texts_are_no_urls(text: str) -> None:
    with pytest.raises(UsageError):
        check_url(text)


@pytest.mark.parametrize("host", ["*", "*.pool", "a b", "a,b", "{pod}"])
def test_a_host_that_nobody_can_connect_to_is_none(host: str) -> None:
    with pytest.raises(UsageError, match=rf"'{re.escape(host)}' is none that can be connected to(.|\n)*HOST:PORT"):
        check_url(f"http://{host}:8000")


def test_command_line_form_of_a_worker() -> None:
    assert parse_worker("org/m=http://h:1") == WorkerSettings(model="org/m", url="http://h:1", role="both")
    assert parse_worker("m=http://h:1/,role=decode").role == "decode"
    assert parse_worker("m=http://h:1/x=y").url == "http://h:1/x=y"
    told = parse_worker("m=http://h:1,revision=r1,weight=0.5,adapter=a,adapter=b")
    assert (told.revision, told.weight, told.adapters) == ("r1", 0.5, ["a", "b"])


@pytest.mark.parametrize("option", ["weight=0", "weight=-1", "weight=nan", "weight=x", "rol=both", "adapter=", "role="])
def test_an_option_that_is_none_is_an_error_that_lists_them(option: str) -> None:
    with pytest.raises(UsageError, match=r"not an option of a worker(.|\n)*weight=NUMBER"):
        parse_worker(f"m=http://h:1,{option}")


def choose(pool: Workers, model: str = "m") -> Worker:
    return policy_of("least-requests").choose(Request(model), pool.candidates(model, ()))


def test_one_server_of_two_models_is_one_worker() -> None:
    pool = workers("a=http://h:1", "b=http://h:1/", "b=http://h:2")
    assert pool.models == ["a", "b"]
    assert len(pool.all) == 2
    (shared,) = pool.of("a")
    pool.lease(shared)
    assert choose(pool, "b").url == "http://h:2"


def test_candidates_are_up_or_else_unchecked_and_never_prefill() -> None:
    pool = workers("m=http://p:1,role=prefill", "m=http://a:1", "m=http://b:1", "m=http://c:1")
    prefill, a, b, c = pool.of("m")
    assert pool.candidates("m", ()) == [a, b, c]
    prefill.health.succeeded()
    b.health.succeeded()
    assert pool.candidates("m", ()) == [b]
    a.health.failed("x")
    assert pool.candidates("m", {b}) == [c]
    c.health.failed("x")
    assert pool.candidates("m", {b}) == []
    assert pool.candidates("other", ()) == []


def test_a_model_that_a_source_names_without_a_worker_is_known_and_has_limits() -> None:
    found = Workers([parse_worker("m=http://h:1")], lambda: 0.0, pins=True)
    commit = "c" * 40
    asleep = WorkerSettings(model="team/chat", url="", revision=commit, max_queued=3)
    assert found.apply("kubernetes", [asleep]) == []
    assert found.models == ["m", "team/chat"]
    assert found.known("team/chat")
    assert found.known(f"team/chat@{commit}")
    assert (found.of("team/chat"), found.may_wait("team/chat")) == ([], 3)
    awake = WorkerSettings(model="team/chat", url="http://h:2", revision=commit, max_queued=5)
    found.apply("kubernetes", [asleep, awake])
    assert ([one.url for one in found.of("team/chat")], found.may_wait("team/chat")) == (["http://h:2"], 5)
    found.apply("kubernetes", [asleep])
    assert found.models == ["m", "team/chat"]
    found.apply("kubernetes", [])
    assert found.models == ["m"]
    assert found.known("team/chat"), "it had workers a moment ago"
    found.apply("kubernetes", [WorkerSettings(model="other", url="")])
    found.apply("kubernetes", [])
    assert not found.known("other")


def test_of_what_several_sources_say_of_a_model_that_sleeps_the_least_counts() -> None:
    found = Workers([], lambda: 0.0)
    found.apply("a", [WorkerSettings(model="m", url="", max_queued=2)])
    found.apply("b", [WorkerSettings(model="m", url="", max_queued=9, max_in_flight=4)])
    assert (found.limits("m").queued, found.limits("m").in_flight) == (2, 4)


def test_a_worker_of_the_configuration_has_a_url() -> None:
    with pytest.raises(UsageError, match="is not a worker's URL"):
        Workers([WorkerSettings(model="m", url="")], lambda: 0.0)


def test_a_lease_is_given_back_once() -> None:
    pool = workers("m=http://h:1")
    (worker,) = pool.of("m")
    lease = pool.lease(worker)
    assert worker.in_flight == 1
    lease.end()
    lease.end()
    assert worker.in_flight == 0


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", ("h", 80, False, b"h", b"")),
        ("https://h.example/base", ("h.example", 443, True, b"h.example", b"/base")),
        ("http://[::1]:8000", ("::1", 8000, False, b"[::1]:8000", b"")),
        ("http://käse.example:1", ("käse.example", 1, False, b"xn--kse-qla.example:1", b"")),
    ],
)
def test_where_a_worker_is(url: str, address: tuple[object, ...]) -> None:
    found = address_of(url)
    assert (found.host, found.port, found.tls, found.authority, found.prefix) == address
