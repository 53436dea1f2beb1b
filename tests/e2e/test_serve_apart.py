"""`helios serve --prefill 1 --decode 1` with real vLLM: one start of the two for all that is shown of them.

What they are as two of a pair, behind the router that serves them; and as two workers that both do all, behind routers
of the tests' own, since each of them can.
"""

import contextlib
import json
import os
import re
import signal
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from helios.home import Home
from helios.launch.guard import descendants
from helios.launch.processes import records
from helios.launch.tiny_model import WORDS, tiny_llama
from tests.conftest import error_lines, leftovers
from tests.e2e.conftest import VLLM_START_S, Running, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.fuse,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

NAME = "helios/tiny-llama"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BLOCK = 128
"""Tokens of a KV block on a CPU."""

CHECK = 16
"""More tokens than the router asks for where it doubts that a worker generates."""

PATIENT = json.dumps({"wait_s": 5.0})
"""How long a request waits for the prefix index where a test is about what that says."""


def prompt(number):
    """Some 600 tokens that no prompt of another number begins with: more than are computed where they are answered."""
    return f"{number} " + " ".join(WORDS[number % 7 :: 2][:200] * 3)


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read()


@dataclass(frozen=True)
class Answer:
    text: str
    finished: str
    prompt: int
    """Tokens of the prompt."""
    made: int
    """Tokens of the answer."""


def asked(path, text, stream, tokens):
    body = {"model": NAME, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body | ({"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text})


def ask(url, path, text, stream=False, tokens=16):
    """The answer at temperature 0, whole or put together from its events."""
    answer = post(f"{url}{path}", asked(path, text, stream, tokens))
    if not stream:
        chunks = [json.loads(answer)]
    else:
        lines = answer.decode().splitlines()
        assert "data: [DONE]" in lines
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    usage, said = chunks[-1]["usage"], "delta" if stream else "message"
    parts = [(one[said].get("content") if path == CHAT else one["text"]) or "" for one in choices]
    return Answer("".join(parts), choices[-1]["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])


def metrics(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return response.read().decode()


def metric(url, name, *labels):
    """Sum of a metric's series that have these labels, written as ``name="value"``."""
    found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", metrics(url), re.MULTILINE)
    return sum(float(value) for said, value in found if all(label in said for label in labels))


def sources(url):
    """Where the tokens of prompts came from, by the worker's own count."""
    name = "vllm:prompt_tokens_by_source_total"
    return {source: metric(url, name, f'source="{source}"') for source in ("external_kv_transfer", "local_compute")}


@dataclass
class Pair:
    """What serves the two workers, and their addresses."""

    home: Home
    serving: Running
    router: str
    prefill: str
    decode: str

    def pid(self, name):
        """The process of a worker's API."""
        return next(record.process.pid for _, record in records(self.home) if record.name == name)

    def workers(self):
        """The two as ``--worker`` says it, if each were to do all."""
        words = next(record.command for _, record in records(self.home) if record.name == "router")
        return [re.sub(",role=\\w+", "", word) for word in words if word.startswith(f"{NAME}=")]

    def warm(self):
        """Whether the router knows that the two have exchanged blocks, and follows what both have."""
        return metric(self.router, "helios_router_warm_pairs") == 1 and followed(self.router) == 2


def followed(router):
    return metric(router, "helios_router_kv_feeds_in_step")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("apart")
    home = Home(base / "home")
    assert run(home, "push", str(tiny_llama(base / "models")), NAME).code == 0
    command = ["serve", NAME, "--prefill", "1", "--decode", "1", "--port", "0", "--logs"]
    serving = Running.start(home, *command, HELIOS_ROUTER__POLICY="prefix-index", HELIOS_ROUTER__KV_EVENTS=PATIENT)
    try:
        serving.wait_for("until Ctrl-C", 2 * VLLM_START_S)  # two that start share the cores
        serving.wait_for("http://127.0.0.1")
        prefill, decode = re.search(r"vllm-prefill-1 at (\S+), vllm-decode-1 at (\S+) \(", serving.text()).groups()
        yield Pair(home, serving, serving.out[0], prefill, decode)
    finally:
        serving.close()
    problems = leftovers(home, base)
    problems += [line for log in sorted(home.logs.glob("**/*.log")) for line in error_lines(log)]
    assert problems == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_blocks_of_a_prompt_move_and_the_answer_is_that_of_one_engine(pair, wait_for, path, stream):
    wait_for(pair.warm, 120, what="the two to have exchanged blocks")
    text = prompt(10 + 2 * (path == CHAT) + stream)
    alone = ask(pair.prefill, path, text, stream)
    before, reused = sources(pair.decode), metric(pair.decode, "vllm:prefix_cache_hits_total")
    answer = ask(pair.router, path, text, stream)
    after = sources(pair.decode)
    assert answer.prompt > 512
    assert after["external_kv_transfer"] - before["external_kv_transfer"] == answer.prompt, "all of it, to the token"
    assert after["local_compute"] - before["local_compute"] < CHECK
    assert metric(pair.decode, "vllm:prefix_cache_hits_total") == reused, "it had nothing of it"
    assert answer == alone
    assert (answer.finished, answer.made) == ("length", 16)
    assert answer.text != ask(pair.prefill, path, prompt(9), stream).text, "it does depend on what was asked"


def test_logs_of_both_are_shown(pair):
    for name in ("vllm-prefill-1", "vllm-decode-1"):
        assert any(line.startswith(f"{name} | ") for line in pair.serving.err)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core, which all share")
def test_each_computes_on_cores_of_its_own(pair):
    """vLLM's NIXL connector pins the thread that runs the model to a NUMA node's last core, whose ever that is."""
    prefill, decode = (cores(pair.pid(name)) for name in ("vllm-prefill-1", "vllm-decode-1"))
    assert prefill
    assert decode
    assert not prefill & decode


def cores(pid):
    """Where the threads of a vLLM's worker may run: of the process that has the model."""
    (worker,) = (one for one in descendants(pid) if Path(f"/proc/{one}/comm").read_text() == "VLLM::Worker\n")
    return {core for thread in os.listdir(f"/proc/{worker}/task") for core in os.sched_getaffinity(int(thread))}


def side_channel(pid):
    """Address and port where a vLLM agrees on blocks."""
    said = dict(one.split("=", 1) for one in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in one)
    return said["VLLM_NIXL_SIDE_CHANNEL_HOST"], said["VLLM_NIXL_SIDE_CHANNEL_PORT"]


@contextlib.contextmanager
def router_of(start, pair, wait_for, policy):
    """A router before the two, each of which is to do all."""
    options = [word for worker in pair.workers() for word in ("--worker", worker)]
    command = ["router", "--port", "0", "--policy", policy, *options]
    running = start(pair.home, *command, HELIOS_ROUTER__KV_EVENTS=PATIENT)
    wait_for(lambda: running.out, 60, what="the router's URL")
    (url,) = running.out
    wait_for(lambda: metric(url, "helios_router_worker_up") == 2, 60, what="both workers to be up")
    yield url
    running.close()


@contextlib.contextmanager
def busy(url, pair, wait_for):
    """A long answer is under way; yields the worker that gives it, and the other one."""
    body = json.dumps(asked(COMPLETIONS, "On and on", True, 1500)).encode()
    request = urllib.request.Request(f"{url}{COMPLETIONS}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        response.readline()
        both = [pair.prefill, pair.decode]
        loads = [metric(url, "helios_router_in_flight", f'worker="{one}"') for one in both]
        assert sorted(loads) == [0, 1]
        yield both[loads.index(1)], both[loads.index(0)]
        assert response.readline(), "it was under way all the time"


def reused(url):
    return metric(url, "vllm:prefix_cache_hits_total"), metric(url, "vllm:prefix_cache_queries_total")


def test_a_second_request_goes_to_the_worker_that_has_its_prefix(pair, start, wait_for):
    """The prefix index follows both; who has a prompt gets what begins alike, although the other one is idle."""
    with router_of(start, pair, wait_for, "prefix-index") as router:
        wait_for(lambda: followed(router) == 2, 60, what="both workers to be followed")
        with busy(router, pair, wait_for) as (it, other):
            for number, has, lacks in ((20, it, other), (21, other, it)):
                known = metric(router, "helios_router_kv_blocks")
                first = ask(has, COMPLETIONS, prompt(number), tokens=1)  # past the router, which sees only the events
                whole = first.prompt // BLOCK
                wait_for(
                    lambda least=known + whole: metric(router, "helios_router_kv_blocks") >= least,
                    what="its blocks to be in the index",
                )
                before, untouched = reused(has), reused(lacks)
                second = ask(router, COMPLETIONS, prompt(number) + " and then", tokens=1)
                hits, queries = (now - then for now, then in zip(reused(has), before, strict=True))
                assert reused(lacks) == untouched, "the other one has not been asked"
                assert (hits, queries) == (whole * BLOCK, second.prompt), "all whole blocks of it"


def test_by_load_alone_it_would_have_gone_to_the_other_worker(pair, start, wait_for):
    """The same without the index: what the test before shows is the index' doing."""
    with router_of(start, pair, wait_for, "least-requests") as router, busy(router, pair, wait_for) as (has, lacks):
        first = ask(has, COMPLETIONS, prompt(30), tokens=1)
        before, untouched = reused(lacks), reused(has)
        second = ask(router, COMPLETIONS, prompt(30) + " and then", tokens=1)
        hits, queries = (now - then for now, then in zip(reused(lacks), before, strict=True))
        assert reused(has) == untouched
        assert (hits, queries) == (0, second.prompt)
        assert second.prompt > first.prompt


def test_a_prefill_worker_that_is_killed_loses_no_request_and_comes_back(pair, wait_for):
    wait_for(pair.warm, 120, what="the two to have exchanged blocks")
    pid = pair.pid("vllm-prefill-1")
    bound, agreed = cores(pid), side_channel(pid)
    assert agreed[1] == side_channel(pair.pid("vllm-decode-1"))[1], "one port: vLLM hashes it with what it compiles"
    kinds = [(path, stream) for path in (CHAT, COMPLETIONS) for stream in (False, True)]
    alone = [ask(pair.prefill, path, prompt(40 + at), stream) for at, (path, stream) in enumerate(kinds)]
    healed, made, failed = threading.Event(), [], []

    def go_on():
        """One request after another, before, meanwhile and after."""
        while not healed.wait(0.2):
            try:
                made.append(ask(pair.router, COMPLETIONS, prompt(100 + len(made)), stream=len(made) % 2 == 1))
            except Exception as error:
                failed.append(error)

    with ThreadPoolExecutor(4) as threads:
        stream = threads.submit(go_on)
        try:
            answering = threads.submit(ask, pair.router, COMPLETIONS, prompt(50), True, 600)
            wait_for(lambda: metric(pair.decode, "vllm:num_requests_running") > 0, 60, what="an answer under way")
            os.kill(pid, signal.SIGSTOP)  # so that what is sent there now is there when it dies
            waiting = [
                threads.submit(ask, pair.router, path, prompt(51 + at), True) for at, (path, _) in enumerate(kinds[1:3])
            ]
            there = f'worker="{pair.prefill}"'
            wait_for(lambda: metric(pair.router, "helios_router_in_flight", there) >= 2, 60, what="prompts at it")
            os.kill(pid, signal.SIGKILL)
            for one, tokens in ((answering, 600), *((one, 16) for one in waiting)):
                answer = one.result(120)
                assert (answer.finished, answer.made) == ("length", tokens)
            for (path, streamed), whole in zip(kinds, alone, strict=True):
                at = kinds.index((path, streamed))
                assert ask(pair.router, path, prompt(40 + at), streamed) == whole, "the other one computes it itself"
            pair.serving.wait_for("vllm-prefill-1 ended with status 137; it is started again in 1 s")
            pair.serving.wait_for("vllm-prefill-1 answers again.", VLLM_START_S)
            wait_for(pair.warm, 120, what="the two to have exchanged blocks again")
        finally:
            healed.set()
        stream.result(120)
    assert failed == []
    assert len(made) > 3
    assert all((one.finished, one.made) == ("length", 16) for one in made)

    before = sources(pair.decode)
    answer = ask(pair.router, CHAT, prompt(60))
    after = sources(pair.decode)
    assert after["external_kv_transfer"] - before["external_kv_transfer"] == answer.prompt
    assert after["local_compute"] - before["local_compute"] < CHECK
    again = pair.pid("vllm-prefill-1")
    assert again != pid
    assert (cores(again), side_channel(again)) == (bound, agreed), "on its cores, and at its place"


def test_sigterm_ends_all_of_it(pair, nothing_left):
    pair.serving.process.send_signal(signal.SIGTERM)
    assert pair.serving.wait(120) == 143
    nothing_left(pair.home)
