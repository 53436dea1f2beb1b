"""Repair of a replicated store: what is missing or wrong in one directory comes from another, in a thread of its own.

Objects are checked against what their key says (selfcheck.py). One whose copies are each damaged in a place of their
own is put together from all of them (patches.py). A directory that was behind gets what it missed and
loses what was removed meanwhile, for as long as some directory never was behind; else nothing is removed.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterable, Sequence
from typing import Final

from helios.errors import HeliosError, IntegrityError
from heliosfs.store.copies import Copies, Copy
from heliosfs.store.patches import Patches
from heliosfs.store.selfcheck import check_content

log = logging.getLogger("helios.store")

LOOK_S: Final = 5.0
"""How soon a directory that failed is tried again, in seconds..."""
LONGEST_S: Final = 600.0
"""...and how often at least, where that changes nothing."""


CLOSE_S: Final = 30.0


class Mender:
    """Repairs ``copies`` until ``close``; ``lock`` is held while a repaired copy gets its name."""

    def __init__(self, copies: Copies, lock: threading.Lock, patches: Patches) -> None:
        self._copies, self._lock, self._patches = copies, lock, patches
        self._over = False
        self._thread = threading.Thread(target=self._run, name="replicas", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End; returns when the object under way is done."""
        self._over = True
        self._copies.wake.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        pause_s = LOOK_S
        while not self._over:
            self._copies.wake.clear()
            before = self._waiting()
            for copy in self._copies.all:
                try:
                    if copy.behind:
                        self._catch_up(copy)
                    elif copy.why:
                        self._copies.works(copy)
                    if copy.wrong:
                        self._mend(copy, list(copy.wrong))
                except (HeliosError, OSError) as error:
                    self._copies.say(copy, str(error))
            after = self._waiting()
            pause_s = min(pause_s * 2, LONGEST_S) if after == before else LOOK_S
            self._copies.wake.wait(pause_s if after else None)

    def _waiting(self) -> Sequence[object]:
        """What there is to do: empty when nothing is."""
        return [(c.root, c.behind, c.why, len(c.wrong)) for c in self._copies.all if c.behind or c.why or c.wrong]

    def _catch_up(self, copy: Copy) -> None:
        """Bring a directory that is behind to what the whole ones hold."""
        if not self._copies.works(copy):
            return
        missed = copy.missed
        listed = [(other, found) for other, found in self._copies.listed("") if other is not copy]
        whole = [other for other, _ in listed if not other.behind]
        wanted = {info.key: info.size for _, found in listed for info in found}
        assert copy.store is not None
        have = {info.key: info.size for info in copy.store.list("")}
        for key in have.keys() - wanted.keys() if whole else ():
            with self._lock:
                if not any(_has(other, key) for other in whole):
                    copy.store.delete(key)
        self._mend(copy, [key for key, size in wanted.items() if have.get(key) != size])
        with self._copies.record:
            if copy.wrong or copy.missed != missed or not whole:
                return
            root = str(copy.root)
            self._copies.membership.behind = [each for each in self._copies.membership.behind if each != root]
            self._copies.membership.members += [] if root in self._copies.membership.members else [root]
            self._copies.write_down()
            copy.behind = False
        log.info("a directory of the store is whole again", extra={"directory": root})

    def _mend(self, copy: Copy, keys: Iterable[str]) -> None:
        """Copy over what is missing or wrong in a directory; what can't be stays in ``wrong``."""
        keys = sorted(keys)
        copy.wrong.update(keys)
        for key in keys:
            if self._over or copy.store is None:
                return
            sources = [
                other for other in self._copies.all if other is not copy and other.store and key not in other.wrong
            ]
            for source in sources:
                if self._copy_over(key, source, copy):
                    copy.wrong.discard(key)
                    break
            else:
                if self._copy_over(key, copy, copy):
                    copy.wrong.discard(key)
                elif not any(_has(other, key) for other in self._copies.all if other.store):
                    copy.wrong.discard(key)  # it was removed meanwhile
            if not any(key in other.wrong for other in self._copies.all):
                self._patches.forget(key)

    def _copy_over(self, key: str, source: Copy, target: Copy) -> bool:
        assert source.store is not None
        assert target.store is not None
        temporary = target.store.staging() / f"repair-{threading.get_ident()}"
        try:
            shutil.copyfile(source.root / key, temporary)
            if source is target and not self._patches.apply(key, temporary):
                return False
            check_content(key, temporary)
            with self._lock:
                if not _has(source, key):
                    return False
                target.store.replace(key, temporary)
        except FileNotFoundError:
            return False
        except IntegrityError as error:
            log.error("a copy is damaged", extra={"object": key, "directory": str(source.root), "reason": str(error)})
            source.wrong.add(key)
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        log.info("an object was repaired", extra={"object": key, "directory": str(target.root)})
        return True


def _has(copy: Copy, key: str) -> bool:
    return (copy.root / key).is_file()
