"""What a pickled file would call when it is loaded. Advisory: it tells a person what to look at, it proves nothing.

A pickle is a program for a small stack machine (CPython, Lib/pickletools.py). What it can do beyond making plain values
goes through names it imports: the opcodes GLOBAL, STACK_GLOBAL and INST. So those names are listed, and told from the
few that weights need. Nothing is executed. A name that is computed, a stream that ends early and whatever follows the
last instruction are reported as such: scanners that let them pass have been deceived with exactly these.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Final, cast

MAX_PICKLE: Final = 64 << 20
"""Most bytes of pickle instructions that are read in one file."""
STREAMS: Final = 5
"""Pickles one after another that are looked at: torch before 1.6 reads five, then raw weights; others read one."""
PROTOCOLS: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
"""How pickles of protocol 2 to 5 begin; 0 and 1 begin with any instruction."""
MAX_MEMBERS: Final = 10_000
MAX_NAMES: Final = 100

HARMLESS: Final = frozenset({
    "collections OrderedDict", "collections defaultdict",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._tensor _rebuild_from_type_v2",
    "torch Size", "torch device", "torch dtype",
    *(f"torch {kind}Storage" for kind in (
        "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat",
        "ComplexDouble", "Untyped",
    )),
    *(f"torch {kind}" for kind in (
        "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool",
        "float8_e4m3fn", "float8_e5m2",
    )),
    "torch.storage UntypedStorage",
    "numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct",
    "numpy.core.multiarray scalar", "numpy._core.multiarray scalar",
    "numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer", "_codecs encode",
    "__builtin__ bytes", "builtins bytes",
})  # fmt: skip
"""Names that weights are made with. ``torch.storage _load_from_bytes`` is not among them: it unpickles once more."""


@dataclass(slots=True)
class Findings:
    """What was seen: names that are called but needn't be in weights, and what could not be looked at."""

    kind: str = "pickle"
    names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    imports: int = 0
    """Names imported in all, harmless or not."""

    @property
    def plain(self) -> bool:
        """Whether nothing but weights was seen."""
        return not self.names and not self.problems

    def text(self) -> str:
        """The findings for people."""
        if self.plain:
            return f"{self.kind}: only what weights need"
        parts = [f"imports {', '.join(self.names)}"] if self.names else []
        return f"{self.kind}: {'; '.join(parts + self.problems)}"

    def saw(self, name: str) -> None:
        self.imports += 1
        if name not in self.names and name not in HARMLESS:
            if len(self.names) < MAX_NAMES:
                self.names.append(name)
            else:
                self.problem("more names than are listed")

    def problem(self, text: str) -> None:
        if text not in self.problems and len(self.problems) < MAX_NAMES:
            self.problems.append(text)


def scan(file: IO[bytes]) -> Findings | None:
    """Look through a file that can be seeked; None where loading it as a pickle ends before anything is called.

    That is a file which is no torch archive (zip), doesn't begin as pickles of protocol 2 and later do, and in which no
    name is imported before the first byte that makes no sense. Some loaders look at a file's start, others (zip) at its
    end, so both are looked at.
    """
    findings = Findings()
    found = zipfile.is_zipfile(file) and _scan_archive(file, findings)
    file.seek(0)
    head = file.read(4)
    if not head.startswith(b"PK"):
        file.seek(0)
        before = findings.imports
        _scan_streams(file, findings, MAX_PICKLE)
        found = found or head.startswith(PROTOCOLS) or findings.imports > before
    return findings if found else None


def _scan_archive(file: IO[bytes], findings: Findings) -> bool:
    """The pickles in an archive; whether there may be any."""
    left = MAX_PICKLE
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                findings.problem(f"{len(members)} members, more than are looked at")
            pickles = [m for m in members[:MAX_MEMBERS] if m.filename.endswith((".pkl", ".pickle"))]
            findings.kind = "torch archive"
            for member in pickles:
                if member.file_size > left:
                    findings.problem(f"{member.filename} is too long to be looked at")
                    continue
                left -= member.file_size
                with archive.open(member) as content:
                    _scan_streams(content, findings, member.file_size)
            return bool(pickles or findings.problems)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        findings.problem(f"the archive can't be read: {error}")
        return True


def _scan_streams(file: IO[bytes], findings: Findings, limit: int) -> None:
    """Every pickle from here on; the last may be followed by raw weights, which begin with no pickle."""
    bounded = _Bounded(file, limit)
    for number in range(STREAMS):
        before = findings.imports
        try:
            for name in _names(bounded):
                findings.saw(name)
        except TooLong:
            findings.problem("too long to be looked at whole")
            return
        except Exception as error:  # pickletools raises whatever its readers meet: it was made for good pickles
            if number == 0 or findings.imports > before:
                findings.problem(f"pickle {number + 1} breaks off: {str(error)[:100]}")
            return
        if bounded.at_end():
            return


def _names(file: _Bounded) -> Iterator[str]:
    """The names that a pickle imports, in order.

    Only the strings pushed last are followed. Whatever else happens to the stack counts as an unknown value on top of
    it, so a name is never taken for another one: at worst it is reported as computed.
    """
    strings: list[str | None] = []
    texts, protocol = 0, 0
    memo: dict[int, str | None] = {}
    for code, value, _ in pickletools.genops(file):  # type: ignore[arg-type]
        name, argument = code.name, cast("Any", value)
        if name in ("GLOBAL", "INST"):
            yield str(argument)
            strings.append(None)
        elif name == "STACK_GLOBAL":
            module, attribute = strings[-2:] if len(strings) > 1 else (None, None)
            known = module is not None and attribute is not None
            if not texts:
                raise ValueError("a name is imported where no text was seen")  # as loading would
            yield f"{module} {attribute}" if known else "a computed name"
            del strings[-2:]
            strings.append(None)
        elif name in ("EXT1", "EXT2", "EXT4"):
            if not protocol:
                raise ValueError("an extension in a pickle of protocol 0 or 1")  # they come with protocol 2
            yield "a registered extension"
        elif name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else None
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = strings[-1] if strings else None
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(argument)))
        elif isinstance(argument, str) and "UNICODE" in name:
            strings.append(argument)
            texts += 1
        elif name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            strings.append(argument if isinstance(argument, str) else bytes(argument).decode("latin-1"))
            texts += 1
        elif name == "PROTO":
            protocol = int(argument)
        elif name != "FRAME":
            strings.append(None)
        if len(strings) > 64:  # only the newest matter
            del strings[:32]


class TooLong(Exception):
    """More instructions than are looked at."""


class _Bounded:
    """The reading half of a file, up to a limit; ``pickletools`` needs no more than these two methods."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit
        self._ahead = b""

    def read(self, count: int) -> bytes:
        ahead, self._ahead = self._ahead[:count], self._ahead[count:]
        self._spend(count - len(ahead))
        return ahead + self._file.read(count - len(ahead))

    def readline(self) -> bytes:
        data = self._ahead + self._file.readline(min(self._left, 1 << 16) + 1)
        line, newline, self._ahead = data.partition(b"\n")
        self._spend(len(data))
        return line + newline

    def at_end(self) -> bool:
        if not self._ahead and self._left:
            self._ahead = self._file.read(1)
        return not self._ahead

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise TooLong
