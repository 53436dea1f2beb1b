"""What a node needs to read a commit's files, in one answer: their recipes and where their chunks lie.

The JSON form is described in docs/native-api.md; the registry makes it, nodes read it. It is nothing that has to be
believed: a recipe is checked against its digest, a placement against its recipe, and every chunk against its hash.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError
from heliosfs.store.placement import Placement

FORMAT: Final = 1
"""Version of the JSON form."""

MAX_BYTES: Final = 4 << 20
"""Bytes of recipes after which an answer names no more blobs: some 450 GB of them."""

MAX_BLOBS: Final = 1000
"""Most blobs in an answer."""


class BlobContent(msgspec.Struct, frozen=True):
    """One blob: its recipe's record (base64 in JSON) and its placement."""

    recipe: bytes
    placement: Placement

    @property
    def digest(self) -> str:
        """The recipe's digest, by which a manifest names it."""
        return hashlib.sha256(self.recipe).hexdigest()


class CommitContent(msgspec.Struct, frozen=True):
    """Blobs of a commit, the largest first, as many as an answer holds. ``format`` is the version of this form."""

    blobs: list[BlobContent]
    format: int = FORMAT

    def encode(self) -> bytes:
        """The JSON form."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> CommitContent:
        """Read the JSON form; raises IntegrityError. Unknown fields are ignored, an unknown format is refused."""
        try:
            found = from_json(data, cls)
            if found.format != FORMAT:
                raise IntegrityError(f"the form {found.format} of a commit's content is newer than this Helios")
            return found
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise IntegrityError(f"a commit's content does not decode: {error}") from None
