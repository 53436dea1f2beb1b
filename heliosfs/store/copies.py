"""The directories of a replicated store: which of them work, who lacks something, and who remembers that.

Threads share it. A directory that is *behind* missed a write or is not joined yet; those that are whole have that
written down (members.py) before the write counts.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helios.errors import HeliosError, IntegrityError, Unavailable
from heliosfs.store import members
from heliosfs.store.directory import FULL, DirectoryStore
from heliosfs.store.objects import ObjectInfo

log = logging.getLogger("helios.store")


@dataclass(eq=False)
class Copy:
    """One directory. ``store`` is None while it can't be used; ``missed`` counts what it did not get."""

    root: Path
    store: DirectoryStore | None = None
    behind: bool = False
    missed: int = 0
    why: str = ""
    wrong: set[str] = field(default_factory=set)
    """Keys whose copy here is missing or damaged, to be repaired. Single calls change it: they need no lock."""


class Copies:
    """All directories of one store, in the order they were named."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raises what opening a directory raises when none of those that are whole can be opened."""
        self.all = [Copy(root.absolute()) for root in roots]
        if len({copy.root.resolve() for copy in self.all}) < len(self.all):
            raise IntegrityError("registry.replicas names a directory twice: copies need places of their own")
        self.record = threading.Lock()
        """Held while it changes who is behind."""
        self.wake = threading.Event()
        """Set when there may be something to repair."""
        try:
            self.membership = members.gather([copy.root for copy in self.all])
        except OSError as error:
            raise Unavailable(f"{self.describe()}: {error}") from error
        for copy in self.all:
            joined = str(copy.root) in self.membership.members
            copy.behind = not joined or str(copy.root) in self.membership.behind
            self.open(copy)
        if all(copy.store and copy.behind for copy in self.all):
            # Each missed something while another one was away: together they have everything, and some too much.
            log.warning("no directory of the store is whole; what each of them has counts")
            self.membership.behind.clear()
            for copy in self.all:
                copy.behind = False
            self.tidy()
        if not any(copy.store for copy in self.all if not copy.behind):
            whys = "; ".join(self.problems())
            self.close()
            raise Unavailable(
                f"no directory of the object store that is whole can be used: {whys}",
                hint="Mount what is missing; take what is lost for good out of registry.store and registry.replicas.",
            )
        with contextlib.suppress(OSError):
            self.write_down()

    def describe(self) -> str:
        return f"directories {', '.join(str(copy.root) for copy in self.all)}"

    def problems(self) -> Sequence[str]:
        """Directories that lack something now, and why."""
        return [
            f"{copy.root}: {copy.why or ('objects are being repaired' if copy.wrong else 'it is behind')}"
            for copy in self.all
            if copy.behind or copy.why or copy.wrong
        ]

    def tidy(self) -> int:
        """Compare the lists of all directories; what one lacks is repaired soon."""
        listed = self.listed("")
        union = {info.key for _, found in listed for info in found}
        count = 0
        for copy, found in listed:
            lacking = union.difference(info.key for info in found)
            copy.wrong |= lacking
            count += len(lacking)
        self.wake.set()
        return count

    def listed(self, prefix: str) -> Sequence[tuple[Copy, Sequence[ObjectInfo]]]:
        """What lies in each directory that is whole, or, where none is, in those that are not."""
        out: Sequence[tuple[Copy, Sequence[ObjectInfo]]] = ()
        for behind in (False, True):
            for copy in self.all:
                if copy.behind == behind and copy.store is not None:
                    try:
                        out = [*out, (copy, [*copy.store.list(prefix)])]
                    except Unavailable as error:
                        self.failed(copy, error)
            if out:
                return out
        raise Unavailable(f"{self.describe()}: none can be listed")

    def whole_first(self) -> Sequence[Copy]:
        """Those that are behind come last."""
        return sorted(self.all, key=lambda copy: copy.behind)

    def open(self, copy: Copy) -> bool:
        """Use the directory, or say why not."""
        try:
            if str(copy.root) in self.membership.members:
                members.check_member(copy.root, self.membership)
            opened = DirectoryStore(copy.root)
        except (HeliosError, OSError) as error:
            self.say(copy, str(error))
            copy.behind = True
            return False
        before, copy.store, copy.why = copy.store, opened, ""
        if before is not None:
            with contextlib.suppress(OSError):  # what it had in staging is gone with its disk
                before.close()
        return True

    def works(self, copy: Copy) -> bool:
        """Whether it can be written again; a disk that came back is opened anew."""
        if copy.store is not None and self.takes(copy):
            copy.why = ""
            return True
        return self.open(copy)

    def takes(self, copy: Copy) -> bool:
        """Whether a file can be written there. One that refuses is let go, so that its disk can be unmounted."""
        assert copy.store is not None
        try:
            probe = copy.store.staging() / f"probe-{threading.get_ident()}"
            probe.write_bytes(b"?")
            probe.unlink()
        except OSError as error:
            self.say(copy, str(error))
            if error.errno not in FULL:
                with contextlib.suppress(OSError):
                    copy.store.close()  # objects can still be read, where the disk gives them
            return False
        except HeliosError as error:
            self.say(copy, str(error))
            return False
        return True

    def failed(self, copy: Copy, error: HeliosError) -> None:
        """Reading failed, so that others were asked: it may work for the next one."""
        self.say(copy, str(error))
        self.wake.set()

    def lags(self, copy: Copy, error: HeliosError) -> None:
        """It missed something. Others remember that before anybody relies on what was written."""
        self.say(copy, str(error))
        with self.record:
            copy.missed += 1
            if not copy.behind:
                copy.behind = True
                log.warning("a directory of the store lags behind", extra={"directory": str(copy.root)})
            if str(copy.root) not in self.membership.behind:
                self.membership.behind.append(str(copy.root))
                try:
                    self.write_down()
                except OSError as problem:
                    self.membership.behind.remove(str(copy.root))
                    raise Unavailable(f"{self.describe()}: who is behind can't be written down: {problem}") from problem
        self.wake.set()

    def say(self, copy: Copy, why: str) -> None:
        """Remember what a directory fails with; it is logged once, until it works again."""
        why = why.partition("\n")[0]
        if why and not copy.why:
            log.warning("a directory of the store fails", extra={"directory": str(copy.root), "reason": why})
        copy.why = why or copy.why

    def write_down(self) -> None:
        """Raises OSError unless some directory that is whole took it; those behind may."""
        failure: OSError | None = None
        done = False
        for copy in self.all:
            if copy.store is None:
                continue
            try:
                members.write(copy.root, self.membership)
                done = done or not copy.behind
            except OSError as error:
                failure = error
        if not done:
            raise failure or OSError("no directory that is whole can be written")

    def close(self) -> None:
        """Close every directory."""
        for copy in self.all:
            store, copy.store = copy.store, None
            if store is not None:
                with contextlib.suppress(OSError):  # its disk is away
                    store.close()
