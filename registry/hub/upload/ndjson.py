"""The body of a commit call: lines of JSON, read as they arrive, without I/O.

The first line is the header, each other one an operation on the tree (huggingface_hub's ``_prepare_commit_payload``;
the Hub documents the format in huggingface_hub#1085). Lines are bounded, so memory is, whatever the body's length.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from helios.decoding import converted, json_decoder
from helios.errors import InvalidInput
from helios.names import check_path, is_commit

MAX_REGULAR: Final = 16 << 20
"""Longest file inside a commit's body, in bytes: preupload sends larger ones another way."""
MAX_LINE: Final = MAX_REGULAR * 4 // 3 + (64 << 10)
MAX_OPERATIONS: Final = 100_000
MAX_TEXT: Final = 64 << 10
"""Longest summary and description, in characters."""

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Header:
    """What the commit says of itself; ``parent`` is where its branch must be, None for anywhere."""

    message: str
    parent: str | None


@dataclass(frozen=True, slots=True)
class Content:
    """Put a file whose bytes are in the body."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """Put a file that was uploaded before, or that the repository holds; ``size`` in bytes where it is said."""

    path: str
    sha256: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a file, or a directory with all that is in it."""

    path: str
    folder: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Put the file that another path has, in the base or, where it is named, in a revision."""

    path: str
    source: str
    revision: str | None


Operation = Content | Stored | Delete | Copy


class _Line(msgspec.Struct):
    key: str
    value: dict[str, Any]


class _Header(msgspec.Struct):
    summary: str
    description: str = ""
    parentCommit: str | None = None  # noqa: N815 - as it is written


class _File(msgspec.Struct):
    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "utf-8"


class _LfsFile(msgspec.Struct):
    path: str
    oid: str
    algo: Literal["sha256"] = "sha256"
    size: int | None = None


class _Path(msgspec.Struct):
    path: str


class _CopyFile(msgspec.Struct):
    path: str
    srcPath: str  # noqa: N815
    srcRevision: str | None = None  # noqa: N815


_DECODER = json_decoder(_Line)


class CommitBody:
    """Cuts a body into lines, which is cheap, and reads them, which may take a while and can be done elsewhere."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self._rest = bytearray()
        self._seen = 0
        self._line = 0

    def lines(self, data: bytes) -> Iterator[bytes]:
        """The lines that are whole with this piece of the body, but not empty ones.

        Raises InvalidInput for one that is too long.
        """
        self._rest += data
        start = 0
        while (end := self._rest.find(b"\n", self._seen)) >= 0:
            line = bytes(self._rest[start:end])
            self._seen = start = end + 1
            if line:
                yield line
        del self._rest[:start]
        self._seen = len(self._rest)
        if len(self._rest) > MAX_LINE:
            raise self._too_long(self._line + 1)

    def rest(self) -> bytes:
        """The last line, where no new line stands behind it."""
        line, self._rest, self._seen = bytes(self._rest), bytearray(), 0
        return line

    def read(self, line: bytes) -> Operation | None:
        """The operation of the next line; None for the header and for an empty line. Raises InvalidInput naming it."""
        if not line.strip():
            return None
        self._line += 1
        if len(line) > MAX_LINE:
            raise self._too_long(self._line)
        if self._line > MAX_OPERATIONS + 1:
            raise InvalidInput(f"a commit takes {MAX_OPERATIONS} operations at most", hint="Make several commits.")
        try:
            item = _DECODER.decode(line)
            if self.header is not None:
                return _operation(item)
            self.header = _header(item)
        except (msgspec.DecodeError, UnicodeError, RecursionError, binascii.Error) as error:
            raise InvalidInput(f"line {self._line} of the commit is malformed: {error}") from None
        except InvalidInput as error:
            raise InvalidInput(f"line {self._line} of the commit is wrong: {error.message}") from None
        return None

    def end(self) -> Header:
        """The header, when all lines were read. Raises InvalidInput where there was none."""
        if self.header is None:
            raise InvalidInput('a commit starts with a header: {"key": "header", "value": {"summary": "…"}}')
        return self.header

    def _too_long(self, line: int) -> InvalidInput:
        return InvalidInput(
            f"line {line} of the commit is longer than {MAX_LINE} bytes", hint="Large files go through LFS."
        )


def _header(item: _Line) -> Header:
    if item.key != "header":
        raise InvalidInput(f"the header comes first, not {item.key[:40]!r}")
    header = converted(item.value, _Header)
    if max(len(header.summary), len(header.description)) > MAX_TEXT:
        raise InvalidInput(f"the summary or the description is longer than {MAX_TEXT} characters")
    if header.parentCommit is not None and not is_commit(header.parentCommit):
        raise InvalidInput(f"parentCommit {header.parentCommit[:60]!r} is not a commit: 40 hexadecimal digits")
    return Header("\n\n".join(part for part in (header.summary, header.description) if part), header.parentCommit)


def _operation(item: _Line) -> Operation:
    match item.key:
        case "file":
            file = converted(item.value, _File)
            data = b64decode(file.content, validate=True) if file.encoding == "base64" else file.content.encode()
            if len(data) > MAX_REGULAR:
                raise InvalidInput(f"{file.path[:200]!r} has {len(data)} bytes; from {MAX_REGULAR} on use LFS")
            return Content(check_path(file.path), data)
        case "lfsFile":
            lfs = converted(item.value, _LfsFile)
            if not _SHA256.match(lfs.oid):
                raise InvalidInput(f"oid {lfs.oid[:80]!r} is not a sha256: 64 lower-case hexadecimal digits")
            return Stored(check_path(lfs.path), lfs.oid, lfs.size)
        case "deletedFile":
            return Delete(check_path(converted(item.value, _Path).path), folder=False)
        case "deletedFolder":
            return Delete(check_path(converted(item.value, _Path).path.rstrip("/")), folder=True)
        case "copyFile":
            copy = converted(item.value, _CopyFile)
            return Copy(check_path(copy.path), check_path(copy.srcPath), copy.srcRevision)
        case key:
            raise InvalidInput(f"there is no operation {key[:40]!r}")
