"""What clients of a registry that is killed know: what they asked for, what was acknowledged, what is in doubt.

The journal is a model of every ref: the trees that it may show. A change that was acknowledged is the only one; one
that got no answer is one more; one that was refused changes nothing. Each ref is changed by one client at a time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

from helios.errors import BadSignature, Conflict, Forbidden, InvalidInput, NotFound
from tests.support.ingest import seeded

MIB = 1 << 20
Tree = frozenset[tuple[str, str]]
"""The files of a commit: path and sha256."""

REFUSALS = (Conflict, NotFound, InvalidInput, Forbidden, BadSignature)
"""Answers which say that nothing was changed."""

Parts = tuple[tuple[int, int], ...]


@lru_cache(64)
def block(size: int, seed: int) -> bytes:
    return seeded(size, seed)


def content(parts: Parts) -> bytes:
    """The bytes that are described by blocks of (size, seed)."""
    return b"".join(block(size, seed) for size, seed in parts)


class Journal:
    """Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shows: dict[tuple[str, str], set[Tree | None]] = {}
        self._tried: dict[str, set[Tree]] = {}
        self._contents: dict[str, Parts | bytes] = {}
        self.acknowledged = self.in_doubt = self.refused = 0

    def file(self, *parts: tuple[int, int]) -> tuple[bytes, str]:
        """A file made of blocks, and its sha256; from here on it may be found in the registry."""
        data = content(parts)
        sha256 = hashlib.sha256(data).hexdigest()
        with self._lock:
            self._contents[sha256] = parts
        return data, sha256

    def raw(self, data: bytes) -> str:
        """The sha256 of a small file that may be found in the registry from here on."""
        sha256 = hashlib.sha256(data).hexdigest()
        with self._lock:
            self._contents[sha256] = data
        return sha256

    def tried(self, repo: str, tree: Tree) -> None:
        """The registry may hold a commit like this, whoever asked for it."""
        with self._lock:
            self._tried.setdefault(repo, set()).add(tree)

    def bytes_of(self, sha256: str) -> bytes:
        """What was sent under this hash; KeyError when nobody did."""
        with self._lock:
            found = self._contents[sha256]
        return found if isinstance(found, bytes) else content(found)

    @contextmanager
    def changing(self, repo: str, wanted: Mapping[str, Tree | None]) -> Iterator[None]:
        """A request that points refs of a repository at trees (None: removes them), for as long as the block runs."""
        with self._lock:
            added = []
            for ref, tree in wanted.items():
                shows = self._shows.setdefault((repo, ref), {None})
                if tree not in shows:
                    shows.add(tree)
                    added.append((shows, tree))
                if tree is not None:
                    self._tried.setdefault(repo, set()).add(tree)
        try:
            yield
        except REFUSALS:
            with self._lock:
                self.refused += 1
                for shows, tree in added:
                    shows.discard(tree)
            raise
        except BaseException as error:
            with self._lock:
                if "ConnectionRefused" in str(error):
                    for shows, tree in added:
                        shows.discard(tree)
                else:
                    self.in_doubt += 1
            raise
        with self._lock:
            self.acknowledged += 1
            for ref, tree in wanted.items():
                self._shows[repo, ref] = {tree}

    def refs(self, repo: str) -> list[str]:
        """The refs of a repository that anybody ever changed."""
        with self._lock:
            return [ref for name, ref in self._shows if name == repo]

    def uncertain(self, repo: str, ref: str) -> bool:
        with self._lock:
            return len(self._shows.get((repo, ref), {None})) > 1

    def check(self, found: Mapping[str, Mapping[str, Tree]], *, ours: tuple[str, ...]) -> list[str]:
        """What is wrong with the refs that a registry shows (repo -> ref -> tree), of repositories with these names."""
        problems = []
        with self._lock:
            for (repo, ref), shows in self._shows.items():
                tree = found.get(repo, {}).get(ref)
                if tree not in shows:
                    problems.append(f"{repo}@{ref} shows {_said(tree)}; it may show {[_said(each) for each in shows]}")
            for repo, refs in found.items():
                if repo.startswith(ours):
                    unknown = [ref for ref in refs if (repo, ref) not in self._shows]
                    problems += [f"nobody made {repo}@{ref}" for ref in unknown]
        return problems

    def check_tried(self, repo: str, tree: Tree) -> str | None:
        """What is wrong with a commit that the registry holds: nobody asked for it."""
        with self._lock:
            known = tree in self._tried.get(repo, ())
        return None if known else f"nobody asked for a commit of {repo} with {_said(tree)}"


def _said(tree: Tree | None) -> str:
    return "nothing" if tree is None else ", ".join(f"{path}={sha256[:8]}" for path, sha256 in sorted(tree))
