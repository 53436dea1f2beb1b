"""One call of the Hub API, as its handlers get it, and reading what a call says: queries and bodies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request

from helios.decoding import from_json
from helios.errors import InvalidInput, RepoNotFound
from helios.names import KINDS, RepoId
from registry.access import Access
from registry.body import collect
from registry.hub.paths import HubCall

T = TypeVar("T")

MAX_BODY: Final = 8 << 20
"""Longest JSON body or form in bytes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, the readings of its path that its caller may ask for, and what the caller may do."""

    request: Request
    readings: Sequence[HubCall]
    access: Access

    @property
    def call(self) -> HubCall:
        """The likeliest reading."""
        return self.readings[0]

    @property
    def repo(self) -> RepoId:
        """The likeliest reading's repository. Raises RepoNotFound for a name that none can have."""
        return repo_of(self.call)

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query_params

    def all(self, name: str) -> list[str]:
        """All values of a list in the query: repeated, with or without ``[]`` behind the name, or with commas."""
        found = self.request.query_params
        values = [*found.getlist(name), *found.getlist(f"{name}[]")]
        return [part for value in values for part in value.split(",") if part]

    async def body(self, limit: int = MAX_BODY) -> bytes:
        """The request's body. Raises InvalidInput for one that is longer than ``limit`` bytes."""
        return await collect(self.request.stream(), limit)

    async def json(self, kind: type[T]) -> T:
        """The JSON body as ``kind``, other keys left aside: newer clients send more. Raises InvalidInput."""
        try:
            return from_json(await self.body(), kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"the body of this {self.call.verb} call is wrong: {error}") from None


Handler = Callable[[Asked], Awaitable[Any]]
"""Answers a call with an ASGI response."""

Handlers = Mapping[str, Mapping[str, Handler]]
"""By verb and method; HEAD is GET's."""


def repo_of(call: HubCall) -> RepoId:
    """The reading's repository; names and kinds that can't be held are not found rather than wrong."""
    if call.kind not in KINDS:
        raise RepoNotFound(f"the registry holds no {call.kind}, only {' and '.join(KINDS)}")
    try:
        return RepoId.parse(call.id, call.kind)
    except InvalidInput as error:
        raise RepoNotFound(error.message) from None


def flag(text: str | None) -> bool:
    return (text or "").lower() in ("true", "1", "yes")


def number(text: str | None, name: str, default: int, least: int, most: int) -> int:
    """A number in the query, cut to the most allowed."""
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise InvalidInput(f"{name}={text[:40]!r} is not a number from {least} on")
    return min(int(text), most)
