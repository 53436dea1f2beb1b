"""`helios serve --on-demand` with real vLLM: down to nothing when nobody asks, and back for the request that waits."""

import json
import signal
import urllib.request

import pytest

from helios.launch.processes import records
from helios.launch.tiny_model import tiny_llama
from tests.e2e.conftest import VLLM_START_S, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.fuse,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

NAME = "helios/tiny-llama"
BODY = {
    "model": NAME, "messages": [{"role": "user", "content": "Where does the river go?"}], "max_tokens": 8,
    "temperature": 0, "stream": True,
}  # fmt: skip


def ask(url):
    """The comments of a streamed answer and its text."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(BODY).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=VLLM_START_S) as response:
        lines = response.read().decode().splitlines()
    assert lines[-2:].count("data: [DONE]") == 1
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    comments = [line for line in lines if line.startswith(":")]
    return comments, "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_a_model_goes_to_zero_by_the_policy_and_a_request_brings_it_back(
    helios_home, tmp_path, start, wait_for, nothing_left
):
    def workers():
        return [record.name for _, record in records(helios_home) if record.name.startswith("vllm")]

    assert run(helios_home, "push", str(tiny_llama(tmp_path / "models")), NAME, timeout_s=VLLM_START_S).code == 0
    serving = start(helios_home, "serve", "--on-demand", "--idle", "2", "--port", "0")
    serving.wait_for("until Ctrl-C")
    wait_for(lambda: serving.out, what="the URL on standard output")
    (url,) = serving.out
    assert workers() == [], "nobody has asked"

    comments, first = ask(url)
    assert any("waking" in comment for comment in comments), "it was held, and told so"
    assert first
    assert len(workers()) == 1
    why = serving.wait_for("is stopped: no request for", 60)
    assert NAME in why
    wait_for(lambda: not workers(), timeout_s=60, what="the end of vLLM")

    comments, again = ask(url)
    assert any("waking" in comment for comment in comments)
    assert again == first, "the same model answers"
    serving.process.send_signal(signal.SIGINT)
    assert serving.wait() == 130
    nothing_left(helios_home)
