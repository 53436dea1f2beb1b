"""Labels for all samples of a Prometheus exposition, without parsing more of it than the label sets. No I/O.

Both text formats are taken (https://prometheus.io/docs/instrumenting/exposition_formats/, OpenMetrics 1.0): samples
with and without labels, names in quotes, escapes, time stamps and exemplars, whose labels are not those of the sample.
A label of the same name that a sample has already becomes ``exported_<name>``, as Prometheus itself does it with the
labels of a target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

_NAME: Final = re.compile(rb"[ \t]*([^\W\d][\w:]*|:[\w:]*)[ \t]*", re.ASCII)
_LABEL: Final = re.compile(
    rb'[ \t]*(?:([^\W\d]\w*)|"((?:[^"\\]|\\.)*)")[ \t]*(?:=[ \t]*("(?:[^"\\]|\\.)*")[ \t]*)?(?:,|(?=\}))', re.ASCII
)
"""A label with its value, or (without one) the name of the metric, which may stand first where it needs quotes."""
_END: Final = re.compile(rb"[ \t]*\}")
_PLAIN: Final = re.compile(rb"[^\W\d]\w*\Z", re.ASCII)
EXPORTED: Final = b"exported_"


def escaped(value: str) -> str:
    """A label's value as it is written between quotes."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class Labels:
    """Adds the same labels to every sample. Those with an empty value are left out: to Prometheus that is the same."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Names are those that need no quotes."""
        told = {name: value for name, value in labels.items() if value}
        self._names = frozenset(name.encode() for name in told)
        self._added = ",".join(f'{name}="{escaped(value)}"' for name, value in told.items()).encode()

    def add(self, exposition: bytes) -> bytes:
        """The exposition with the labels; comments, and lines that are no samples, stay as they are."""
        return b"\n".join(self._lines(exposition.split(b"\n")))

    def _lines(self, lines: Iterable[bytes]) -> Iterable[bytes]:
        return (line if line.startswith(b"#") or not self._added else self._line(line) for line in lines)

    def _line(self, line: bytes) -> bytes:
        name = _NAME.match(line)
        at = name.end() if name else len(line) - len(line.lstrip(b" \t"))
        if line[at : at + 1] != b"{":
            return line if name is None or at == len(line) else b"%s{%s} %s" % (name[1], self._added, line[at:])
        found = _labels(line, at + 1)
        if found is None:
            return line
        quoted, theirs, end = found
        out = quoted + [b"%s=%s" % (_written(label), value) for label, value in self._renamed(theirs)] + [self._added]
        return b"%s{%s}%s" % (name[1] if name else b"", b",".join(out), line[end:])

    def _renamed(self, theirs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        taken = {label for label, _ in theirs} | self._names
        out = []
        for label, value in theirs:
            new = label
            if label in self._names:
                while new in taken:
                    new = EXPORTED + new
                taken.add(new)
            out.append((new, value))
        return out


def _labels(line: bytes, at: int) -> tuple[list[bytes], list[tuple[bytes, bytes]], int] | None:
    """The quoted name of the metric, if any, and the labels with their values in quotes, from behind the brace on; and
    where the line goes on behind the other brace. None where that is no set of labels."""
    names: list[bytes] = []
    labels: list[tuple[bytes, bytes]] = []
    while (end := _END.match(line, at)) is None:
        one = _LABEL.match(line, at)
        if one is None or (one[3] is None and (one[2] is None or names or labels)):
            return None
        if one[3] is None:
            names.append(b'"%s"' % one[2])
        else:
            labels.append((one[1] or one[2], one[3]))
        at = one.end()
    return names, labels, end.end()


def _written(label: bytes) -> bytes:
    """A label's name, in quotes where it needs them."""
    return label if _PLAIN.match(label) else b'"%s"' % label
