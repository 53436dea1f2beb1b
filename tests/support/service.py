"""Small HTTP servers on loopback, for what the router asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tests.support.loopback import Asked, Loopback, Said, said


class Service(Protocol):
    """Something that the router asks."""

    url: str

    def answer(self, body: bytes) -> tuple[int, Any]:
        """The status and the document for one question."""
        ...


@contextmanager
def served(service: Service) -> Iterator[None]:
    """``service.url`` is where it answers, while the context lasts."""

    def answer(asked: Asked) -> Said:
        status, document = service.answer(asked.body)
        return said(document, status)

    with Loopback(answer) as server:
        service.url = f"{server.url}/"
        yield
