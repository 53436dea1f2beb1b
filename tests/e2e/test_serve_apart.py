"""`helios serve --prefill 1 --decode 1` with real vLLM: prompts are computed by one process and answered by another."""

import json
import os
import re
import signal
import urllib.request

import pytest

from helios.launch.processes import records
from helios.launch.tiny_model import WORDS, tiny_llama
from tests.e2e.conftest import VLLM_START_S, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.fuse,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

NAME = "helios/tiny-llama"
BLOCK = 128
"""Tokens of a KV block on a CPU."""

CHECK = 16
"""More tokens than the router asks for where it doubts that a worker generates."""


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read()


def ask(url, path, prompt, stream):
    """Text and prompt tokens of an answer at temperature 0."""
    body = {"model": NAME, "temperature": 0, "max_tokens": 16, "stream": stream}
    body |= {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}
    if not stream:
        whole = json.loads(post(f"{url}{path}", body))
        (choice,) = whole["choices"]
        return choice["message"]["content"] if "chat" in path else choice["text"], whole["usage"]["prompt_tokens"]
    body["stream_options"] = {"include_usage": True}
    lines = post(f"{url}{path}", body).decode().splitlines()
    assert "data: [DONE]" in lines
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join((one["delta"].get("content") or "") if "chat" in path else one["text"] for one in choices)
    return text, chunks[-1]["usage"]["prompt_tokens"]


def sources(url):
    """Where the tokens of prompts came from, by the worker's own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', text, re.MULTILINE)
    return {source: float(count) for source, count in found}


def warm_pairs(router):
    """Pairs of workers that the router knows to have exchanged blocks."""
    with urllib.request.urlopen(f"{router}/metrics", timeout=30) as response:
        return float(re.search(r"^helios_router_warm_pairs (\S+)$", response.read().decode(), re.MULTILINE)[1])


def test_one_process_computes_the_prompts_and_another_answers(helios_home, start, wait_for, nothing_left, tmp_path):
    assert run(helios_home, "push", str(tiny_llama(tmp_path / "models")), NAME).code == 0
    serving = start(helios_home, "serve", NAME, "--prefill", "1", "--decode", "1", "--port", "0", "--logs")
    serving.wait_for("until Ctrl-C", 2 * VLLM_START_S)  # two that start share the cores
    wait_for(lambda: serving.out, what="the URL on standard output")
    (router,) = serving.out
    prefill, decode = re.search(r"vllm-prefill-1 at (\S+), vllm-decode-1 at (\S+) \(", serving.text()).groups()
    wait_for(lambda: warm_pairs(router) == 1, 120, what="the two to have exchanged blocks")
    asked = [(path, stream) for path in ("/v1/chat/completions", "/v1/completions") for stream in (False, True)]
    for number, (path, stream) in enumerate(asked):
        prompt = " ".join(WORDS[number::2][:210] * 2)
        before = sources(decode)
        text, tokens = ask(router, path, prompt, stream)
        after = sources(decode)
        assert tokens > 400
        moved = after["external_kv_transfer"] - before["external_kv_transfer"]
        assert tokens - BLOCK <= moved <= tokens
        assert after["local_compute"] - before["local_compute"] < CHECK
        assert (text, tokens) == ask(prefill, path, prompt, stream), "as one engine alone answers"
    assert any(line.startswith("vllm-prefill-1 | ") for line in serving.err)

    (worker,) = (record.process for _, record in records(helios_home) if record.name == "vllm-prefill-1")
    os.kill(worker.pid, signal.SIGKILL)
    text, _ = ask(router, "/v1/completions", " ".join(WORDS[3:] * 2), stream=False)
    assert text, "the other one computes the prompt itself"
    serving.wait_for("vllm-prefill-1 ended with status 137; it is started again in 1 s")
    serving.process.send_signal(signal.SIGTERM)
    assert serving.wait(120) == 143
    nothing_left(helios_home)
