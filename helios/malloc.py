"""How the C library gives memory to a process that lives long and has many threads."""

from __future__ import annotations

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8
"""mallopt(3)'s number for it."""


def few_arenas(count: int = 2) -> None:
    """Let all threads share ``count`` of malloc's arenas; call it before they start.

    glibc makes up to eight for each core. What is freed stays in its arena, so each of them comes to hold what its
    threads once needed at most, and the process grows for hours. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, count)
