"""Limits that routers share, in a real Redis: the same decisions as in one process, and what happens without it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from helios.config import SharedLimitSettings
from helios.errors import UsageError
from router.admission.buckets import Charge, Keeper, LocalLimits
from router.admission.redis_buckets import PAUSE_S, SCRIPT, RedisLimits
from router.errors import ApiError
from tests.support.redis import Server, redis_server

__all__ = ["redis_server"]


def names() -> list[str]:
    return [f"{{helios-limits}}:tokens:{secrets.token_hex(4)}" for _ in range(3)]


def test_the_script_decides_as_one_process_does(redis_server: Server) -> None:
    """The same asks, at the server's own times: the same answers."""
    rng = random.Random(7)
    buckets = names()
    at, began = [0.0], 0.0
    local = LocalLimits(lambda: at[0])
    with contextlib.closing(redis.Redis(unix_socket_path=str(redis_server.socket))) as client:
        run = client.register_script(SCRIPT)
        refused = 0
        for _ in range(600):
            chosen = rng.sample(range(3), rng.randint(1, 3))
            limits = [60_000.0 * (1 + i) for i in range(3)]
            asks = [Charge(buckets[i], "tokens", limits[i], rng.uniform(0, 2500)) for i in chosen]
            how = rng.choice(["take", "take", "settle"])
            if how == "settle":
                asks = [Charge(a.name, a.unit, a.limit, rng.uniform(-1500, 2500)) for a in asks]
            numbers = [x for a in asks for x in (repr(a.limit), repr(a.amount))]
            now, which, wait = run(keys=[a.name for a in asks], args=[how, *numbers])
            began = began or float(now)
            at[0] = float(now) - began
            if how == "settle":
                local.settle(asks)
                continue
            refusal = local.try_take(asks)
            assert (which == 0) == (refusal is None)
            if refusal is not None:
                refused += 1
                assert refusal.charge is asks[which - 1]
                assert float(wait) == pytest.approx(refusal.wait_s, abs=1e-6)
        assert 20 < refused < 380
        assert all(0 < client.pttl(name) <= 200_000 for name in buckets)


Told = tuple[ApiError | None, Keeper]


async def take(limits: RedisLimits, *charges: Charge) -> Told:
    told: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
    limits.take(charges, lambda error, keeper: told.set_result((error, keeper)))
    return await asyncio.wait_for(told, 10)


def limited(
    server: Server, act: Callable[[RedisLimits, RedisLimits, list[float]], Awaitable[None]], **settings: Any
) -> None:
    """Two routers with one clock of their own."""
    clock = [100.0]
    ours = SharedLimitSettings(url=server.url, **{"timeout_s": 5.0, **settings})

    async def main() -> None:
        pair = [RedisLimits(ours, LocalLimits(lambda: clock[0]), lambda: clock[0]) for _ in range(2)]
        tasks = [asyncio.create_task(one.run()) for one in pair]
        try:
            await act(pair[0], pair[1], clock)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_two_routers_share_a_limit(redis_server: Server) -> None:
    name = secrets.token_hex(4)

    async def act(one: RedisLimits, other: RedisLimits, clock: list[float]) -> None:
        ask = Charge(f"the tenant {name}", "requests", 4.0, 1.0)
        told = await asyncio.gather(*(take(limits, ask) for limits in (one, other) * 4))
        assert sorted(error is None for error, _ in told) == [False] * 4 + [True] * 4
        refused = next(error for error, _ in told if error is not None)
        assert refused.status == 429
        assert 13 <= (refused.retry_after_s or 0) <= 15
        told[0][1].settle([Charge(ask.name, ask.unit, ask.limit, -1.0)])
        assert (await take(one, ask))[0] is None
        assert (await take(other, ask))[0] is not None

    limited(redis_server, act)


@pytest.mark.parametrize("how", ["open", "closed"])
def test_without_the_server(redis_server: Server, how: str) -> None:
    """Open: each router keeps the limit for itself; closed: 503. When it is back, it counts again."""
    ask = Charge(f"the tenant {secrets.token_hex(4)}", "requests", 2.0, 1.0)

    async def act(one: RedisLimits, other: RedisLimits, clock: list[float]) -> None:
        assert (await take(one, ask))[0] is None
        redis_server.stop()
        try:
            errors = [(await take(one, ask))[0] for _ in range(3)]
            assert one.away
            if how == "open":
                assert [error and error.status for error in errors] == [None, None, 429]
            else:
                assert [error and error.code for error in errors] == ["limits_unavailable"] * 3
        finally:
            redis_server.start()
        clock[0] += PAUSE_S
        assert (await take(one, ask))[0] is None  # a new server, which knows neither buckets nor the script
        assert not one.away
        assert (await take(other, ask))[0] is None
        assert (await take(one, ask))[0] is not None

    limited(redis_server, act, when_away=how)


def test_a_server_that_hangs_holds_nobody_up_for_long(redis_server: Server) -> None:
    ask = Charge(f"the tenant {secrets.token_hex(4)}", "requests", 500.0, 1.0)

    async def act(one: RedisLimits, other: RedisLimits, clock: list[float]) -> None:
        assert (await take(one, ask))[0] is None
        redis_server.freeze(True)
        try:
            told = await asyncio.gather(*(take(one, ask) for _ in range(400)))  # more than one batch, one deadline
            assert all(error is None for error, _ in told)
            assert all(keeper is not one for _, keeper in told)
            told_at_once: list[object] = []
            one.take([ask], lambda error, keeper: told_at_once.append(error))
            assert told_at_once == [None]
        finally:
            redis_server.freeze(False)
        clock[0] += PAUSE_S
        assert (await take(one, ask))[1] is one

    limited(redis_server, act, timeout_s=0.2)


def test_who_waits_is_told_when_the_router_stops(redis_server: Server) -> None:
    ask = Charge(f"the tenant {secrets.token_hex(4)}", "requests", 5.0, 1.0)
    told: list[ApiError | None] = []

    async def act(one: RedisLimits, other: RedisLimits, clock: list[float]) -> None:
        one.take([ask], lambda error, keeper: told.append(error))
        await asyncio.sleep(0)

    limited(redis_server, act)
    assert told == [None]


@pytest.mark.parametrize("change", [{"url": "http://h"}, {"url": "redis://h:port"}, {"timeout_s": 0.0}])
def test_settings_that_are_wrong(change: dict[str, Any]) -> None:
    settings = SharedLimitSettings(**{"url": "redis://h", **change})
    with pytest.raises(UsageError, match=r"router\.admission\.shared"):
        RedisLimits(settings, LocalLimits(lambda: 0.0), lambda: 0.0)
