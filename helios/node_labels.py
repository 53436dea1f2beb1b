"""Which models a Kubernetes node has in its cache, as labels that schedulers can prefer (docs/kubernetes.md).

The CSI driver sets them, and whoever places pods computes the same key from repository and commit, without asking
anybody. A label's name has at most 63 characters of a small alphabet, so neither a repository's name nor both together
fit; the key has 64 bits of a hash of both. The commit's own beginning would do for most, but commits of an upstream
are chosen there, and the same one may be in several repositories. By hand:
``printf %s models/org/name@COMMIT | sha256sum | cut -c1-16``.
"""

from __future__ import annotations

import hashlib
from typing import Final

from helios.errors import InvalidInput
from helios.names import RepoId, is_commit

PREFIX: Final = "helios.dev/cached-"
"""What the keys of these labels begin with; nobody else's do."""
WHOLE: Final = "whole"
"""Every weight file of the commit is local; of a commit without weights, every file."""
PART: Final = "part"
"""A set of weights that a loader takes together is local (one quantisation of several, say), and others are not."""

_DIGITS: Final = 16


def cached_key(repo: RepoId, commit: str) -> str:
    """The key of the label that says of a commit that a node has it. Raises InvalidInput for what is no commit."""
    if not is_commit(commit):
        raise InvalidInput(f"{commit[:80]!r} is no commit: 40 lower-case hexadecimal digits are")
    return PREFIX + hashlib.sha256(f"{repo}@{commit}".encode()).hexdigest()[:_DIGITS]
