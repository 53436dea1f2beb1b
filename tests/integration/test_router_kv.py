"""KV events over real ZMQ sockets, on both event loops, from publishers that work as vLLM's does; and /tokenize."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from helios.errors import UsageError
from helios.metrics import RouterMetrics
from router.kv import feed as feed_module
from router.kv.feeds import TURN_S, Feeds
from router.kv.holder import PIECE
from router.kv.index import KvIndex
from router.kv.publishers import Publisher
from router.kv.tokens import Prompt, WorkerTokenizer, prompt_of
from router.kv.wire import pack
from tests.support.kv_events import BLOCK, Cache, encode, stored
from tests.support.kv_publisher import serving
from tests.support.loops import WAIT_S, run, until

__all__ = ["run"]


def quickly(feeds: Feeds, now: float) -> None:
    """Look at all deadlines as if it were ``now``."""
    for feed in feeds._feeds.values():
        feed.look(now)


PROMPT = list(range(BLOCK * 6 + 1))


def claim(index: KvIndex, tokens: list[int] = PROMPT) -> int:
    return index.score(pack(tokens), ["w"]).get("w", 0)


def test_what_was_published_before_and_after_joining_is_known(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        cache = Cache()
        feeds = Feeds(KvIndex(), RouterMetrics())
        with serving() as server, feeds.running():
            cache.compute(PROMPT[: BLOCK * 2])
            server.publish(cache.flush())
            feeds.set([server.publisher()])
            await until(lambda: claim(feeds.index) == 2 * BLOCK)
            await until(lambda: feeds.in_step("w"))
            for end in range(3, 7):
                cache.compute(PROMPT[: BLOCK * end])
                server.publish(cache.flush())
            await until(lambda: claim(feeds.index) == cache.longest(PROMPT) == 6 * BLOCK)
            cache.remove(cache.prefixes(PROMPT)[-1])
            server.publish(cache.flush())
            await until(lambda: claim(feeds.index) == cache.longest(PROMPT) == 5 * BLOCK)
            text = feeds.metrics.render().decode()
            assert 'helios_router_kv_events_total{type="stored"} 5.0' in text
            assert "helios_router_kv_blocks 5.0" in text
            assert "helios_router_kv_feeds_in_step 1.0" in text
            feeds.set([])
            assert claim(feeds.index) == 0

    run(main())


def test_a_gap_is_filled_and_the_end_that_was_lost_is_found(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        cache = Cache()
        feeds = Feeds(KvIndex(), RouterMetrics())
        with serving() as server, feeds.running():
            feeds.set([server.publisher()])
            await until(lambda: feeds.in_step("w"))
            for end in range(1, 7):
                cache.compute(PROMPT[: BLOCK * end])
                server.publish(cache.flush(), lost=end in (2, 3))
            await until(lambda: claim(feeds.index) == 6 * BLOCK)
            assert feeds.metrics.kv_gaps._value.get() == 1
            cache.clear()
            server.publish(cache.flush(), lost=True)
            await until(lambda: feeds.in_step("w"))
            quickly(feeds, time.monotonic() + feed_module.AUDIT_S + 1)
            await until(lambda: claim(feeds.index) == 0)

    run(main())


def test_a_worker_that_was_restarted_is_another_one(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        feeds = Feeds(KvIndex(), RouterMetrics())
        with feeds.running():
            with serving() as first:
                cache = Cache()
                feeds.set([first.publisher()])
                cache.compute(PROMPT)
                first.publish(cache.flush())
                await until(lambda: claim(feeds.index) == 6 * BLOCK)
            await until(lambda: not feeds.in_step("w"))
            assert claim(feeds.index) == 6 * BLOCK  # perhaps the connection alone was lost
            with serving(first.port, first.replay_port) as second:
                cache = Cache(seed=2)
                for end in (1, 2):
                    cache.compute([*PROMPT[: BLOCK * end]])
                    second.publish(cache.flush(ts=2.0))
                await until(lambda: claim(feeds.index) == 2 * BLOCK and feeds.in_step("w"))
            await until(lambda: not feeds.in_step("w"))
            quickly(feeds, time.monotonic() + feed_module.ABSENT_S + 1)
            assert claim(feeds.index) == 0

    run(main())


def test_a_replay_that_does_not_answer_is_given_up(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        cache = Cache()
        feeds = Feeds(KvIndex(), RouterMetrics())
        with serving(replays=False) as server, feeds.running():
            feeds.set([server.publisher()])
            await until(lambda: server.asked)
            cache.compute(PROMPT)
            server.publish(cache.flush())
            await asyncio.sleep(0.05)
            assert claim(feeds.index) == 0
            quickly(feeds, time.monotonic() + feed_module.REPLAY_S + 1)
            await until(lambda: claim(feeds.index) == 6 * BLOCK)
            assert feeds.metrics.kv_replays.labels("failed")._value.get() == 1

    run(main())


def test_a_replay_whose_end_is_lost_counts_as_far_as_it_came(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        cache = Cache()
        feeds = Feeds(KvIndex(), RouterMetrics())
        with serving() as server, feeds.running():
            server.ends = False
            cache.compute(PROMPT)
            server.publish(cache.flush())
            feeds.set([server.publisher()])
            await until(lambda: claim(feeds.index) == 6 * BLOCK)
            assert not feeds.in_step("w")
            quickly(feeds, time.monotonic() + feed_module.REPLAY_S + 1)
            await until(lambda: feeds.in_step("w"))
            assert claim(feeds.index) == 6 * BLOCK

    run(main())


def test_what_can_not_be_read_ends_all_claims_and_nothing_else(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        cache = Cache()
        feeds = Feeds(KvIndex(), RouterMetrics())
        with serving() as server, feeds.running():
            feeds.set([server.publisher(replay=False)])
            await until(lambda: feeds.in_step("w"))
            for frames in ([], [bytes(8)], [bytes(7), b"x"], [bytes(8), b"x"], [b"\xff" * 8, b""]):
                cache = Cache()
                cache.compute(PROMPT)
                # A subscription takes a moment to arrive: the first messages may be lost, as with vLLM.
                payload = cache.flush()
                await until(lambda payload=payload: server.publish(payload) or claim(feeds.index) == 6 * BLOCK)
                server.send(b"kv@w", *frames)
                await until(lambda: claim(feeds.index) == 0)
            assert feeds.metrics.kv_skipped.labels("malformed")._value.get() >= 4

    run(main())


def test_many_large_batches_leave_the_loop_to_others(run: Callable[[Any], None]) -> None:
    """By a clock on which each step takes half a turn, 60,000 blocks take more than a hundred turns of the loop."""

    async def main() -> None:
        ticks = iter(range(10**9))
        feeds = Feeds(KvIndex(), RouterMetrics(), lambda: next(ticks) * TURN_S / 2)
        with serving() as server, feeds.running():
            feeds.set([server.publisher()])
            await until(lambda: feeds.in_step("w"))
            prompts = [[number] * (BLOCK * 3000 + 1) for number in range(20)]
            for number, prompt in enumerate(prompts):
                names = range(number * 3000, (number + 1) * 3000)
                server.publish(encode([stored(names, None, prompt[:-1])]))
            turns, held = 0, 0
            while feeds.index.held < 60_000:
                await asyncio.sleep(0)
                turns += feeds.index.held > held
                assert feeds.index.held <= held + 2 * PIECE
                held = feeds.index.held
            assert turns > 100
            assert claim(feeds.index, prompts[7]) == BLOCK * 3000
            feeds.index.forget("w")
            assert claim(feeds.index, prompts[7]) == 0
            feeds.turn()
            await until(lambda: feeds.index.held == 0)

    run(main())


def test_an_endpoint_that_can_not_be_one_is_refused() -> None:
    async def main() -> None:
        feeds = Feeds(KvIndex(), RouterMetrics())
        with feeds.running():
            for endpoint in (
                "",
                "http://h:1",
                "tcp://h",
                "tcp://*:1",
                "tcp://h:x",
                "tcp://h:0",
                "tcp://h:1/x",
                "tcp://:1",
            ):
                for publisher in (Publisher("w", endpoint), Publisher("w", "tcp://127.0.0.1:1", endpoint)):
                    with pytest.raises(UsageError, match="not an endpoint"):
                        feeds.set([publisher])
            feeds.set([Publisher("w", "tcp://no-such-host.invalid:1", "tcp://[::1]:1")])
            assert not feeds.in_step("w")

    asyncio.run(main())


def test_a_salt_goes_with_the_prompt() -> None:
    assert prompt_of("/v1/completions", b'{"prompt": [1], "cache_salt": "s"}') == Prompt(pack([1]), b"", "s")
    assert prompt_of("/v1/completions", b'{"prompt": "x", "cache_salt": null}') == Prompt(b"", b'{"prompt":"x"}')


# --- tokens ----------------------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def tokenizing(answer: Callable[[dict[str, Any]], web.Response], gate: asyncio.Event) -> AsyncIterator[list[Any]]:
    """A worker's /tokenize; what it was asked."""
    asked: list[Any] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(await request.json())
        await gate.wait()
        return answer(asked[-1])

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/tokenize", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    asked.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield asked
    finally:
        gate.set()
        await runner.cleanup()


async def encode_in(tokenizer: WorkerTokenizer, path: str, body: bytes) -> bytes | None:
    """The token ids of a request for the model ``m``."""
    found = prompt_of(path, body)
    assert found is not None
    return await tokenizer.encode("m", found.question)


def count(body: dict[str, Any]) -> web.Response:
    return web.json_response({"count": 3, "max_model_len": 10, "tokens": [len(body), 2, 3], "token_strs": None})


def test_a_worker_is_asked_once_for_a_text(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        gate.set()
        async with tokenizing(count, gate) as asked:
            url = asked.pop()
            tokenizer = WorkerTokenizer(lambda model: url, budget_s=WAIT_S)
            assert await encode_in(tokenizer, CHAT, b'{"messages": []}') is None  # not running
            async with tokenizer.running():
                body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 1, "tools": []}'
                both = await asyncio.gather(encode_in(tokenizer, CHAT, body), encode_in(tokenizer, CHAT, body))
                assert both == [pack([3, 2, 3])] * 2
                assert await encode_in(tokenizer, CHAT, body.replace(b"1", b"0")) == pack([3, 2, 3])
                assert asked == [{"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": []}]
                assert await encode_in(tokenizer, "/v1/completions", b'{"model": "m", "prompt": "x"}') == pack(
                    [2, 2, 3]
                )
                assert len(asked) == 2

    run(main())


def test_nobody_waits_beyond_the_budget_and_the_late_answer_is_kept() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        async with tokenizing(count, gate) as asked:
            url = asked.pop()
            tokenizer = WorkerTokenizer(lambda model: url, budget_s=0.001, most_asked=2)
            async with tokenizer.running():
                bodies = [b'{"prompt": "%d"}' % number for number in range(3)]
                for body in bodies:
                    assert await encode_in(tokenizer, "/v1/completions", body) is None
                await until(lambda: len(asked) == 2)
                gate.set()
                await until(lambda: not tokenizer._asked)
                assert len(asked) == 2  # the third was one too many
                tokenizer._budget_s = 0
                assert await encode_in(tokenizer, "/v1/completions", bodies[0]) == pack([1, 2, 3])
                assert await encode_in(tokenizer, "/v1/completions", bodies[2]) is None

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=404),
        web.Response(text="no JSON"),
        web.json_response({"tokens": [-1]}),
        web.json_response({"tokens": "abc"}),
        web.Response(body=b'{"tokens": [' + b" " * (17 << 20) + b"1]}"),
        web.Response(status=302, headers={"location": "/"}),
    ],
    ids=["status", "text", "negative", "string", "long", "redirect"],
)
def test_other_answers_are_none(answer: web.Response) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        gate.set()
        async with tokenizing(lambda body: answer, gate) as asked:
            url = asked.pop()
            tokenizer = WorkerTokenizer(lambda model: url, budget_s=WAIT_S)
            async with tokenizer.running():
                assert await encode_in(tokenizer, "/v1/completions", b'{"prompt": "x"}') is None
                assert tokenizer._kept_bytes == 0

    asyncio.run(main())


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        gate.set()
        async with tokenizing(count, gate) as asked:
            url = asked.pop()
            tokenizer = WorkerTokenizer(lambda model: url, budget_s=WAIT_S, most_bytes=30)
            async with tokenizer.running():
                for text in ("a", "b", "a", "c", "a", "b"):
                    await encode_in(tokenizer, "/v1/completions", b'{"prompt": "%s"}' % text.encode())
                assert [body["prompt"] for body in asked] == ["a", "b", "c", "b"]
                assert tokenizer._kept_bytes == 24

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "ids"),
    [
        ("/v1/completions", b'{"prompt": [1, 2]}', [1, 2]),
        ("/v1/completions", b'{"prompt": [[1, 2]]}', [1, 2]),
        ("/v1/completions", b'{"prompt": [[1], [2]]}', None),
        ("/v1/completions", b'{"prompt": ["a"]}', None),
        ("/v1/completions", b'{"prompt": "a"}', None),
        ("/v1/completions", b'{"prompt": [-1]}', None),
        ("/v1/completions", b'{"prompt": [1.5]}', None),
        ("/v1/completions", b"{}", None),
        ("/v1/completions", b"[", None),
        ("/inference/v1/generate", b'{"token_ids": [1, 2], "prompt": [3]}', [1, 2]),
        ("/v1/chat/completions", b'{"prompt": [1]}', None),
    ],
)
def test_token_ids_that_a_request_brings_along(path: str, body: bytes, ids: list[int] | None) -> None:
    found = prompt_of(path, body)
    assert (found.tokens if found else b"") == (b"" if ids is None else pack(ids))


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        (CHAT, b'{"messages": [{"content": "hi"}], "stream": true}', b'{"messages":[{"content": "hi"}]}'),
        (CHAT, b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}', None),
        (CHAT, b'{"messages": "say \\"image_url\\"", "model": "m"}', b'{"model":"m","messages":"say \\"image_url\\""}'),
        (CHAT, b'{"prompt": "x"}', None),
        (CHAT, b"[]", None),
        ("/v1/completions", b'{"prompt": "x", "messages": []}', b'{"prompt":"x"}'),
        ("/v1/embeddings", b'{"input": "x"}', None),
        (CHAT, b'{"messages": [], "cache_salt": 7}', None),
    ],
)
def test_what_a_worker_is_asked(path: str, body: bytes, asked: bytes | None) -> None:
    assert prompt_of(path, body) == (None if asked is None else Prompt(question=asked))
