"""What the router's benchmark asks, of which workers, and what it makes of the spans."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import router_peers
from benchmarks.nginx import free_ports
from benchmarks.router import Scene
from benchmarks.router_collector import TAKEN, Sink, sent_of
from benchmarks.router_load import parsed, script_of
from benchmarks.router_peers import PEERS, Proxy, compiled, ours, plain
from benchmarks.router_prompts import QUESTIONS, SHARED, bodies

WORKERS = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]


def named(command: Sequence[str]) -> list[str]:
    """The workers that a command line names, in its order."""
    return re.findall(r"http://127\.0\.0\.1:[123]\b", " ".join(command))


@pytest.fixture
def our_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: subprocess.CompletedProcess([], 0, "key\n"))
    return ours(tmp_path, "http://127.0.0.1:4318", 0.25)[0]


def test_prompts_share_their_beginnings_and_are_the_same_each_time() -> None:
    for stream in (False, True):
        found = [json.loads(body) for body in bodies(stream=stream)]
        prompts = [tuple(message["content"] for message in one["messages"]) for one in found]
        assert len(set(prompts)) == SHARED * QUESTIONS
        assert set(Counter(system for system, _ in prompts).values()) == {QUESTIONS}
        assert len({len(body) for body in bodies(stream=stream)}) == 1
        assert all(one.get("stream", False) is stream for one in found)
    neighbours = itertools.pairwise(prompts)
    assert sum(one[0] != other[0] for one, other in neighbours) > len(prompts) / 2  # not one beginning after another
    first = bodies()
    bodies.cache_clear()
    assert bodies() == first


def test_a_script_for_wrk_holds_each_body_as_it_is() -> None:
    lines = script_of(bodies(), "secret").splitlines()
    quoted = [line.strip().rstrip(",") for line in lines if line.startswith("  " + '"')]
    assert [json.loads(text).encode() for text in quoted] == list(bodies())
    assert set(re.findall(r"\\(.)", "".join(quoted))) == {'"'}  # all that is escaped means the same in Lua
    assert 'wrk.headers["Authorization"] = "Bearer secret"' in lines


def test_a_load_to_which_nothing_was_answered_is_no_figure() -> None:
    report = "  50%    1.00ms\n  99%    2.00ms\n  {} requests in 2.00s, 1MB read\nRequests/sec:   {}\n"
    assert parsed(report.format(20, "10.00")).rate == 10
    with pytest.raises(RuntimeError, match="nothing was answered"):
        parsed(report.format(0, "0.00"))


def test_every_proxy_gets_all_workers(tmp_path: Path, our_proxy: Proxy) -> None:
    rust = [name for name in PEERS if name != "litellm"]
    for proxy in (plain, our_proxy, compiled(our_proxy), *(PEERS[name](tmp_path) for name in rust)):
        assert named(proxy(WORKERS)[0]) == WORKERS
    PEERS["litellm"](tmp_path)(WORKERS)
    deployments = json.loads((tmp_path / "litellm.yaml").read_text())["model_list"]
    assert {one["model_name"] for one in deployments} == {"m"}
    assert [one["litellm_params"]["api_base"] for one in deployments] == [f"{url}/v1" for url in WORKERS]


def test_ours_sends_spans_only_to_a_collector_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, our_proxy: Proxy
) -> None:
    (said,) = [word for word in our_proxy(WORKERS)[0] if word.startswith("HELIOS_ROUTER__TRACING=")]
    assert json.loads(said.partition("=")[2]) == {"endpoint": "http://127.0.0.1:4318", "ratio": 0.25}
    assert "TRACING" not in " ".join(ours(tmp_path)[0](WORKERS)[0])
    assert router_peers.RATIO == 1
    assert str(Scene(workers=1, trace_ratio=0)) == "one worker behind each; router: no spans are recorded"


def test_the_share_of_the_spans_that_the_collector_got() -> None:
    text = 'helios_router_spans_total{result="sent"} 30.0\nhelios_router_spans_total{result="dropped"} 10.0\n'
    assert sent_of(text + 'helios_router_spans_created{result="sent"} 1.79e+09\n') == 0.75
    assert sent_of(text.replace("30.0", "0.0")) == 0
    assert sent_of("# TYPE helios_router_spans_total counter\n") is None


def test_a_collector_takes_what_comes_in_pieces() -> None:
    answered: list[bytes] = []
    one = Sink()
    one.connection_made(type("Transport", (), {"write": lambda self, data: answered.append(data)})())
    request = b"POST /v1/traces HTTP/1.1\r\nhost: c\r\ncontent-length: 6\r\n\r\nspans!"
    for cut in range(1, len(request)):
        one.data_received(request[:cut])
        assert len(answered) == cut - 1
        one.data_received(request[cut:])
    assert set(answered) == {TAKEN}


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(20))) == 20
