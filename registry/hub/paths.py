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
    "revision": (1, 1), "tree": (1, None), "paths-info": (1, 1), "commits": (1, 1), "preupload": (1, 1),
    "commit": (1, 1), "branch": (1, 1), "tag": (1, 1), "xet-read-token": (1, 1), "xet-write-token": (1, 1),
}  # fmt: skip
"""Calls below ``/api/{kind}/{id}/`` that name a revision, and how many segments may follow: (least, most)."""

API_ENDS: Final = {"refs": (0, 0), "auth-check": (0, 1), "safetensors-metadata": (1, None), "lfs-files": (0, 0)}
"""Those that name none; a path that ends in such a word may be a repository of that name, too."""

OTHER_KINDS: Final = ("datasets", "spaces", "kernels")
"""First segments that name the kind on ``/{kind}/{id}/resolve/…``; models have none."""

API_KINDS: Final = ("models", *OTHER_KINDS)

ALONE: Final = {"whoami-v2": "whoami", "validate-yaml": "validate-yaml"}
"""Calls below ``/api/`` that are about no repository."""

REPOS: Final = {("repos", "create"): "create", ("repos", "delete"): "delete"}
"""Calls below ``/api/`` that name their repository in the body."""

TENANTS: Final = "t"
"""First segment of a tenant's prefix, ``/t/{tenant}``."""

LFS: Final = ("info", "lfs", "objects")
"""What follows ``{id}.git`` in calls of git-lfs."""


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
    return list(_readings(_segments(raw_path, prefix)))


def parse_tenant(raw_path: str, prefix: str = "") -> tuple[str, list[HubCall]] | None:
    """The tenant that ``/t/{tenant}/…`` names and the readings of the rest; None where the rest is no call."""
    segments = _segments(raw_path, prefix)
    if len(segments) < 3 or segments[0] != TENANTS:
        return None
    readings = list(_readings(segments[2:]))
    return (segments[1], readings) if readings else None


def _segments(raw_path: str, prefix: str) -> list[str]:
    segments = [_decode(segment) for segment in raw_path.split("/")[1:]][prefix.rstrip("/").count("/") :]
    while segments and not segments[-1]:
        segments.pop()
    return segments


def _readings(segments: list[str]) -> Iterator[HubCall]:
    if segments[:1] == ["api"]:
        yield from _api(segments[1:])
        return
    kind = segments[0] if segments and segments[0] in OTHER_KINDS else "models"
    rest = segments if kind == "models" else segments[1:]
    yield from _resolve(kind, rest)
    yield from _lfs(kind, rest)


def _api(segments: list[str]) -> Iterator[HubCall]:
    if len(segments) == 1 and segments[0] in ALONE:
        yield HubCall(ALONE[segments[0]], "")
    if tuple(segments) in REPOS:
        yield HubCall(REPOS[segments[0], segments[1]], "")
    if not segments or segments[0] not in API_KINDS:
        return
    kind, rest = segments[0], segments[1:]
    if not rest:
        yield HubCall("list", kind)
        return
    for length in (2, 1):
        id_, marker, args = "/".join(rest[:length]), "".join(rest[length : length + 1]), rest[length + 1 :]
        if len(rest) == length and not (length == 2 and rest[1] in API_ENDS):
            yield HubCall("info", kind, id_)
        if marker in API_MARKERS:
            least, most = API_MARKERS[marker]
            verb = "info" if marker == "revision" else marker
            for revision, tail in _revisions(args):
                if revision and (most is None or len(tail) <= most - least):
                    yield HubCall(verb, kind, id_, revision, "/".join(tail))
        elif marker in API_ENDS:
            least, most = API_ENDS[marker]
            if least <= len(args) and (most is None or len(args) <= most):
                yield HubCall(marker, kind, id_, None, "/".join(args))
    if len(rest) == 2 and rest[1] in API_ENDS:
        yield HubCall("info", kind, "/".join(rest))


def _resolve(kind: str, segments: list[str]) -> Iterator[HubCall]:
    for length in (2, 1):
        if segments[length : length + 1] == ["resolve"]:
            for revision, tail in _revisions(segments[length + 1 :]):
                if revision and tail:
                    yield HubCall("resolve", kind, "/".join(segments[:length]), revision, "/".join(tail))


def _lfs(kind: str, segments: list[str]) -> Iterator[HubCall]:
    """``{id}.git/info/lfs/objects/{what}``; ``what``, a call or where an object is sent to, becomes ``path``."""
    for length in (2, 1):
        git, rest = "".join(segments[length - 1 : length]), segments[length:]
        if git.endswith(".git") and len(git) > 4 and tuple(rest[:3]) == LFS and len(rest) == 4:
            verb = "lfs" if rest[3] in ("batch", "verify") else "lfs-object"
            yield HubCall(verb, kind, "/".join(segments[:length])[:-4], None, rest[3])


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
