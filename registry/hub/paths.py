"""Which call of the Hub API a request path means.

A repository's id has one segment or two (``gpt2``, ``org/name``), so a path is read by its literal markers
(``/resolve/``, ``/tree/``, ``/revision/``…) and never by counting segments. A repository may itself be called ``tree``
or ``resolve``: then a path has more than one reading, all of which ``parse`` returns, likeliest first, and the one
whose repository exists is meant. Segments are decoded here, from the raw path, because a revision may hold ``%2F``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from helios.errors import InvalidInput

API_MARKERS: Final = {
    "revision": (1, 1),
    "tree": (1, None),
    "paths-info": (1, 1),
    "commits": (1, 1),
    "refs": (0, 0),
    "xet-read-token": (1, 1),
}
"""Calls below ``/api/{kind}/{id}/`` and how many segments may follow: (least, most)."""

OTHER_KINDS: Final = ("datasets", "spaces", "kernels")
"""First segments that name the kind on ``/{kind}/{id}/resolve/…``; models have none."""

API_KINDS: Final = ("models", *OTHER_KINDS)


@dataclass(frozen=True, slots=True)
class HubCall:
    """One reading of a path. ``revision`` is None where the call takes none or the path leaves it out."""

    verb: str
    kind: str
    id: str = ""
    revision: str | None = None
    path: str = ""


def parse(raw_path: str, prefix: str = "") -> list[HubCall]:
    """The readings of a raw (still percent-encoded) path below the prefix; empty for a path that is no call.

    ``prefix`` is the ASGI root path: as many segments as it has are skipped. Raises InvalidInput for an encoding that
    is not UTF-8.
    """
    segments = [_decode(segment) for segment in raw_path.split("/")[1:]][prefix.rstrip("/").count("/") :]
    while segments and not segments[-1]:
        segments.pop()
    if segments[:1] == ["api"]:
        return list(_api(segments[1:]))
    kind = segments[0] if segments and segments[0] in OTHER_KINDS else "models"
    rest = segments if kind == "models" else segments[1:]
    return list(_resolve(kind, rest))


def _api(segments: list[str]) -> Iterator[HubCall]:
    if segments == ["whoami-v2"]:
        yield HubCall("whoami", "")
    if not segments or segments[0] not in API_KINDS:
        return
    kind, rest = segments[0], segments[1:]
    if not rest:
        yield HubCall("list", kind)
        return
    for length in (2, 1):
        id_, marker, args = "/".join(rest[:length]), rest[length : length + 1], rest[length + 1 :]
        if len(rest) == length and not (length == 2 and rest[1] == "refs"):
            yield HubCall("info", kind, id_)
        if marker and marker[0] in API_MARKERS:
            least, most = API_MARKERS[marker[0]]
            verb = "info" if marker[0] == "revision" else marker[0]
            for revision, tail in _revisions(args) if least else [(None, args)]:
                if (not least or revision) and (most is None or len(tail) <= most - least):
                    yield HubCall(verb, kind, id_, revision, "/".join(tail))
    if len(rest) == 2 and rest[1] == "refs":
        yield HubCall("info", kind, "/".join(rest))


def _resolve(kind: str, segments: list[str]) -> Iterator[HubCall]:
    for length in (2, 1):
        if segments[length : length + 1] == ["resolve"]:
            for revision, tail in _revisions(segments[length + 1 :]):
                if revision and tail:
                    yield HubCall("resolve", kind, "/".join(segments[:length]), revision, "/".join(tail))


def _revisions(segments: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Ways to split a revision off: clients quote its slashes, people write ``refs/pr/1`` into URLs as it is."""
    if len(segments) >= 3 and segments[0] == "refs":
        yield "/".join(segments[:3]), segments[3:]
    yield (segments[0] if segments else None), segments[1:]


def _decode(segment: str) -> str:
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"the path segment {segment!r} is not UTF-8") from None
