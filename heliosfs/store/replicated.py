"""The directory engine, several times: every object in each of N directories, best on disks of their own.

A write is acknowledged when every directory that works has it; one that does not is written down as *behind* first
(members.py), and told of in the log. A read takes the first directory that has the object, those behind last. Bytes
that turn out to be wrong are compared in all directories (``heal``): copies that are wrong are read last.

One thread repairs: objects that are missing or wrong in a directory come from another one, checked against what their
key says (selfcheck.py); a directory that was behind gets what it missed and loses what was removed meanwhile, for as
long as some directory never was behind; else nothing is removed. A disk that hangs, rather than fails, is not
recognised.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from heliosfs.store import members
from heliosfs.store.directory import FULL, DirectoryStore
from heliosfs.store.objects import Good, ObjectInfo
from heliosfs.store.selfcheck import check_content

log = logging.getLogger("helios.store")

LOOK_S: Final = 5.0
"""How soon a directory that failed is tried again, in seconds..."""
LONGEST_S: Final = 600.0
"""...and how often at least, where that changes nothing."""

CLOSE_S: Final = 30.0

T = TypeVar("T")


@dataclass(eq=False)
class _Copy:
    """One directory. ``store`` is None while it can't be used; ``missed`` counts what it did not get."""

    root: Path
    store: DirectoryStore | None = None
    behind: bool = False
    missed: int = 0
    why: str = ""
    wrong: set[str] = field(default_factory=set)
    """Keys whose copy here is missing or damaged, to be repaired. Single calls change it: they need no lock."""


class ReplicatedStore:
    """An ``ObjectStore`` in several directories. Threads share it; close it when done."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raises what opening a directory raises when none of those that are whole can be opened."""
        self._copies = [_Copy(root.absolute()) for root in roots]
        if len({copy.root.resolve() for copy in self._copies}) < len(self._copies):
            raise IntegrityError("registry.replicas names a directory twice: copies need places of their own")
        self._lock = threading.Lock()
        """Held while an object is removed everywhere, or a repaired copy gets its name: neither slips by the other."""
        self._record = threading.Lock()
        """Held while it changes who is behind."""
        self._over = False
        self._wake = threading.Event()
        try:
            self._membership = members.gather([copy.root for copy in self._copies])
        except OSError as error:
            raise Unavailable(f"{self.describe()}: {error}") from error
        for copy in self._copies:
            joined = str(copy.root) in self._membership.members
            copy.behind = not joined or str(copy.root) in self._membership.behind
            self._open(copy)
        if all(copy.store and copy.behind for copy in self._copies):
            # Each missed something while another one was away: together they have everything, and some too much.
            log.warning("no directory of the store is whole; what each of them has counts")
            self._membership.behind.clear()
            for copy in self._copies:
                copy.behind = False
            self.tidy()
        if not any(copy.store for copy in self._copies if not copy.behind):
            whys = "; ".join(self.problems())
            self._close_all()
            raise Unavailable(
                f"no directory of the object store that is whole can be used: {whys}",
                hint="Mount what is missing; take what is lost for good out of registry.store and registry.replicas.",
            )
        with contextlib.suppress(OSError):
            self._write_down()
        self._thread = threading.Thread(target=self._repair_all, name="replicas", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over = True
        self._wake.set()
        self._thread.join(CLOSE_S)
        self._close_all()

    def __enter__(self) -> ReplicatedStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- what an ObjectStore does ---

    def describe(self) -> str:
        return f"directories {', '.join(str(copy.root) for copy in self._copies)}"

    def problems(self) -> Sequence[str]:
        """Directories that lack something now, and why."""
        return [
            f"{copy.root}: {copy.why or ('objects are being repaired' if copy.wrong else 'it is behind')}"
            for copy in self._copies
            if copy.behind or copy.why or copy.wrong
        ]

    @property
    def local(self) -> Path:
        return next((copy.root for copy in self._copies if copy.store and not copy.behind), self._copies[0].root)

    def staging(self) -> Path:
        """In the directory with the most room, of those that take anything now."""
        if self._over:
            raise Unavailable(f"{self.describe()}: the store is closed")
        for copy in sorted(self._copies, key=lambda copy: (copy.behind, -_room(copy.root))):
            if copy.store is not None and self._takes(copy):
                return copy.store.staging()
        raise Unavailable(f"{self.describe()}: none takes anything now: {'; '.join(self.problems())}")

    def put_file(self, key: str, path: Path) -> None:
        """Store copies of a finished file, and remove it."""

        def put(store: DirectoryStore) -> None:
            if store.staging() != path.parent:
                store.put_file(key, path, keep=True)
                return
            twin = store.staging() / secrets.token_hex(8)  # the others still need the file
            os.link(path, twin)
            try:
                store.put_file(key, twin)
            finally:
                twin.unlink(missing_ok=True)

        try:
            self._everywhere(key, put)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{path} can't be stored: {error}") from error

    def put_bytes(self, key: str, data: bytes) -> None:
        self._everywhere(key, lambda store: store.put_bytes(key, data))

    def delete(self, key: str) -> None:
        with self._lock:
            self._everywhere(key, lambda store: store.delete(key))
            for copy in self._copies:
                copy.wrong.discard(key)

    def info(self, key: str) -> ObjectInfo:
        return self._first(key, lambda store: store.info(key))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self._first(key, lambda store: store.read_into(key, offset, buffer))

    def open_local(self, key: str) -> BinaryIO | None:
        return self._first(key, lambda store: store.open_local(key))

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> None:
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        last = ""
        for info in heapq.merge(*(found for _, found in self._listed(prefix)), key=lambda info: info.key):
            if info.key != last:
                last = info.key
                yield info

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        found, wrong = False, []
        for copy in self._whole_first():
            buffer = memoryview(bytearray(length))
            try:
                if copy.store is None:
                    continue
                copy.store.read_into(key, offset, buffer)
            except (IntegrityError, NotFound):
                wrong.append(copy)
            except Unavailable as problem:
                self._failed(copy, problem)
            else:
                if good(buffer):
                    found = True
                    copy.wrong.discard(key)
                else:
                    wrong.append(copy)
        for copy in wrong if found else ():
            copy.wrong.add(key)
            log.error("a copy is damaged; it is replaced", extra={"object": key, "directory": str(copy.root)})
        self._wake.set()
        return found

    def check(self) -> None:
        self.staging().stat()

    def tidy(self) -> int:
        """Compare the lists of all directories; what one lacks is repaired soon."""
        listed = self._listed("")
        union = {info.key for _, found in listed for info in found}
        count = 0
        for copy, found in listed:
            lacking = union.difference(info.key for info in found)
            copy.wrong |= lacking
            count += len(lacking)
        self._wake.set()
        return count

    # --- writing and reading in several places ---

    def _everywhere(self, key: str, act: Callable[[DirectoryStore], None]) -> None:
        """Do it in each directory; one that fails is written down as behind before this returns.

        Raises the first failure where no directory that is whole could do it, or what all agree on.
        """
        failures: list[tuple[_Copy, HeliosError]] = []
        done = False
        for copy in self._whole_first():
            try:
                if copy.store is None:
                    raise Unavailable(f"{copy.root} can't be used: {copy.why}")
                act(copy.store)
                done = done or not copy.behind
            except IntegrityError as error:
                if not done and not copy.behind:
                    raise
                copy.wrong.add(key)
                failures.append((copy, error))
            except HeliosError as error:
                failures.append((copy, error))
        if not done:
            raise next((problem for copy, problem in failures if not copy.behind), failures[0][1])
        for copy, problem in failures:
            self._lags(copy, problem)

    def _first(self, key: str, act: Callable[[DirectoryStore], T]) -> T:
        missing: list[_Copy] = []
        damaged: IntegrityError | None = None
        absent: NotFound | None = None  # what a directory says that is whole, and should have it
        # A copy that is partly damaged is still better than none: whoever reads checks what it gets.
        for copy in sorted(self._whole_first(), key=lambda copy: key in copy.wrong):
            if copy.store is None:
                continue
            if copy.behind and absent is not None:
                break  # it may still have what was removed
            try:
                found = act(copy.store)
            except NotFound as error:
                missing.append(copy)
                if not copy.behind and key not in copy.wrong:
                    absent = error
            except IntegrityError as error:
                copy.wrong.add(key)
                damaged = error
            except Unavailable as error:
                self._failed(copy, error)
            else:
                for other in missing:
                    other.wrong.add(key)
                if missing:
                    self._wake.set()
                return found
        failure = damaged or absent
        if failure is not None:
            raise failure
        raise Unavailable(f"no copy of the object {key} is in a directory of {self.describe()} that works now")

    def _listed(self, prefix: str) -> Sequence[tuple[_Copy, Sequence[ObjectInfo]]]:
        """What lies in each directory that is whole, or, where none is, in those that are not."""
        out: Sequence[tuple[_Copy, Sequence[ObjectInfo]]] = ()
        for behind in (False, True):
            for copy in self._copies:
                if copy.behind == behind and copy.store is not None:
                    try:
                        out = [*out, (copy, [*copy.store.list(prefix)])]
                    except Unavailable as error:
                        self._failed(copy, error)
            if out:
                return out
        raise Unavailable(f"{self.describe()}: none can be listed")

    def _whole_first(self) -> Sequence[_Copy]:
        return sorted(self._copies, key=lambda copy: copy.behind)

    # --- directories that fail, and come back ---

    def _open(self, copy: _Copy) -> bool:
        """Use the directory, or say why not."""
        try:
            if str(copy.root) in self._membership.members:
                members.check_member(copy.root, self._membership)
            opened = DirectoryStore(copy.root)
        except (HeliosError, OSError) as error:
            self._say(copy, str(error))
            copy.behind = True
            return False
        before, copy.store, copy.why = copy.store, opened, ""
        if before is not None:
            with contextlib.suppress(OSError):  # what it had in staging is gone with its disk
                before.close()
        return True

    def _works(self, copy: _Copy) -> bool:
        """Whether it can be written again; a disk that came back is opened anew."""
        if copy.store is not None and self._takes(copy):
            copy.why = ""
            return True
        return self._open(copy)

    def _takes(self, copy: _Copy) -> bool:
        """Whether a file can be written there. One that refuses is let go, so that its disk can be unmounted."""
        assert copy.store is not None
        try:
            probe = copy.store.staging() / f"probe-{threading.get_ident()}"
            probe.write_bytes(b"?")
            probe.unlink()
        except OSError as error:
            self._say(copy, str(error))
            if error.errno not in FULL:
                with contextlib.suppress(OSError):
                    copy.store.close()  # objects can still be read, where the disk gives them
            return False
        except HeliosError as error:
            self._say(copy, str(error))
            return False
        return True

    def _failed(self, copy: _Copy, error: HeliosError) -> None:
        """Reading failed, so that others were asked: it may work for the next one."""
        self._say(copy, str(error))
        self._wake.set()

    def _lags(self, copy: _Copy, error: HeliosError) -> None:
        """It missed something. Others remember that before anybody relies on what was written."""
        self._say(copy, str(error))
        with self._record:
            copy.missed += 1
            if not copy.behind:
                copy.behind = True
                log.warning("a directory of the store lags behind", extra={"directory": str(copy.root)})
            if str(copy.root) not in self._membership.behind:
                self._membership.behind.append(str(copy.root))
                try:
                    self._write_down()
                except OSError as problem:
                    self._membership.behind.remove(str(copy.root))
                    raise Unavailable(f"{self.describe()}: who is behind can't be written down: {problem}") from problem
        self._wake.set()

    def _say(self, copy: _Copy, why: str) -> None:
        """Remember what a directory fails with; it is logged once, until it works again."""
        why = why.partition("\n")[0]
        if why and not copy.why:
            log.warning("a directory of the store fails", extra={"directory": str(copy.root), "reason": why})
        copy.why = why or copy.why

    def _write_down(self) -> None:
        """Raises OSError unless some directory that is whole took it; those behind may."""
        failure: OSError | None = None
        done = False
        for copy in self._copies:
            if copy.store is None:
                continue
            try:
                members.write(copy.root, self._membership)
                done = done or not copy.behind
            except OSError as error:
                failure = error
        if not done:
            raise failure or OSError("no directory that is whole can be written")

    def _close_all(self) -> None:
        for copy in self._copies:
            store, copy.store = copy.store, None
            if store is not None:
                with contextlib.suppress(OSError):  # its disk is away
                    store.close()

    # --- repair ---

    def _repair_all(self) -> None:
        pause_s = LOOK_S
        while not self._over:
            self._wake.clear()
            before = self._waiting()
            for copy in self._copies:
                try:
                    if copy.behind:
                        self._catch_up(copy)
                    elif copy.why:
                        self._works(copy)
                    if copy.wrong:
                        self._mend(copy, list(copy.wrong))
                except (HeliosError, OSError) as error:
                    self._say(copy, str(error))
            after = self._waiting()
            pause_s = min(pause_s * 2, LONGEST_S) if after == before else LOOK_S
            self._wake.wait(pause_s if after else None)

    def _waiting(self) -> Sequence[object]:
        """What there is to do: empty when nothing is."""
        return [(c.root, c.behind, c.why, len(c.wrong)) for c in self._copies if c.behind or c.why or c.wrong]

    def _catch_up(self, copy: _Copy) -> None:
        """Bring a directory that is behind to what the whole ones hold."""
        if not self._works(copy):
            return
        missed = copy.missed
        listed = [(other, found) for other, found in self._listed("") if other is not copy]
        whole = [other for other, _ in listed if not other.behind]
        wanted = {info.key: info.size for _, found in listed for info in found}
        assert copy.store is not None
        have = {info.key: info.size for info in copy.store.list("")}
        for key in have.keys() - wanted.keys() if whole else ():
            with self._lock:
                if not any(_has(other, key) for other in whole):
                    copy.store.delete(key)
        self._mend(copy, [key for key, size in wanted.items() if have.get(key) != size])
        with self._record:
            if copy.wrong or copy.missed != missed or not whole:
                return
            root = str(copy.root)
            self._membership.behind = [each for each in self._membership.behind if each != root]
            self._membership.members += [] if root in self._membership.members else [root]
            self._write_down()
            copy.behind = False
        log.info("a directory of the store is whole again", extra={"directory": root})

    def _mend(self, copy: _Copy, keys: Iterable[str]) -> None:
        """Copy over what is missing or wrong in a directory; what can't be stays in ``wrong``."""
        keys = sorted(keys)
        copy.wrong.update(keys)
        for key in keys:
            if self._over or copy.store is None:
                return
            sources = [other for other in self._copies if other is not copy and other.store and key not in other.wrong]
            for source in sources:
                if self._copy_over(key, source, copy):
                    copy.wrong.discard(key)
                    break
            else:
                if not any(_has(other, key) for other in self._copies if other.store):
                    copy.wrong.discard(key)  # it was removed meanwhile

    def _copy_over(self, key: str, source: _Copy, target: _Copy) -> bool:
        assert source.store is not None
        assert target.store is not None
        temporary = target.store.staging() / f"repair-{threading.get_ident()}"
        try:
            shutil.copyfile(source.root / key, temporary)
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


def _room(root: Path) -> int:
    try:
        space = os.statvfs(root)
    except OSError:
        return -1
    return space.f_bavail * space.f_frsize


def _has(copy: _Copy, key: str) -> bool:
    return (copy.root / key).is_file()
