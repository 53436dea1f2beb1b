"""What counts of a front's disk that was not there, or not ours, until now. No I/O in here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from heliosfs.store.front.waiting import Item, Op
from heliosfs.store.keys import SEALED

NAMED_KINDS: Final = frozenset({"blobs", "packs", "recipes", "manifests", "xet"})


def weigh(
    found: Collection[str], journal: Mapping[str, Op] | None, missed: Mapping[str, bool], away: bool
) -> tuple[dict[str, Item], set[str]]:
    """What waits from now on, and which objects go from the disk.

    ``found``: what lies there; ``journal``: what waited (None: that is lost); ``missed``: what was done past it
    (missed.py); ``away``: whether more was done past it than that.

    What was only begun past the front nobody relies on, but it may have been done: what waits in the front is done
    again, and what does not wait is taken from the cloud.
    """
    sure = {key for key, done in missed.items() if done}
    gone = sure.copy()
    items: dict[str, Item] = {}
    believed = journal is not None and not away
    for key, op in (journal or {}).items():
        if key in sure:
            continue
        if op is not Op.DELETE and key in found:
            items[key] = Item(op, loaded=True) if believed else _in_doubt(key, away)
        elif op is not Op.PUT and believed:
            # To be removed; or what was to replace it did not get here any more, and was not acknowledged.
            items[key] = Item(Op.DELETE, loaded=True)
            gone.add(key)
    if believed:
        gone |= missed.keys() - items.keys()
    else:
        items |= {key: _in_doubt(key, away) for key in found if key not in items and key not in sure}
    return items, gone.intersection(found)


def _in_doubt(key: str, away: bool) -> Item:
    """What waits, perhaps. Where only the journal is lost the front is right, where it missed something the cloud."""
    if is_named(key):
        return Item(Op.PUT, doubtful=True, loaded=True)
    if away:
        return Item(Op.PUT, doubtful=True, stale=True, loaded=True)
    return Item(Op.REPLACE, doubtful=True, loaded=True)


def is_named(key: str) -> bool:
    """Whether another object never has the same key: it is a hash of the content, or drawn at random."""
    _, kind, rest = key.split("/", 2) if key.count("/") > 1 else (*key.split("/"), "")
    return (rest.partition("/")[0] if kind == SEALED else kind) in NAMED_KINDS
