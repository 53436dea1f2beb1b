"""What the fetch engine asks of a source of bytes: a registry now; peers and other tiers later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from helios.errors import IntegrityError
from helios.http.response import Watch
from helios.names import RepoId, others
from heliosfs.store.recipe import Recipe


@dataclass(frozen=True, slots=True)
class BlobRef:
    """One file of a snapshot, as a manifest names it; ``size`` in bytes.

    ``repo``, ``commit`` and ``path`` say through which name it is read (a registry checks the repository; logs name the
    file); ``sha256`` alone is the content's identity. ``also`` are other repositories that were seen to hold it, for
    the case that this one is removed.
    """

    repo: RepoId
    commit: str
    path: str
    sha256: str
    size: int
    recipe_digest: str
    also: tuple[RepoId, ...] = ()

    @property
    def claim(self) -> tuple[str, int, str]:
        """The content, its size and its recipe: that they belong together is only what somebody says, until the
        content is seen to have its sha256."""
        return self.sha256, self.size, self.recipe_digest

    def beside(self, other: BlobRef) -> BlobRef:
        """This reference, which knows of another one's repositories too."""
        also = others(self.repo, (*self.also, other.repo, *other.also))
        return self if also == self.also else replace(self, also=also)


class CorruptChunk(IntegrityError):
    """A chunk's bytes do not have the hash that the recipe gives; ``chunk`` is its number in the blob."""

    def __init__(self, chunk: int, message: str) -> None:
        super().__init__(message)
        self.chunk = chunk


Deliver = Callable[[int, memoryview], None]
"""Takes a chunk's number and its bytes, valid during the call; raises CorruptChunk to refuse them."""


class Source(Protocol):
    """A place to read blobs from. Every call blocks, is made from a worker thread, and several run at the same time.

    ``timeout_s`` bounds the silence, in seconds: a recipe, and each chunk of a fetch, must be here within it after the
    one before. Calls raise HeliosError: Unavailable (DeadlineExceeded) where trying again may help; NotFound and
    IntegrityError where only other bytes or another placement would.
    """

    @property
    def name(self) -> str:
        """For logs and metrics: short, stable, without secrets."""

    @property
    def latency_s(self) -> float:
        """The round trip: the shortest time seen from a request to the head of its answer, in seconds; 0 at first."""

    def recipe(self, want: BlobRef, timeout_s: float) -> bytes:
        """The blob's recipe record, unchecked."""

    def fetch(
        self,
        want: BlobRef,
        recipe: Recipe,
        chunks: range,
        buffer: memoryview,
        deliver: Deliver,
        timeout_s: float,
        *,
        urgent: bool,
        watch: Watch,
    ) -> None:
        """Read consecutive chunks in order, each into ``buffer`` (at least ``MAX_CHUNK`` bytes), and deliver each.

        ``deliver`` may raise; nothing more is then read and the exception leaves unchanged. ``urgent``: somebody waits
        for the very first chunk, so that it may cost more requests. ``watch`` counts what comes and ends the call.
        """

    def warm(self) -> None:
        """Have connections ready, if that takes no more than a moment; failures show when they are used."""

    def ahead(self, repo: RepoId, commit: str, timeout_s: float) -> float:
        """Learn what reading the commit's files will need, and have connections ready for them; reads no content.

        Returns for how many seconds that holds. It is advice: where it can't be had, 0 or an error.
        """

    def refresh(self, want: BlobRef, recipe: Recipe, timeout_s: float, wrong: int | None = None) -> None:
        """Forget where the blob's chunks lie and ask again. ``wrong`` is a chunk whose bytes had another hash: the
        source may know a better copy."""

    def close(self) -> None:
        """Close idle connections."""
