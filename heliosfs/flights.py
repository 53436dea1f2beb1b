"""Single flight: callers that ask the same thing at the same time share one answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar, cast

import trio

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class _Flight:
    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.value: tuple[object, ...] = ()
        self.error: Exception | None = None


class Flights(Generic[K]):
    """The first caller of a key does the work in its own task; those that come meanwhile get its answer or its error.

    When the first caller is cancelled one of the others does the work instead. Between "nobody is at it" and "I am at
    it" there is no wait, so no two callers work on one key.
    """

    def __init__(self) -> None:
        self._flights: dict[K, _Flight] = {}

    async def share(self, key: K, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``, done once for all callers of the key that wait now."""
        while (flight := self._flights.get(key)) is not None:
            await flight.done.wait()
            if flight.error is not None:
                try:
                    raise flight.error
                finally:  # an error that its own traceback led to would keep what the frames hold for long
                    del flight
            if flight.value:
                return cast(T, flight.value[0])
        flight = self._flights[key] = _Flight()
        try:
            value = await work()
            flight.value = (value,)
            return value
        except Exception as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.done.set()
            del flight  # as above
