"""Which request is answered by what: methods and paths, the answers' form, errors. No I/O in here."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import msgspec

from helios.decoding import from_json
from helios.errors import HeliosError, InvalidInput, NotFound

log = logging.getLogger("heliosfs.http")

T = TypeVar("T")

JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Request:
    """``values`` are the parts of the path that the route names; ``body`` is whole and bounded (http.py)."""

    method: str
    path: str
    values: Mapping[str, str]
    body: bytes

    def json(self, kind: type[T]) -> T:
        """The body, read as this type. Raises InvalidInput that says what is wrong with it."""
        try:
            return from_json(self.body, kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"the body is not what {self.method} {self.path} takes: {error}") from None


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Awaitable[Page]]


@dataclass(frozen=True, slots=True)
class Route:
    """``{name}`` in the path stands for one part of it, whatever it is."""

    method: str
    path: str
    handler: Handler


class Routes:
    """Finds the route for a request and makes an answer of whatever comes of it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(route.path.split("/"), route) for route in routes]

    async def answer(self, method: str, target: str, body: bytes) -> Page:
        """The answer; a HEAD request gets that of a GET."""
        path = target.partition("?")[0]
        parts = [unquote(part) for part in path.split("/")]
        matching = [route for pattern, route in self._routes if _matches(pattern, parts)]
        route = next((route for route in matching if route.method == ("GET" if method == "HEAD" else method)), None)
        try:
            if route is None and matching:
                allowed = ", ".join(sorted({found.method for found in matching}))
                error = InvalidInput(f"{path} can't be used with {method}, but with {allowed}")
                return error_page(error, status=405, headers=(("allow", allowed),))
            if route is None:
                raise NotFound(f"there is no {path}: there is {', '.join(sorted({r.path for _, r in self._routes}))}")
            names = route.path.split("/")
            values = {name[1:-1]: part for name, part in zip(names, parts, strict=True) if name.startswith("{")}
            return await route.handler(Request(method, path, values, body))
        except HeliosError as error:
            return error_page(error)
        except Exception:
            log.exception("a request failed", extra={"method": method, "path": path})
            return error_page(HeliosError("it failed; the log says why"))


def page(make: Callable[[], Page]) -> Handler:
    """A handler that needs nothing of the request and never waits."""

    async def handle(request: Request) -> Page:
        return make()

    return handle


def json_page(value: Any, status: int = 200) -> Page:
    """An answer in JSON."""
    return Page(msgspec.json.encode(value) + b"\n", JSON, status)


def error_page(error: HeliosError, status: int | None = None, headers: tuple[tuple[str, str], ...] = ()) -> Page:
    """``{"error": {"code", "message", "hint"}}``, as every API of Helios has it."""
    described = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    return Page(msgspec.json.encode(described) + b"\n", JSON, status or error.status, headers)


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(
        name == part or (name.startswith("{") and part) for name, part in zip(pattern, parts, strict=True)
    )
