"""Workers from a TOML file, which is looked at again and again.

```toml
[[workers]]
model = "org/name"
url = "http://10.0.0.5:8000"
```
with the keys of ``router.workers``; an unknown key makes the file wrong, and a wrong file changes nothing: the set of
the last right one stays. The file is read at each look rather than only when its times have changed, since a second
change within one tick of the clock keeps them. A change counts once two looks in a row saw the same: half of a file
that is being written may well be right TOML. Replacing it (``mv``, or a ConfigMap's way) needs no such care.
"""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path
from typing import Final

import msgspec

from helios.config import Section, WorkerSettings
from helios.decoding import converted
from helios.errors import UsageError
from router.discovery.source import Found, Teller, checked_all

MAX_FILE: Final = 4 << 20
"""Longest file that is read, in bytes."""
READ_S: Final = 5.0
"""A look that takes longer counts as failed, in seconds: the file may lie on a network disk."""


class _Document(Section, frozen=True):
    workers: list[WorkerSettings] = msgspec.field(default_factory=list)


def parse(content: bytes) -> Found:
    """What the file says; raises UsageError naming what is wrong."""
    if len(content) > MAX_FILE:
        raise UsageError(f"it has more than {MAX_FILE >> 20} MiB")
    try:
        document = converted(tomllib.loads(content.decode()), _Document)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"it is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise UsageError(f"it is wrong: {error}") from None
    return Found(checked_all(document.workers))


class Versions:
    """What the file says, from what each look saw of it. No I/O."""

    def __init__(self, content: bytes) -> None:
        """``content`` is taken as it is; raises UsageError."""
        self.found = parse(content)
        self.right = True
        """Whether the newest version is the one in ``found``."""
        self._taken = self._seen = content

    def look(self, content: bytes) -> bool:
        """Whether ``found`` is new. Raises UsageError, once, for a version that is wrong."""
        seen, self._seen = self._seen, content
        if content != seen or content == self._taken:
            return False
        self._taken, self.right = content, False
        found = parse(content)
        changed, self.found, self.right = found != self.found, found, True
        return changed


class FileSource:
    """The workers of one file. Raises UsageError where there is no file, or a wrong one, to begin with.

    ``resumes``: another process looked at it before, and what that said counts until the file is right.
    """

    def __init__(self, path: Path, poll_s: float, teller: Teller, *, resumes: bool = False) -> None:
        self._path, self._poll_s, self._teller = path, poll_s, teller
        self._reading: asyncio.Future[bytes] | None = None
        self._known = True
        """Whether the file was right once."""
        try:
            self._versions = Versions(_read(path))
        except (OSError, UsageError) as error:
            if not resumes:
                raise _unusable(path, error) from None
            self._versions, self._known = Versions(b"# not read yet"), False
            self._versions.right = False

    async def run(self) -> None:
        if self._known:
            self._teller.knows(self._versions.found)
        unreadable: str | None = None
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                changed = self._versions.look(await self._content())
            except UsageError as error:
                self._teller.failed("broken", f"{self._path}: {error.message}")
            except OSError as error:  # TimeoutError is one
                why = error.strerror or f"no answer within {READ_S:g} s"
                if unreadable != why:
                    self._teller.failed("unreadable", f"{self._path}: {why}")
                unreadable = why
                continue
            else:
                if changed or (self._versions.right and not self._known):
                    self._known = True
                    self._teller.knows(self._versions.found)
                elif self._versions.right:
                    self._teller.heard()
            unreadable = None

    async def _content(self) -> bytes:
        # A thread can't be stopped, so one that hangs is waited for again instead of sending another one after it.
        reading = self._reading = self._reading or asyncio.ensure_future(asyncio.to_thread(_read, self._path))
        async with asyncio.timeout(READ_S):
            await asyncio.wait([reading])
        self._reading = None
        return reading.result()


def _unusable(path: Path, error: OSError | UsageError) -> UsageError:
    if isinstance(error, UsageError):
        return UsageError(f"the file of workers {path}: {error.message}", hint=error.hint)
    return UsageError(f"the file of workers {path} can't be read: {error.strerror}")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE + 1)
