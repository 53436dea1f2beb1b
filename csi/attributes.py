"""What a volume is to hold, read from the attributes that Kubernetes passes on. No I/O.

They come from a pod (inline volume), a PersistentVolume, or the parameters of a StorageClass (docs/csi.md). Keys below
``k8s.io/`` and ``kubernetes.io/`` are Kubernetes' own: the pod's name and the like, and what its helpers note.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from helios.errors import InvalidInput
from helios.names import RepoId, check_revision, is_commit

MAX_ID: Final = 124
"""Longest volume id, in bytes: a mount's volumes have at most 128, and ours have a prefix there."""
PREFIX: Final = "csi."
"""How volumes that belong to the driver begin in a mount, so that it touches no other."""
KNOWN: Final = ("model", "repo", "revision", "commit", "format", "prefetch", "priority")
PRIORITIES: Final = ("scratch", "normal", "critical", "pinned")
"""The classes of blobs in a mount's cache, the first to go first."""
FORMS: Final = {"files": "model", "hub": "hub"}
"""``format`` -> the directory of a mount's volume."""

_THEIRS = re.compile(r"(?:[a-z0-9.-]+\.)?(?:k8s|kubernetes)\.io/")
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, slots=True)
class Wanted:
    """``commit`` is None where the revision is yet to be resolved; ``prefetch``: patterns of files to fetch at once,
    ``()`` for all of them, None for none; ``priority``: the class that its files have in the cache, None for the usual
    one."""

    repo: RepoId
    revision: str
    commit: str | None
    form: str
    prefetch: tuple[str, ...] | None
    priority: str | None = None


def check_volume_id(text: str) -> str:
    """Return a volume id that the driver can use, or raise InvalidInput."""
    if not text:
        raise InvalidInput("volume_id is missing")
    if len(text) > MAX_ID or not _ID.match(text):
        raise InvalidInput(
            f"volume_id {text[:150]!r} can't be used: letters, digits and . _ - are allowed "
            f"(at most {MAX_ID}, no dot at the start)",
            hint="Choose another volumeHandle for the PersistentVolume.",
        )
    return text


def read(attributes: Mapping[str, str], *, where: str) -> Wanted:
    """What they ask for; ``where`` names the attributes in errors. Raises InvalidInput."""
    ours = {key: value for key, value in attributes.items() if not _THEIRS.match(key)}
    for key in sorted(ours):
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, 1)
            guess = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(KNOWN)}"
            raise InvalidInput(f"{where} has the unknown key {key!r}; {guess}")
    repo = _repo(ours, where)
    revision = check_revision(ours.get("revision", "") or "main")
    commit = ours.get("commit") or None
    if commit is not None and not is_commit(commit):
        raise InvalidInput(f"{where}: commit {commit[:80]!r} is none: 40 lower-case hexadecimal digits are")
    if is_commit(revision):
        if commit not in (None, revision):
            raise InvalidInput(f"{where}: revision and commit are two commits, {revision} and {commit}; keep one")
        commit = revision
    form = FORMS.get(ours.get("format", "") or "files")
    if form is None:
        raise InvalidInput(f"{where}: format {ours['format'][:80]!r} is unknown; known: {', '.join(FORMS)}")
    priority = ours.get("priority") or None
    if priority is not None and priority not in PRIORITIES:
        raise InvalidInput(f"{where}: priority {priority[:80]!r} is unknown; known: {', '.join(PRIORITIES)}")
    return Wanted(repo, revision, commit, form, _patterns(ours.get("prefetch", "")), priority)


def name_of(form: str) -> str:
    """The ``format`` whose directory this is."""
    return next((name for name, directory in FORMS.items() if directory == form), form)


def _repo(ours: Mapping[str, str], where: str) -> RepoId:
    model, repo = ours.get("model", ""), ours.get("repo", "")
    if bool(model) == bool(repo):
        said = "both" if model else "neither"
        raise InvalidInput(
            f'{where} has to say what the volume holds: either "model" (org/name) or "repo" (models/org/name); '
            f"it says {said}"
        )
    return RepoId.parse(model) if model else RepoId.from_canonical(repo)


def _patterns(text: str) -> tuple[str, ...] | None:
    if text in ("", "false"):
        return None
    if text == "true":
        return ()
    return tuple(part.strip() for part in text.split(",") if part.strip())
