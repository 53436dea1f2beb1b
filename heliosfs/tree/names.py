"""How repositories and refs are written as file names, and back.

A ref may hold ``/``, a file name may not: ``refs/pr/1`` is shown as ``@refs%2Fpr%2F1``. No ref holds ``%``, so this is
unambiguous. Under ``.hub`` a repository is one folder, named as the Hugging Face cache names it: ``models--org--name``;
no part of a repository's name holds ``--`` (helios.names), so this is unambiguous too.
"""

from __future__ import annotations

from helios.errors import InvalidInput
from helios.names import KINDS, RepoId, check_ref

NO_ORG = "_"
"""The directory of repositories without an organisation, such as ``gpt2``."""


def ref_name(ref: str) -> str:
    """The file name that shows a ref, such as ``@main``."""
    return "@" + ref.replace("/", "%2F")


def ref_of(name: str) -> str | None:
    """The ref that a file name shows, or None where it is no such name."""
    if not name.startswith("@") or "/" in name:
        return None
    ref = name[1:].replace("%2F", "/")
    try:
        return check_ref(ref)
    except InvalidInput:
        return None


def hub_folder(repo: RepoId) -> str:
    """The repository's folder in the layout of the Hugging Face cache."""
    return "--".join((repo.kind, *repo.id.split("/")))


def hub_repo(folder: str) -> RepoId | None:
    """The repository of a cache folder, or None where the name is none of a repository."""
    kind, *parts = folder.split("--")
    return parse_repo(kind, "/".join(parts)) if kind in KINDS and len(parts) in (1, 2) else None


def parse_repo(kind: str, text: str) -> RepoId | None:
    """The repository that an id names, or None where no repository can have it."""
    try:
        return RepoId.parse(text, kind)
    except InvalidInput:
        return None
