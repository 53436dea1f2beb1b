"""Threads share malloc's arenas."""

from __future__ import annotations

import subprocess
import sys

import pytest

ARENAS = """
import ctypes, sys, threading
from helios.malloc import few_arenas
if sys.argv[1] == "few":
    few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(12)
def take():
    together.wait(10)
    for _ in range(2000):
        libc.malloc(100)
    together.wait(10)
threads = [threading.Thread(target=take) for _ in range(12)]
for each in threads:
    each.start()
for each in threads:
    each.join()
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, out)
libc.fclose(out)
"""


def arenas(way: str) -> int:
    done = subprocess.run([sys.executable, "-c", ARENAS, way], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_info is glibc's")
def test_many_threads_have_two_arenas_where_that_was_asked_for() -> None:
    assert arenas("few") == 2
    assert arenas("many") > 2, "what is set makes the difference"
