"""Who reads over HTTP, and telling the recorder."""

from __future__ import annotations

import re
from typing import Final, Protocol

from starlette.types import Scope

from registry.usage.recorder import Recorder

HEADER: Final = b"x-helios-node"
"""In which whoever reads may say what it is called."""
LOCAL: Final = "local"
"""A client over the unix socket."""

_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}\Z")


class Told(Protocol):
    """Hears of each file, or range of one, that was sent: ``reads`` is 1 where it began at the file's first byte."""

    def __call__(self, scope: Scope, repo: str, commit: str, *, reads: int, count: int) -> None: ...


def nobody(scope: Scope, repo: str, commit: str, *, reads: int, count: int) -> None:
    """Nobody wants to know."""


def telling(recorder: Recorder) -> Told:
    """Tells the recorder."""

    def told(scope: Scope, repo: str, commit: str, *, reads: int, count: int) -> None:
        recorder.read(repo, commit, node_of(scope), reads=reads, count=count)

    return told


def node_of(scope: Scope) -> str:
    """What the sender of a request is called: as it says itself, else its address."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if _NAME.match(text := headers.get(HEADER, b"").decode("latin-1")):
        return text
    client = scope.get("client")
    return str(client[0]) if client and client[0] else LOCAL


def is_name(text: str) -> bool:
    """Whether a node may be called so: 1 to 128 printable ASCII characters without spaces."""
    return _NAME.match(text) is not None
