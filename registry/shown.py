"""What log lines may show of a request's address: some addresses are a permission by themselves."""

from __future__ import annotations

import re
from typing import Final

_PERMISSIONS: Final = re.compile(r"(\.git/info/lfs/objects/(?!(?:batch|verify)\b)|/api/v1/pushes/)[^/\s?\"']+")
"""The signed address of an upload by git-lfs, and the number of a push: whoever knows one may go on with it."""


def shown(text: str) -> str:
    """A path, or an error's message, in which what allows something by itself is left out."""
    return _PERMISSIONS.sub(r"\1***", text)
