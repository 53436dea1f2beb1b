"""What moves between a faster and a slower tier: decisions about two policies. No I/O in here.

A blob goes *up* when it was used enough lately and the faster tier's policy takes it in, which is to say: pushes out
nothing of more worth for it. It goes *down* instead of away when the slower tier's policy takes it in. Both ask
``Policy.ask`` of the tier that gets it; here is only what deserves the question. A file that takes no room, because
the object store beside has it too, never moves, nor does one that is not whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from heliosfs.tiers.policy import Policy, Priority

PROMOTE_USES: Final = 1.5
"""Uses, decayed, that make a blob of class ``normal`` one for the faster tier: the second within a day, about."""

RECENT: Final = 64
"""Of the blobs used last, so many are considered for going up."""


def upward(fast: Policy, slow: Policy) -> Iterator[str]:
    """Blobs of the slower tier that deserve the faster one, the one used last first."""
    history = fast.history
    for key in islice(reversed(history.uses), RECENT):
        entry = slow.entries.get(key)
        if entry is None or not entry.whole or not entry.cost or entry.leaving or key in fast.entries:
            continue
        priority = slow.priority(key)
        if priority >= Priority.CRITICAL or (priority > Priority.SCRATCH and history.recent(key) >= PROMOTE_USES):
            yield key


def downward(key: str, fast: Policy, slow: Policy) -> bool:
    """Whether a blob that leaves the faster tier is worth a place in the slower one.

    One that nobody ever used is not, nor what is said to be of no account.
    """
    entry = fast.entries.get(key)
    return (
        entry is not None
        and entry.whole
        and entry.cost > 0
        and key not in slow.entries
        and key in fast.history.uses
        and fast.priority(key) > Priority.SCRATCH
    )


def doubles(fast: Policy, slow: Policy) -> tuple[list[str], list[str]]:
    """Of blobs that both tiers have and nobody holds: what is too much in the faster one, what in the slower one."""
    both = fast.entries.keys() & slow.entries.keys()
    free = sorted(
        key
        for key in both
        if not (fast.holds(key) or slow.holds(key) or fast.entries[key].leaving or slow.entries[key].leaving)
    )
    worse = [key for key in free if slow.entries[key].whole and not fast.entries[key].whole]
    return worse, [key for key in free if key not in worse]
