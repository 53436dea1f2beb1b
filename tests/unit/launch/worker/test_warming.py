"""A start counts once a request has been answered; phases of starts; keys."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from helios.errors import Unavailable
from helios.launch.phases import FIRST
from helios.launch.worker.phases import PhaseTimes
from helios.launch.worker.warming import WarmStart, key_of, request


class Start:
    """A start that is healthy when it is told to be."""

    healthy = closed = False
    doing = "loading weights"

    def look(self, show):
        return self.healthy

    def ended(self, status):
        return Unavailable(f"ended with {status}")

    def late(self, timeout_s):
        return Unavailable(f"late after {timeout_s:g} s")

    def close(self):
        self.closed = True


@pytest.fixture
def engine():
    """A server that answers POST with what is in ``answers``, the last again and again; ``asked`` are its requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.asked.append((self.path, body, self.headers.get("authorization")))
            status, document = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], [(200, {"choices": [{"text": "x"}]})]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def start(engine, **options):
    notes = []
    inner = Start()
    url = f"http://127.0.0.1:{engine.server_port}"
    warm = WarmStart(inner, url, request("org/name", options.pop("task", "chat"), options.pop("key", "")), notes.append)
    return inner, warm, notes


def ignore(text): ...


def test_it_is_ready_only_after_an_answer(engine, wait_for):
    inner, warm, notes = start(engine)
    assert not warm.look(ignore)
    assert warm.doing == "loading weights"
    assert engine.asked == [], "nobody is asked before it is healthy"
    inner.healthy = True
    assert not warm.look(ignore)
    assert warm.doing == "warming up"
    wait_for(lambda: warm.look(ignore), what="the answer")
    ((path, body, key),) = engine.asked
    assert (path, body["max_tokens"], body["model"], key) == ("/v1/chat/completions", 1, "org/name", None)
    warm.close()
    assert inner.closed
    assert notes == []


def test_a_request_that_fails_is_said_once_and_sent_again(engine, wait_for):
    engine.answers = [(500, {"error": "no kernel"}), (500, {"error": "no kernel"}), (200, {"choices": [1]})]
    inner, warm, notes = start(engine)
    inner.healthy = True
    wait_for(lambda: warm.look(ignore) or "fails" in warm.doing, what="a failure")
    assert warm.doing == 'the warm-up request fails: /v1/chat/completions answered 500: {"error": "no kernel"}'
    assert "answers /health, but no request after 9 s" in str(warm.late(9.0))
    assert "no kernel" in str(warm.late(9.0))
    wait_for(lambda: warm.look(ignore), what="the answer")
    assert len(engine.asked) == 3
    assert len(notes) == 1
    warm.close()


@pytest.mark.parametrize("answer", [{}, {"choices": []}, [], "x", {"error": "x"}])
def test_an_answer_without_a_result_is_none(engine, wait_for, answer):
    engine.answers = [(200, answer)]
    inner, warm, _ = start(engine)
    inner.healthy = True
    wait_for(lambda: warm.look(ignore) or "fails" in warm.doing, what="the answer")
    assert "fails" in warm.doing
    warm.close()


def test_an_embedding_model_and_one_with_a_key_are_asked_their_way(engine, wait_for):
    engine.answers = [(200, {"data": [{"embedding": [0.0]}]})]
    inner, warm, _ = start(engine, task="embedding", key="secret")
    inner.healthy = True
    wait_for(lambda: warm.look(ignore), what="the answer")
    ((path, body, key),) = engine.asked
    assert (path, key, "max_tokens" in body) == ("/v1/embeddings", "Bearer secret", False)
    warm.close()


def test_without_a_request_health_is_enough(engine):
    inner = Start()
    warm = WarmStart(inner, "http://127.0.0.1:9", None, ignore)
    inner.healthy = True
    assert warm.look(ignore)
    warm.close()


def test_closing_ends_a_request_that_hangs(engine, wait_for):
    blocked = threading.Event()
    engine.RequestHandlerClass.do_POST = lambda self: blocked.wait(60)
    inner, warm, notes = start(engine)
    inner.healthy = True
    wait_for(lambda: warm.look(ignore) or warm._thread is not None, what="the request")
    closing = threading.Thread(target=warm.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert notes == []
    blocked.set()


@pytest.mark.parametrize(
    ("arguments", "environ", "key"),
    [
        ([], {}, ""),
        ([], {"VLLM_API_KEY": "e"}, "e"),
        (["--api-key", "a"], {"VLLM_API_KEY": "e"}, "a"),
        (["--api_key=b"], {}, "b"),
        (["--api-key"], {}, ""),
    ],
)
def test_the_key_is_vllms(arguments, environ, key):
    assert key_of(arguments, environ) == key


def test_phases_add_up():
    times = PhaseTimes(100.0)
    times.entered("loading weights: shard 1 of 2", 110.0)
    times.entered("loading weights: shard 2 of 2", 115.0)
    times.entered("warming up", 120.0)
    times.entered("starting the API server", 121.0)
    times.entered("warming up", 124.0)
    seconds = times.ended(130.0)
    assert seconds == {FIRST: 10.0, "loading weights": 10.0, "warming up": 7.0, "starting the API server": 3.0}
    assert sum(seconds.values()) == times.total(130.0)
