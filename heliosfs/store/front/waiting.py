"""What the cloud has to be told yet, in a journal that survives a crash.

    ROOT/.waiting       "helios-waiting 1\\n", then lines (lines.py)

The last line of a key counts: ``+`` it is to be uploaded, ``=`` the same, after what the cloud has of that name was
removed, ``-`` it is to be removed there, ``.`` nothing is left to do. A line is on the disk before the write that it
stands for is acknowledged, and ``.`` before anything follows a removal: to upload a thing again is harmless. Where the
journal is damaged every object of the directory is taken for one that the cloud may lack (``doubtful``), which a
comparison of lists settles.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from heliosfs.store.front.lines import Damaged, Lines, decode

HEAD: Final = b"helios-waiting 1\n"
NAME: Final = ".waiting"
SLACK: Final = 1000
"""The journal is written anew when so many lines, and most of all, say nothing any more."""


class Op(Enum):
    PUT = "+"
    REPLACE = "="
    DELETE = "-"


DONE: Final = "."
OPS: Final = frozenset({DONE, *(op.value for op in Op)})


@dataclass(slots=True, eq=False)
class Item:
    """Something that waits. ``doubtful``: whether it is needed at all is not known; ``stale``: the cloud may have
    something newer under this key, which counts; ``loaded``: it waited on the disk already when that came."""

    op: Op
    doubtful: bool = False
    stale: bool = False
    loaded: bool = False
    failures: int = 0
    not_before: float = 0.0
    why: str = ""


def parse(data: bytes) -> dict[str, Op]:
    """What waits according to a journal, in the order in which it came. Raises Damaged."""
    out: dict[str, Op] = {}
    for op, key in decode(data, HEAD, OPS):
        out.pop(key, None)
        if op != DONE:
            out[key] = Op(op)
    return out


class Waiting:
    """The journal of one directory, and in memory what it says. Not locked: the caller's affair. Raises OSError."""

    def __init__(self, root: Path) -> None:
        self._lines = Lines(root / NAME)
        self.items: dict[str, Item] = {}
        """In the order in which they came."""

    def load(self) -> dict[str, Op] | None:
        """What is written there; None where that is damaged or missing, and nothing is known."""
        try:
            return parse(self._lines.path.read_bytes())
        except (FileNotFoundError, Damaged):
            return None

    def begin(self) -> None:
        """Write the journal anew from memory, and go on with that."""
        self._lines.begin(HEAD, ((item.op.value, key) for key, item in self.items.items()))

    def add(self, key: str, op: Op) -> Item:
        """Something has to be done; it is on the disk on return. What waited for the key is superseded."""
        self._append(op.value, key, lasting=True)
        self.items.pop(key, None)
        item = self.items[key] = Item(op)
        return item

    def done(self, key: str) -> None:
        """Nothing has to be done any more. What the disk does not take (OSError) waits in memory, too."""
        item = self.items.get(key)
        if item is not None:
            # What was removed may be written again past this journal, and must not be removed once more.
            self._append(DONE, key, lasting=item.op is not Op.PUT)
            del self.items[key]
            if self._lines.count > SLACK + 2 * len(self.items):
                self.begin()

    def close(self) -> None:
        self._lines.close()

    def _append(self, op: str, key: str, *, lasting: bool) -> None:
        if not self._lines.begun:
            self.begin()
        self._lines.append(op, key, lasting=lasting)
