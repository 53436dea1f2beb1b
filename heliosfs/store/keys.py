"""Names of objects: where each kind of object lies in the store.

A key is ``<domain>/<kind>/…`` with safe characters only, so that it is at once a relative path and a valid key of every
object store. docs/format.md is normative.
"""

from __future__ import annotations

import re
from typing import Final

from helios.errors import InvalidInput
from helios.names import RepoId

PUBLIC: Final = "public"
"""The default domain: content that every tenant may deduplicate against."""

MAX_KEY: Final = 1000
"""Longest key in bytes; S3 and GCS allow 1024."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}\Z")
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_HEX = re.compile(r"[0-9a-f]+\Z")


def check_key(key: str) -> str:
    """Return a valid object key or raise InvalidInput.

    At least a domain and one more segment; no segment is empty, starts with ``.`` or ``-``, or holds anything but
    letters, digits and ``. _ -``: so no key leaves the store's root or names its private files.
    """
    segments = key.split("/")
    if len(key) > MAX_KEY or len(segments) < 2 or not all(map(_SEGMENT.match, segments)):
        raise InvalidInput(f"{key[:200]!r} is not an object key: use domain/kind/name of letters, digits and . _ -")
    check_domain(segments[0])
    return key


KINDS: Final = ("blobs", "packs", "recipes", "xet", "manifests", "commits")
"""Kinds of objects that hold content: the second segment of their keys."""


SEALED: Final = "sealed"
"""In place of the kind: objects that are encrypted (sealed.py), whose kind and name follow."""


def sealed_mark(domain: str, id_: str) -> str:
    """Key of the object that says that a key is in use in a domain."""
    return f"{check_domain(domain)}/{SEALED}/keys/{id_}"


def check_domain(domain: str) -> str:
    """Return a valid domain name (lower-case letters, digits, ``-``; at most 63) or raise InvalidInput."""
    if not _DOMAIN.match(domain):
        raise InvalidInput(f"{domain[:80]!r} is not a domain: use lower-case letters, digits and - (at most 63)")
    return domain


def blob_key(domain: str, sha256: str) -> str:
    """Key of the object that is a whole blob, byte for byte."""
    return _fanned(domain, "blobs", sha256, 64)


def recipe_key(domain: str, digest: str) -> str:
    """Key of a recipe record, named by the sha256 of the record."""
    return _fanned(domain, "recipes", digest, 64)


def manifest_key(domain: str, digest: str) -> str:
    """Key of a manifest record, named by the sha256 of the record."""
    return _fanned(domain, "manifests", digest, 64)


def xet_key(domain: str, digest: str) -> str:
    """Key of a Xet layout, named by the sha256 of the record."""
    return _fanned(domain, "xet", digest, 64)


def pack_key(domain: str, name: str) -> str:
    """Key of a pack; ``name`` is 32 hexadecimal digits drawn at random by its writer."""
    return _fanned(domain, "packs", name, 32)


def commit_key(domain: str, repo: RepoId, commit: str) -> str:
    """Key of a commit record. The repository stands in it because two repositories may share a commit id.

    One-segment repositories lie under ``_``, which is no organisation's name.
    """
    if not _is_hex(commit, 40):
        raise InvalidInput(f"{commit!r} is not a commit: 40 lower-case hexadecimal digits")
    return check_key(f"{domain}/commits/{repo.kind}/{repo.org or '_'}/{repo.name}/{commit}")


def domain_of(key: str) -> str:
    """The domain that a valid key is in."""
    return key.partition("/")[0]


def _fanned(domain: str, kind: str, name: str, digits: int) -> str:
    if not _is_hex(name, digits):
        raise InvalidInput(f"{name[:80]!r} can't name an object under {kind}: {digits} lower-case hexadecimal digits")
    return f"{check_domain(domain)}/{kind}/{name[:2]}/{name}"


def _is_hex(text: str, digits: int) -> bool:
    return len(text) == digits and bool(_HEX.match(text))
