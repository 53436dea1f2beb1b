"""What is under way at a worker: the requests dispatched to it whose answers have not ended, their tokens, and those of
prompts that have to be computed before an answer's first byte.

The router counts these itself, at dispatch, on every path, because a worker's own metrics come too late: a hundred
requests may be sent to the worker that was idle a second ago.
"""

from __future__ import annotations

from typing import Protocol


class Load(Protocol):
    """The load of one worker, over all processes of the router. Every ``begin`` has one ``end``, of the same tokens."""

    @property
    def requests(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def prefill(self) -> int: ...

    def begin(self, tokens: int) -> None: ...

    def end(self, tokens: int) -> None: ...

    def wait(self, prefill: int) -> None:
        """So many tokens of prompts more have to be computed; less, where it is negative."""
        ...


class LocalLoad:
    """The ``Load`` of a router that is one process."""

    __slots__ = ("prefill", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = self.tokens = self.prefill = 0

    def begin(self, tokens: int) -> None:
        self.requests += 1
        self.tokens += tokens

    def end(self, tokens: int) -> None:
        self.requests -= 1
        self.tokens -= tokens

    def wait(self, prefill: int) -> None:
        self.prefill += prefill
