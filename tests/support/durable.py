"""A disk that fails: every step by which this process changes files below a directory is numbered, and may be its last.

``Shim`` stands in for the functions of ``os`` that change a disk. It logs the steps in the order they were made, can
make any of them fail, or end the process before or after it. ``crashes`` says what the disk may hold when the power
fails: what was synced, and any part of what was not, as in T. Pillai et al., "All File Systems Are Not Created Equal",
OSDI 2014. A file's data lasts from fsync or fdatasync of the file on, its name from fsync of its directory on; without
them writes are lost, torn, or leave zeros, and names come and go one by one, in any order.

What C code writes (SQLite) passes it by.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITABLE = os.O_WRONLY | os.O_RDWR
CALLS = (
    "open", "close", "dup2", "write", "pwrite", "ftruncate", "fchmod", "fsync", "fdatasync",
    "rename", "replace", "link", "unlink", "mkdir",
)  # fmt: skip
"""The functions of os that are stood in for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call. ``name`` is the path below the root; ``other`` a second one (rename, link), or bytes, or a number."""

    number: int
    call: str
    name: str
    file: int = 0
    """Which open file of the log it was made on."""
    offset: int = 0
    other: Any = None

    def __str__(self) -> str:
        return f"{self.number}: {self.call} {self.name}"


class Shim:
    """Used as a context manager. ``before`` may raise OSError or end the process; so may ``after``, when it is done.

    A number that ``before`` returns is how many bytes a write takes.
    """

    def __init__(
        self,
        root: Path,
        before: Callable[[Step], int | None] = lambda step: None,
        after: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self._root = f"{root}/"
        self.before, self.after = before, after
        self.log: list[Step] = []
        self._lock = threading.RLock()
        self._files: dict[int, tuple[int, str]] = {}
        self._opened = 0
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> Shim:
        for name in self._real:
            setattr(os, name, getattr(self, name))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, call in self._real.items():
            setattr(os, name, call)

    def mark(self, what: str, name: str, value: object = None) -> None:
        """Put something into the log that is no step: what is promised from here on."""
        with self._lock:
            self.log.append(Step(len(self.log), f"#{what}", name, other=value))

    # --- the functions of os ---

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self._below(path)
        if name is None:
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)  # type: ignore[no-any-return]
        with self._lock:
            call = "open"
            if flags & os.O_CREAT and not os.path.lexists(path):
                call = "create"
            elif flags & os.O_TRUNC and os.stat(path).st_size:
                call = "empty"
            self._opened += 1
            number = self._opened

            def do() -> int:
                fd: int = self._real["open"](path, flags, mode)
                self._files[fd] = number, name
                return fd

            if call == "open" and not flags & WRITABLE:
                self._enter(call, name, number)
                return do()
            return self._step(call, name, do, number)

    def close(self, fd: int) -> None:
        with self._lock:
            self._files.pop(fd, None)
            self._real["close"](fd)

    def dup2(self, fd: int, fd2: int, inheritable: bool = True) -> int:
        with self._lock:
            if fd in self._files:
                self._files[fd2] = self._files[fd]
            return self._real["dup2"](fd, fd2, inheritable)  # type: ignore[no-any-return]

    def write(self, fd: int, data: Any) -> int:
        return self._written("write", fd, data, lambda part: self._real["write"](fd, part))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self._written("pwrite", fd, data, lambda part: self._real["pwrite"](fd, part, offset), offset)

    def ftruncate(self, fd: int, length: int) -> None:
        self._on_file("truncate", fd, lambda: self._real["ftruncate"](fd, length), length)

    def fchmod(self, fd: int, mode: int) -> None:
        self._on_file("chmod", fd, lambda: self._real["fchmod"](fd, mode), mode)

    def fsync(self, fd: int) -> None:
        self._on_file("sync", fd, lambda: self._real["fsync"](fd))

    def fdatasync(self, fd: int) -> None:
        self._on_file("sync", fd, lambda: self._real["fdatasync"](fd))

    def rename(self, source: Any, target: Any) -> None:
        self._on_name("rename", source, lambda: self._real["rename"](source, target), target)

    def replace(self, source: Any, target: Any) -> None:
        self._on_name("rename", source, lambda: self._real["replace"](source, target), target)

    def link(self, source: Any, target: Any, *, follow_symlinks: bool = True) -> None:
        def do() -> None:
            self._real["link"](source, target, follow_symlinks=follow_symlinks)

        self._on_name("link", target, do, Path(source))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._on_name("unlink", path, lambda: self._real["unlink"](path, dir_fd=dir_fd))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._on_name("mkdir", path, lambda: self._real["mkdir"](path, mode, dir_fd=dir_fd))

    # --- inside ---

    def _below(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        text = f"{os.path.abspath(os.fsdecode(path))}/"
        return text.removeprefix(self._root).rstrip("/") if text.startswith(self._root) else None

    def _enter(self, call: str, name: str, file: int = 0, offset: int = 0, other: object = None) -> Step:
        self.log.append(step := Step(len(self.log), call, name, file, offset, other))
        return step

    def _step(
        self, call: str, name: str, do: Callable[[], Any], file: int = 0, offset: int = 0, other: object = None
    ) -> Any:
        """``do`` it and log it; what fails by itself is no step."""
        self.before(Step(len(self.log), call, name, file, offset, other))
        result = do()
        self.after(self._enter(call, name, file, offset, other))
        return result

    def _on_file(self, call: str, fd: int, do: Callable[[], Any], other: object = None) -> None:
        with self._lock:
            known = self._files.get(fd)
            if known is None:
                do()
            else:
                self._step(call, known[1], do, known[0], other=other)

    def _on_name(self, call: str, path: Any, do: Callable[[], Any], target: Any = None) -> None:
        name = self._below(path)
        if name is None:
            do()
            return
        with self._lock:
            other = Path(target).read_bytes() if call == "link" else self._below(target) if call == "rename" else None
            if call == "mkdir" and os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            if call == "unlink" and not os.path.lexists(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            self._step(call, name, do, other=other)

    def _written(self, call: str, fd: int, data: Any, do: Callable[[Any], int], offset: int = -1) -> int:
        with self._lock:
            known = self._files.get(fd)
            if known is None:
                return do(data)
            view = memoryview(data)
            at = os.fstat(fd).st_size if offset < 0 else offset  # all that is written without an offset is appended
            limit = self.before(Step(len(self.log), call, known[1], known[0], at, bytes(view)))
            count = do(view if limit is None else view[:limit])
            self.after(self._enter(call, known[1], known[0], at, bytes(view[:count])))
            return count


# --- what a power cut leaves -----------------------------------------------------------------------------------------


Content = tuple[bytearray, int] | None
State = dict[str, Content]


@dataclass(slots=True, eq=False)
class _Node:
    """A file's durable content and mode and the changes of it that were not synced; a directory has neither."""

    data: bytearray | None = field(default_factory=bytearray)
    mode: int = 0o600
    pending: list[Step] = field(default_factory=list)


@dataclass(slots=True)
class _Change:
    """A change of names that was not synced yet."""

    call: str
    name: str
    other: str | None
    node: _Node | None

    @property
    def directories(self) -> set[str]:
        return {os.path.dirname(name) for name in (self.name, self.other) if name is not None}


class Disk:
    """What a disk holds for certain, and what was asked of it since."""

    def __init__(self) -> None:
        self._root = _Node(None)
        self._now: dict[str, _Node] = {}
        self._last: dict[str, _Node] = {}
        self._changes: list[_Change] = []
        self._open: dict[int, _Node] = {}
        self._names: dict[int, str] = {}

    def take(self, step: Step) -> None:
        """One more step of a log."""
        if step.call in ("create", "empty", "open"):
            if step.call == "create":
                self._change("create", step.name, None, _Node())
            node = self._now.get(step.name) if step.name else self._root
            if node is None:
                return  # it was there before the log
            self._open[step.file], self._names[step.file] = node, step.name
            if step.call == "empty":
                node.pending.append(Step(step.number, "truncate", step.name, other=0))
        elif step.call in ("write", "pwrite", "truncate", "chmod"):
            self._open[step.file].pending.append(step)
        elif step.call == "sync":
            self._sync(step)
        elif step.call == "rename":
            self._change("rename", step.name, step.other, self._now[step.name])
        elif step.call == "link":
            self._change(
                "create", step.name, None, _Node(bytearray(step.other), 0o444)
            )  # the other name is nobody's business
        elif step.call == "unlink":
            self._change("unlink", step.name, None, None)
        elif step.call == "mkdir":
            self._change("create", step.name, None, _Node(None))

    def _sync(self, step: Step) -> None:
        node = self._open[step.file]
        if node.data is not None:
            node.data, node.mode = _applied(node, lambda _: "whole")
            node.pending = []
            return
        there = self._names[step.file]
        for change in [change for change in self._changes if there in change.directories]:
            self._changes.remove(change)
            _apply(self._last, change)

    def _change(self, call: str, name: str, other: str | None, node: _Node | None) -> None:
        change = _Change(call, name, other, node)
        _apply(self._now, change)
        self._changes.append(change)

    def crash(self, names: Callable[[], bool], writes: Callable[[], str]) -> State:
        """A state that a power cut can leave: path -> content and mode, None for a directory.

        ``names`` says whether a change of a name lasted, ``writes`` what became of a write: ``whole``, ``lost``,
        ``torn`` or ``zeros``.
        """
        last = dict(self._last)
        for change in self._changes:
            if names():
                _apply(last, change)
        contents: dict[int, Content] = {}
        found: State = {}
        for name, node in sorted(last.items()):
            parent = os.path.dirname(name)
            if parent and parent not in found:
                continue  # a directory that did not last takes all below it with it
            if id(node) not in contents:
                contents[id(node)] = None if node.data is None else _applied(node, lambda _: writes())
            found[name] = contents[id(node)]
        return found


def _apply(names: dict[str, _Node], change: _Change) -> None:
    if change.call == "unlink":
        names.pop(change.name, None)
        return
    assert change.node is not None
    if change.call == "create":
        names[change.name] = change.node
        return
    assert change.other is not None
    names.pop(change.name, None)
    names[change.other] = change.node


def _applied(node: _Node, fate: Callable[[Step], str]) -> tuple[bytearray, int]:
    assert node.data is not None
    data, mode = bytearray(node.data), node.mode
    for step in node.pending:
        what = fate(step)
        if what == "lost":
            continue
        if step.call == "chmod":
            mode = step.other
            continue
        if step.call == "truncate":
            size = step.other
            data = data[:size] + b"\0" * (size - len(data))
            continue
        part = bytes(step.other)
        if what == "torn":
            part = part[: len(part) // 2]
        elif what == "zeros":
            part = bytes(len(part))
        if len(data) < step.offset:
            data += bytes(step.offset - len(data))
        data[step.offset : step.offset + len(part)] = part
    return data, mode


FATES = ("whole", "lost", "torn", "zeros")


def crashes(log: list[Step], rng: random.Random, tries: int = 6) -> Iterator[tuple[int, State]]:
    """Of each moment of a log: states that a power cut then can leave, each once between
    two marks. Yields (steps made, state)."""
    disk, seen = Disk(), set()
    for done, step in enumerate(log, 1):
        if step.call.startswith("#"):
            seen.clear()  # more is promised of the same state
            continue
        disk.take(step)
        states = [
            disk.crash(lambda: False, lambda: "lost"),
            disk.crash(lambda: True, lambda: "whole"),
            disk.crash(lambda: True, lambda: "lost"),
            disk.crash(lambda: True, lambda: "zeros"),
            disk.crash(lambda: False, lambda: "whole"),
        ]
        for _ in range(tries):
            share = rng.random()
            states.append(disk.crash(lambda share=share: rng.random() < share, lambda: rng.choice(FATES)))  # type: ignore[misc]
        for state in states:
            digest = _digest(state)
            if digest not in seen:
                seen.add(digest)
                yield done, state


def _digest(state: State) -> bytes:
    whole = hashlib.sha256()
    for name, content in sorted(state.items()):
        data, mode = content or (b"", 0)
        whole.update(f"{name}\0{len(data)}\0{mode}\0".encode() + data)
    return whole.digest()


def put(state: State, root: Path) -> None:
    """Make the files of a state below ``root``, which is empty."""
    for name, content in sorted(state.items()):
        path = root / name
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content[0])
            path.chmod(content[1])
