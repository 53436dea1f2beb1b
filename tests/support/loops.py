"""Tests of what runs on an event loop: on asyncio's own and on uvloop, with nothing waited for without a deadline."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

WAIT_S = 20.0


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Runs a coroutine on either loop."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else None
    return lambda main: run_on(factory, main)


def run_on(factory: Callable[[], asyncio.AbstractEventLoop] | None, main: Coroutine[Any, Any, None]) -> None:
    """Run it on a loop of its own. What it leaves open is a warning after its end, if it ends well.

    Where warnings are errors, as in our tests, uvloop's ``close`` would wait for ever for what a failed test left open:
    it warns of each handle before it closes it, from a callback that can't raise, and so leaves that handle alone.
    """
    runner = asyncio.Runner(loop_factory=factory)
    try:
        runner.run(main)
    finally:
        with warnings.catch_warnings(record=True) as left:
            warnings.simplefilter("always")
            runner.close()
    for warning in left:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


async def until(condition: Callable[[], object]) -> None:
    """Wait until it is so, up to ``WAIT_S`` seconds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.003)
