"""Names of repositories and revisions, checked where they enter.

A repository is a kind (``models`` or ``datasets``), an optional organisation and a name. Its canonical
text, used in the registry's API, in records and in commit ids, is ``models/org/name`` or, for one-segment
ids such as ``gpt2``, ``models/gpt2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from helios.errors import InvalidInput

KINDS: Final = ("models", "datasets")
MAX_PART: Final = 96
"""Longest organisation or repository name, as on the Hugging Face Hub."""

MAX_OTHERS: Final = 7
"""Repositories that are remembered to hold a content, beside the one it was found in."""

TENANT: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
"""A tenant's name: a DNS label, so that it fits into URLs, labels and file names."""

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*\Z")


@dataclass(frozen=True, slots=True, order=True)
class RepoId:
    """A repository's identity."""

    kind: str
    org: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}"

    @property
    def id(self) -> str:
        """The Hub's id: ``org/name`` or ``name``."""
        return self.name if self.org is None else f"{self.org}/{self.name}"

    @classmethod
    def parse(cls, text: str, kind: str = "models") -> RepoId:
        """Read a Hub id (``org/name`` or ``name``) of the given kind.

        Raises InvalidInput for names the mount tree could not show: parts that are ``_``, ``.`` or ``..``, that
        start with ``@`` or ``.``, that are longer than 96 characters or use other characters than the Hub allows.
        As on the Hub no part ends with ``.`` or ``-`` or holds ``--`` or ``..``: the Hub's cache writes
        ``org/name`` as ``models--org--name``.
        """
        if kind not in KINDS:
            raise InvalidInput(f"{kind!r} is not a kind of repository: use one of {', '.join(KINDS)}")
        parts = text.split("/")
        if len(parts) > 2:
            raise InvalidInput(f"{text!r} is not a repository: write org/name")
        for part in parts:
            if part == "_" or len(part) > MAX_PART or not _PART.match(part) or "--" in part or ".." in part:
                raise InvalidInput(
                    f"{text!r} is not a repository name: the part {part!r} is empty, reserved, too long, ends with "
                    ". or -, or holds -- or .. or characters outside A-Z a-z 0-9 . _ -"
                )
        return cls(kind, parts[0] if len(parts) == 2 else None, parts[-1])

    @classmethod
    def from_canonical(cls, text: str) -> RepoId:
        """Read the canonical text ``kind/org/name``; raises InvalidInput."""
        kind, _, rest = text.partition("/")
        return cls.parse(rest, kind)


def others(repo: RepoId, seen: Iterable[RepoId]) -> tuple[RepoId, ...]:
    """The first few of the repositories, each once, without ``repo``."""
    return tuple(dict.fromkeys(each for each in seen if each != repo))[:MAX_OTHERS]


def is_commit(text: str) -> bool:
    """Whether the text is a full commit id: 40 lower-case hexadecimal digits."""
    return bool(_COMMIT.match(text))


def check_ref(text: str) -> str:
    """Return a valid ref name (branch, tag, alias, ``refs/pr/1``) or raise InvalidInput."""
    if is_commit(text):
        raise InvalidInput(f"{text!r} looks like a commit, so it can't be the name of a ref")
    if len(text) > 250 or not _REF.match(text) or ".." in text or "//" in text or text.endswith(("/", ".lock")):
        raise InvalidInput(f"{text!r} is not a ref name: use letters, digits and . _ - + / (at most 250 characters)")
    return text


def check_revision(text: str) -> str:
    """Return a valid revision (a commit or a ref name) or raise InvalidInput."""
    return text if is_commit(text) else check_ref(text)


def split_spec(text: str, default_revision: str = "main", kind: str = "models") -> tuple[RepoId, str]:
    """Read ``org/name[@revision]``, as the command line takes it."""
    repo, at, revision = text.partition("@")
    if at and not revision:
        raise InvalidInput(f"{text!r} ends with @: write {repo}@main, or leave the @ out")
    return RepoId.parse(repo, kind), check_revision(revision or default_revision)


def check_path(path: str) -> str:
    """Return a file path that is safe inside a repository, or raise InvalidInput naming it.

    Refused: empty, absolute, ``.`` or ``..`` parts, empty parts, backslashes, NUL and other control
    characters, parts over 255 bytes, more than 4096 bytes, text that is not valid Unicode.
    """
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"the path {path!r} is not valid UTF-8; rename the file") from None
    if not path or len(raw) > 4096:
        raise InvalidInput(f"the path {path[:80]!r} is empty or longer than 4096 bytes")
    if path.startswith("/"):
        raise InvalidInput(f"the path {path!r} is absolute; paths in a repository are relative")
    if "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise InvalidInput(f"the path {path!r} holds a backslash or a control character; rename the file")
    for part in path.split("/"):
        if part in ("", ".", "..") or len(part.encode()) > 255:
            raise InvalidInput(f"the path {path!r} has an empty, '.', '..' or overlong part")
    return path
