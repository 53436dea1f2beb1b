"""A whole file that has another size than a manifest gives its blob, or was made by another recipe: is it the blob?

A manifest only claims size and recipe, so nothing that is right may be removed on its word; and a file was only ever
compared with the recipe that it was made by, which may have been a liar's. Its sha256 is what all of them mean. Calls
block, for as long as hashing takes; any thread may make them.
"""

from __future__ import annotations

import errno
import logging
import os

from heliosfs.tiers.examine import Examination, load_sums
from heliosfs.tiers.places import Places, save_sums, unlink

log = logging.getLogger("heliosfs.tiers")


def settle(places: Places, sha256: str) -> bool:
    """Remove the whole file of the blob, which is in use, if it is not that; returns whether it is there and right.

    Raises OSError.
    """
    path = places.whole_path(sha256)
    try:
        if places.proved(sha256, os.stat(path, follow_symlinks=False).st_ino) or _is(places, sha256):
            return True
    except FileNotFoundError:
        return False
    log.warning(
        "a cached file does not have the sha256 that it is named by: it was made by a manifest that lies, or damaged; "
        "it is removed",
        extra={"path": path},
    )
    os.unlink(path)
    unlink(places.sums_path(sha256))
    places.went(sha256)
    return False


def _is(places: Places, sha256: str) -> bool:
    """Whether the file has its sha256. Sums for the scrubber are made by the way, where there are none."""
    examination = Examination(places.whole_path(sha256), sha256, None, strong=True)
    try:
        while examination.step():
            pass
    finally:
        examination.close()
    if examination.unreadable:
        raise OSError(errno.EIO, examination.reason)
    if examination.fresh is None:
        return False
    if load_sums(places.sums_path(sha256), sha256) is None:
        save_sums(places.sums_path(sha256), examination.fresh)
    places.prove(sha256, examination.inode)
    return True
