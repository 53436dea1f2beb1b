"""The top of the tree."""

from __future__ import annotations

from collections.abc import Iterable

from heliosfs.tree.hub import Hub
from heliosfs.tree.nodes import Absent, Directory, Found
from heliosfs.tree.repositories import Kind
from heliosfs.tree.source import Source


class Volumes(Directory):
    """``/.volumes``: what the CSI driver binds; empty until volumes can be made."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(("volumes",))

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        return Absent(f"there is no volume {name!r}")

    async def entries(self, source: Source) -> Iterable[Found]:
        return ()


def root() -> Directory:
    """``/``: models by organisation, and the hidden directories."""
    return Kind("models", [(".datasets", Kind("datasets")), (".hub", Hub()), (".volumes", Volumes())])
