"""The loops that tests run on: a test that fails says so, whatever it leaves open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loops import WAIT_S

PROGRAM = """
import asyncio
import uvloop
from tests.support.loops import run_on

async def main():
    await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    {then}

run_on(uvloop.new_event_loop, main())
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [("raise KeyError('broken')", "KeyError: 'broken'"), ("pass", "ResourceWarning: unclosed resource")],
)
def test_what_is_left_open_is_said_and_not_waited_for(then: str, said: str) -> None:
    """As a process: what goes wrong here is a wait for ever in C, which no signal ends."""
    program = [sys.executable, "-W", "error", "-c", PROGRAM.format(then=then)]
    root = Path(__file__).parents[3]
    done = subprocess.run(program, cwd=root, timeout=3 * WAIT_S, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
