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
from urllib.parse import urlsplit

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, InvalidInput
from heliosfs.store import codec as codecs
from heliosfs.store.keys import check_key
from heliosfs.store.recipe import Recipe

FORMAT: Final = 1
"""Version of the JSON form."""

NO_CODEC: Final = codecs.NONE

MAX_LEASE_S: Final = 31_536_000
"""Longest lease of a placement, in seconds: a year."""

_URL = re.compile(r"(/|https?://)[!-~]*\Z")


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where one chunk lies: bytes ``offset`` to ``offset + encoded_length`` of an object.

    ``length`` is the chunk's own length in bytes, ``encoded_length`` what it takes in the object after ``codec``
    (heliosfs/store/codec.py) and, with a ``key`` id, encryption, which this version does not know.
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
    """``count`` chunks from number ``first`` lie back to back in object number ``object`` from byte ``offset``, all in
    the same ``codec``.

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
            head = from_json(data, _Head)
            if head.format != FORMAT:
                raise IntegrityError(f"placement format {head.format} is newer than this Helios; upgrade it")
            return from_json(data, cls)
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
        encoded: list[int] = []  # lengths of the chunks of the last run
        end: tuple[int, int, str] | None = None  # object number and offset where the last run ends, and its codec
        for index, at in enumerate(locations):
            if at.key is not None:
                raise IntegrityError(f"a chunk of {recipe.blob} is encrypted, which this Helios can't place")
            if at.object_key not in numbers:
                numbers[at.object_key] = len(objects)
                objects.append(PlacedObject(at.object_key, *describe(at.object_key)))
            number = numbers[at.object_key]
            if end == (number, at.offset, at.codec):
                encoded.append(at.encoded_length)
                lengths = None if at.codec == NO_CODEC else encoded
                runs[-1] = msgspec.structs.replace(runs[-1], count=runs[-1].count + 1, encoded=lengths)
            else:
                encoded = [at.encoded_length]
                lengths = None if at.codec == NO_CODEC else encoded
                runs.append(Run(index, 1, number, at.offset, at.codec, None, lengths))
            end = (number, at.offset + at.encoded_length, at.codec)
        placement = cls(recipe.blob, version, lease_s, objects, runs)
        PlacedBlob(recipe, placement)
        return placement


@dataclass(frozen=True, slots=True)
class Segment:
    """Chunks ``first`` to ``first + count`` lie back to back in bytes ``offset`` to ``offset + length`` of ``object``.

    With a ``codec`` other than ``none`` these bytes are not the blob's: ``PlacedBlob.locate`` says where each chunk is.
    """

    object: PlacedObject
    offset: int
    length: int
    first: int
    count: int
    codec: str = NO_CODEC

    @property
    def plain(self) -> bool:
        """Whether the bytes are the blob's own."""
        return self.codec == NO_CODEC


class PlacedBlob:
    """A placement that was checked against its recipe: what a reader asks where a chunk lies."""

    def __init__(self, recipe: Recipe, placement: Placement) -> None:
        """Raises IntegrityError unless every chunk is placed exactly once, in order, inside its object."""
        self.recipe = recipe
        self.placement = placement
        self._firsts = array("Q")
        self._ends: dict[int, array[int]] = {}
        """By the first chunk of each run that is encoded: where its chunks end, from the run's offset."""
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

    @property
    def plain(self) -> bool:
        """Whether no chunk is encoded."""
        return not self._ends

    def locate(self, index: int) -> ChunkLocation:
        """Where chunk ``index`` lies."""
        run = self._run(index)
        low, high = self._bounds(run, index, index + 1)
        start, end = self.recipe.span(index)
        key = self.placement.objects[run.object].key
        return ChunkLocation(key, run.offset + low, end - start, high - low, run.codec, run.key)

    def segments(self, chunks: range) -> Iterator[Segment]:
        """Where consecutive chunks lie, as few segments as possible, in order."""
        first = chunks.start
        while first < chunks.stop:
            run = self._run(first)
            stop = min(chunks.stop, run.first + run.count)
            low, high = self._bounds(run, first, stop)
            object_ = self.placement.objects[run.object]
            yield Segment(object_, run.offset + low, high - low, first, stop - first, run.codec)
            first = stop

    def _run(self, index: int) -> Run:
        return self.placement.runs[bisect_right(self._firsts, index) - 1]

    def _bounds(self, run: Run, first: int, stop: int) -> tuple[int, int]:
        """Where chunks ``first`` to ``stop`` of a run begin and end, from the run's offset."""
        ends = self._ends.get(run.first)
        if ends is None:
            base = self._start(run.first)
            return self._start(first) - base, self._start(stop) - base
        before = first - run.first
        return (ends[before - 1] if before else 0), ends[stop - run.first - 1]

    def _start(self, index: int) -> int:
        return self.recipe.ends[index - 1] if index else 0

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(f"the placement of {self.recipe.blob} is wrong: {why}")

    def _check_object(self, placed: PlacedObject) -> None:
        try:
            check_key(placed.key)
        except InvalidInput as error:
            raise self._bad(str(error)) from None
        if not _is_address(placed.url):
            raise self._bad(f"{placed.url[:200]!r} is not an address: absolute with http(s), or from the root")
        if not 0 <= placed.size < 1 << 63:
            raise self._bad(f"the object {placed.key} has {placed.size} bytes")

    def _check_run(self, run: Run, covered: int) -> None:
        if run.key is not None:
            raise self._bad(f"it uses the key {run.key[:40]!r}, which this Helios does not know; upgrade it")
        if run.first != covered or not 0 < run.count <= len(self.recipe) - covered:
            raise self._bad(f"a run of {run.count} chunks from number {run.first} follows {covered} placed chunks")
        if not 0 <= run.object < len(self.placement.objects):
            raise self._bad(f"a run names object number {run.object} of {len(self.placement.objects)}")
        if run.codec != NO_CODEC or run.encoded is not None:
            self._ends[run.first] = self._encoded_ends(run)
        size = self.placement.objects[run.object].size
        length = self._bounds(run, run.first, run.first + run.count)[1]
        if not 0 <= run.offset <= size - length:
            raise self._bad(f"a run of {length} bytes at {run.offset} leaves its object of {size} bytes")

    def _encoded_ends(self, run: Run) -> array[int]:
        encoded = run.encoded
        if run.codec == NO_CODEC or encoded is None or len(encoded) != run.count:
            given = "no" if encoded is None else len(encoded)
            raise self._bad(f"{given} encoded lengths for a run of {run.count} chunks in codec {run.codec[:40]!r}")
        ends, end = array("Q"), 0
        for index, length in enumerate(encoded, run.first):
            start, stop = self.recipe.span(index)
            try:
                codecs.check(run.codec, stop - start, length)
            except IntegrityError as error:
                raise self._bad(error.message) from None
            end += length
            ends.append(end)
        return ends


def _is_address(url: str) -> bool:
    """Whether the text is a path from the root, or an http(s) URL with a host, whose port, if any, is a number."""
    if not _URL.match(url):
        return False
    try:
        parts = urlsplit(url)
        return not parts.scheme or (bool(parts.hostname) and parts.port != 0)
    except ValueError:
        return False


class _Head(msgspec.Struct):
    format: int = FORMAT
