"""Sealed addresses: who has one may read the object, as with an object store's own signed addresses.

An object's bytes may belong to a tenant, or come from a repository that not everybody may read; the object doesn't
know whose they are. So where there are such readers, its address carries a seal that was made for somebody who may
read the blob, and ends. The key is in the database: every process takes every other's seals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from helios.errors import Forbidden
from registry.xet.tokens import Signer

PARAMETER: Final = "seal"


class Seals:
    """Of one registry. Threads may share it."""

    def __init__(self, signer: Signer, needed: Callable[[], bool]) -> None:
        """``needed`` says whether there is anything that not everybody may read; it may block."""
        self._signer, self.needed = signer, needed

    def seal(self, url: str, key: str, seconds: float) -> str:
        """The address of an object of ours with a seal that ends so many seconds from now."""
        return f"{url}?{PARAMETER}={self._signer.seal(_what(key), int(self._signer.clock() + seconds))}"

    def check(self, key: str, text: str | None) -> None:
        """Raise Forbidden unless the text is a seal for the object that has not ended. Blocks where ``needed`` does."""
        if self.needed() and not (text and self._signer.opens(_what(key), text)):
            raise Forbidden(
                "this address has no seal for the object, or one that has ended",
                hint="Ask for the blob's placement: it has the addresses.",
            )


def _what(key: str) -> str:
    return f"object {key}"
