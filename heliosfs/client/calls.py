"""Calls under way of something that may be closed at any time: each with a deadline, all ended by the close."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from helios.errors import DeadlineExceeded, HeliosError
from heliosfs.client.values import Closed

T = TypeVar("T")


class Calls:
    """The calls of one object, named ``name`` in errors. All methods belong to one trio loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._scopes: set[trio.CancelScope] = set()
        self._idle = trio.Event()
        self._idle.set()
        self.closed = False

    def check(self) -> None:
        """Raises Closed."""
        if self.closed:
            raise Closed(f"{self._name} is closed", hint="Open it again; a store is opened by connect().")

    async def run(self, what: str, deadline_s: float | None, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call. Raises DeadlineExceeded after ``deadline_s`` seconds, Closed when it is closed.

        Of a group of errors the first that tells something is raised.
        """
        self.check()
        seconds = float("inf") if deadline_s is None else deadline_s
        with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
            self._scopes.add(scope)
            self._idle = trio.Event() if self._idle.is_set() else self._idle
            try:
                return await call()
            except ExceptionGroup as group:
                raise _telling(group) from group
            finally:
                self._scopes.discard(scope)
                if not self._scopes:
                    self._idle.set()
        self.check()
        raise DeadlineExceeded(f"{self._name}: {what} was not done within {deadline_s:g} s")

    async def close(self) -> None:
        """End the calls under way, which raise Closed; returns when none is left."""
        self.closed = True
        for scope in self._scopes:
            scope.cancel()
        await self._idle.wait()


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery for what helps the block: cancelled when that ends, whose own error leaves as it is, in no group."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:
            failure = error
        finally:
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _telling(group: ExceptionGroup[Exception]) -> Exception:
    """An error of ours if there is one, else the first."""
    errors = list(_leaves(group))
    return next((error for error in errors if isinstance(error, HeliosError)), errors[0])


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
