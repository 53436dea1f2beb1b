"""Placements: where a blob's chunks lie.

The JSON form is what docs/native-api.md and docs/format.md describe; the registry makes it, nodes read it. A placement
says nothing that has to be believed: it is checked against the blob's recipe here, and every chunk against its hash
after it was read.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from helios.errors import IntegrityError, InvalidInput
from heliosfs.store.keys import check_key
from heliosfs.store.recipe import Recipe

FORMAT: Final = 1
"""Version of the JSON form."""

NO_CODEC: Final = "none"

MAX_LEASE_S: Final = 31_536_000
"""Longest lease of a placement, in seconds: a year."""

_URL = re.compile(r"(/|https?://)[!-~]*\Z")


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where one chunk lies: bytes ``offset`` to ``offset + encoded_length`` of an object.

    ``length`` is the chunk's own length in bytes, ``encoded_length`` what it takes in the object after ``codec`` and,
    with a ``key`` id, encryption. This version writes only ``none`` and no key, where the two are equal.
    """

    object_key: str
    offset: int
    length: int
    encoded_length: int
    codec: str = NO_CODEC
    key: str | None = None


class PlacedObject(msgspec.Struct, frozen=True):
    """An object that holds chunks of the blob. ``url`` is relative to the registry that answered, or absolute."""

    key: str
    url: str
    size: int


class Run(msgspec.Struct, frozen=True):
    """``count`` chunks from number ``first`` lie back to back in object number ``object`` from byte ``offset``.

    ``encoded`` lists their encoded lengths; None where the codec is ``none`` and no key is used: the recipe has them.
    """

    first: int
    count: int
    object: int
    offset: int
    codec: str = NO_CODEC
    key: str | None = None
    encoded: list[int] | None = None


class Placement(msgspec.Struct, frozen=True):
    """Where the chunks of one blob lie now.

    ``version`` grows with every change of the blob's placement; ``lease_s`` is how long a reader may rely on it, in
    seconds; ``format`` is the version of this form.
    """

    blob: str
    version: Annotated[int, msgspec.Meta(ge=1)]
    lease_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_LEASE_S)]
    objects: list[PlacedObject]
    runs: list[Run]
    format: int = FORMAT

    def encode(self) -> bytes:
        """The JSON form."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Placement:
        """Read the JSON form; raises IntegrityError. Unknown fields are ignored, an unknown format is refused."""
        try:
            head = msgspec.json.decode(data, type=_Head)
            if head.format != FORMAT:
                raise IntegrityError(f"placement format {head.format} is newer than this Helios; upgrade it")
            return msgspec.json.decode(data, type=cls, strict=True)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise IntegrityError(f"a placement does not decode: {error}") from None

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        locations: Iterable[ChunkLocation],
        version: int,
        lease_s: float,
        describe: Callable[[str], tuple[str, int]],
    ) -> Placement:
        """Say where the chunks of ``recipe`` lie, in as few runs as possible.

        ``locations`` has one item for each chunk, in order; ``describe`` gives an object's URL and size in bytes by
        its key.
        """
        objects: list[PlacedObject] = []
        numbers: dict[str, int] = {}
        runs: list[Run] = []
        end: tuple[int, int] | None = None  # object number and offset where the last run ends
        for index, at in enumerate(locations):
            if at.codec != NO_CODEC or at.key is not None:
                raise IntegrityError(f"a chunk of {recipe.blob} has codec {at.codec}, which this Helios can't place")
            if at.object_key not in numbers:
                numbers[at.object_key] = len(objects)
                objects.append(PlacedObject(at.object_key, *describe(at.object_key)))
            number = numbers[at.object_key]
            if end == (number, at.offset):
                runs[-1] = msgspec.structs.replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(Run(index, 1, number, at.offset))
            end = (number, at.offset + at.encoded_length)
        placement = cls(recipe.blob, version, lease_s, objects, runs)
        PlacedBlob(recipe, placement)
        return placement


@dataclass(frozen=True, slots=True)
class Segment:
    """Chunks ``first`` to ``first + count`` lie in bytes ``offset`` to ``offset + length`` of ``object``."""

    object: PlacedObject
    offset: int
    length: int
    first: int
    count: int


class PlacedBlob:
    """A placement that was checked against its recipe: what a reader asks where a chunk lies."""

    def __init__(self, recipe: Recipe, placement: Placement) -> None:
        """Raises IntegrityError unless every chunk is placed exactly once, in order, inside its object."""
        self.recipe = recipe
        self.placement = placement
        self._firsts = array("Q")
        if placement.blob != recipe.blob:
            raise IntegrityError(f"asked where {recipe.blob} lies, was told about {placement.blob[:80]!r}")
        for placed in placement.objects:
            self._check_object(placed)
        covered = 0
        for run in placement.runs:
            self._check_run(run, covered)
            self._firsts.append(covered)
            covered += run.count
        if covered != len(recipe):
            raise self._bad(f"{covered} chunks are placed, but the recipe has {len(recipe)}")

    def locate(self, index: int) -> tuple[PlacedObject, int, int]:
        """Object, offset in it and encoded length of chunk ``index``."""
        run = self.placement.runs[bisect_right(self._firsts, index) - 1]
        start, end = self.recipe.span(index)
        return self.placement.objects[run.object], run.offset + start - self._start(run.first), end - start

    def segments(self, chunks: range) -> Iterator[Segment]:
        """Where consecutive chunks lie, as few segments as possible, in order."""
        first = chunks.start
        while first < chunks.stop:
            run = self.placement.runs[bisect_right(self._firsts, first) - 1]
            stop = min(chunks.stop, run.first + run.count)
            start = self._start(first)
            yield Segment(
                self.placement.objects[run.object],
                run.offset + start - self._start(run.first),
                self._start(stop) - start,
                first,
                stop - first,
            )
            first = stop

    def _start(self, index: int) -> int:
        return self.recipe.ends[index - 1] if index else 0

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(f"the placement of {self.recipe.blob} is wrong: {why}")

    def _check_object(self, placed: PlacedObject) -> None:
        try:
            check_key(placed.key)
        except InvalidInput as error:
            raise self._bad(str(error)) from None
        if not _URL.match(placed.url):
            raise self._bad(f"{placed.url[:200]!r} is not an address: absolute with http(s), or from the root")
        if not 0 <= placed.size < 1 << 63:
            raise self._bad(f"the object {placed.key} has {placed.size} bytes")

    def _check_run(self, run: Run, covered: int) -> None:
        if run.codec != NO_CODEC or run.key is not None or run.encoded is not None:
            raise self._bad(f"it uses codec {run.codec[:40]!r} or a key, which this Helios does not know; upgrade it")
        if run.first != covered or not 0 < run.count <= len(self.recipe) - covered:
            raise self._bad(f"a run of {run.count} chunks from number {run.first} follows {covered} placed chunks")
        if not 0 <= run.object < len(self.placement.objects):
            raise self._bad(f"a run names object number {run.object} of {len(self.placement.objects)}")
        size = self.placement.objects[run.object].size
        length = self._start(run.first + run.count) - self._start(run.first)
        if not 0 <= run.offset <= size - length:
            raise self._bad(f"a run of {length} bytes at {run.offset} leaves its object of {size} bytes")


class _Head(msgspec.Struct):
    format: int = FORMAT
