"""What was done in the cloud while the front's disk could not be told, in a list on the registry's own disk.

    MISSED              "helios-missed 1 <id of the front>\\n", then lines (lines.py)

``?`` something is about to be done with the key: what lies in the front and is not waiting there may be out of date.
``!`` it is done: the cloud is right about the key, and neither what the front has nor what waits there for it counts.
That lasts until the disk knows, whatever follows. So a line ``?`` is on the disk before the cloud is touched, and
``!`` before anybody hears that it worked; of what nobody heard of, what was acknowledged before remains right.

The list is bounded. Where it can't be relied on (``lost``), everything in the front is compared with the cloud.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from heliosfs.store.front.lines import Damaged, Lines, decode
from heliosfs.store.syscalls import sync_directory

log = logging.getLogger("helios.store")

BEGUN: Final = "?"
SURE: Final = "!"

MAX_KEYS: Final = 100_000
MAX_BYTES: Final = 32 << 20
"""Most keys, and bytes of their lines, that are remembered of what one disk missed."""


def head(id_: str) -> bytes:
    return f"helios-missed 1 {id_}\n".encode("ascii")


def parse(data: bytes, id_: str) -> dict[str, bool]:
    """Keys, and whether the cloud is right about them; none if the list is about another front. Raises Damaged."""
    first = data.partition(b"\n")[0] + b"\n"
    if not first.startswith(head("")[:-1]):
        raise Damaged("it has no head")
    out: dict[str, bool] = {}
    for op, key in decode(data, first, (BEGUN, SURE)):
        out[key] = op == SURE or out.get(key, False)
    return out if first == head(id_) else {}


class Missed:
    """The list, on the disk and in memory. Not locked: the caller's affair."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._id = ""
        self.keys: dict[str, bool] = {}
        """Keys, and whether the cloud is right about them."""
        self.lost = False
        """Whether something was missed of which nothing is written here."""

    @property
    def path(self) -> Path:
        return self._lines.path

    def __bool__(self) -> bool:
        return bool(self.keys) or self.lost

    def of(self, id_: str) -> None:
        """Be the list of this front from now on: what is written about it, or else an empty one."""
        if id_ == self._id:
            return
        self.close()
        self._id, self.keys, self.lost = id_, {}, False
        try:
            self.keys = parse(self.path.read_bytes(), id_)
        except FileNotFoundError:
            pass
        except (OSError, Damaged) as error:
            self.lost = True
            log.warning(
                "what the front store missed can't be read",
                extra={"list": str(self.path), "reason": str(error)},
            )

    def note(self, key: str, *, sure: bool) -> bool:
        """Write down what the disk does not know. It is on the disk on return, or OSError is raised and nothing has
        changed; False where there is no room for it, and the list is ``lost``."""
        known = self.keys.get(key)
        if known is not None and (known or not sure):
            return True
        if self.lost or (known is None and len(self.keys) >= MAX_KEYS) or self._lines.size >= MAX_BYTES:
            self.lost = True
            return False
        if not self._lines.begun:
            self._lines.begin(head(self._id), ((SURE if done else BEGUN, each) for each, done in self.keys.items()))
        self._lines.append(SURE if sure else BEGUN, key, lasting=True)
        self.keys[key] = sure
        return True

    def clear(self) -> None:
        """The disk knows everything. Durable on return, since what comes next on the disk must not meet an old list;
        raises OSError, and then the list is what it was."""
        self._lines.close()
        self.path.unlink(missing_ok=True)
        sync_directory(self.path.parent)
        self.keys, self.lost = {}, False

    def close(self) -> None:
        self._lines.close()
