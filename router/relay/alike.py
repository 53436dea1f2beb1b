"""Requests over one connection whose heads are alike: what they have in common is kept, the rest is read from each."""

from __future__ import annotations

import re

from router.relay.headers import Headers
from router.relay.recurring import Recurring
from router.routes import InferenceRoute


class Alike:
    """Requests whose heads are alike: where they go, and the names of their headers. No value of any is kept."""

    __slots__ = ("_names", "like", "route")

    def __init__(self, like: Recurring, route: InferenceRoute, headers: Headers) -> None:
        """``headers``: those of the first."""
        self.like, self.route = like, route
        self._names = [name for name, _ in headers]

    def read(self, match: re.Match[bytes]) -> tuple[bytes, Headers]:
        """The query and the headers of a request whose head matched."""
        query, *values = match.groups()
        return query, list(zip(self._names, values, strict=True))
