"""Files of a push that are offered by their recipes: what of them must travel, and putting them together.

Nothing is believed: a file that is put together is hashed like any other, its sha256 included. Chunks that are found
here are claimed by the push, so they stay until they are needed; where one has gone all the same, the next question
names it again.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from blake3 import blake3

from helios.errors import IntegrityError, InvalidInput, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.batch import Chunk
from heliosfs.store.chunks import good
from heliosfs.store.cutting import cut, extension
from heliosfs.store.manifest import FileEntry, git_blob_oid, lfs_pointer
from heliosfs.store.placement import ChunkLocation
from heliosfs.store.recipe import Recipe
from registry.access import Lister
from registry.catalog import Catalog
from registry.ingest import IngestedBlob
from registry.ingest.kinds import is_lfs
from registry.ingest.writer import KNOWN_SHIFT
from registry.possession import Possession
from registry.push_log import Announced, PushLog
from registry.receiver import OwnSource
from registry.sessions import Session
from registry.transfer.compose import Composed, lacking, locate

log = logging.getLogger("helios.registry.pushes")

NOBODY: Final = "0" * 64
"""The blob of chunks that make up none."""


@dataclass(frozen=True, slots=True)
class Lacking:
    """Chunks that the registry needs first: runs of them as (first number, count), each chunk once.

    ``whole``: hardly any other one is here, so the whole file had better be sent.
    """

    missing: list[tuple[int, int]]
    whole: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What an offer comes to: the file's ``entry``, as it is stored already; or what is ``lacking``; or neither: it can
    be put together from its chunks at ``places``."""

    recipe: Recipe
    entry: FileEntry | None = None
    lacking: Lacking | None = None
    places: list[ChunkLocation | None] = field(default_factory=list)


def decode(record: bytes, file: Announced) -> Recipe:
    """An offered recipe. Raises InvalidInput for one that is damaged or of a file of another size."""
    try:
        recipe = Recipe.decode(record)
    except IntegrityError as error:
        raise InvalidInput(f"{file.path}: {error.message}") from None
    if recipe.size != file.size:
        raise InvalidInput(f"{file.path}: its recipe is of {recipe.size} bytes, {file.size} were announced")
    return recipe


class Offers:
    """Blocking; called in threads."""

    def __init__(self, catalog: Catalog, log_: PushLog) -> None:
        self._catalog, self._log, self._possession = catalog, log_, Possession(catalog)

    def look(self, push: str, repo: RepoId, session: Session, file: Announced, record: bytes, sight: Lister) -> Found:
        """What must travel. Raises InvalidInput for a recipe that makes no sense."""
        recipe = decode(record, file)
        sent = self._log.sent(push)
        if recipe.blob in sent or self._possession.may_name(sight, repo, recipe.blob):
            entry = self._as_it_is(session, file, recipe.blob)
            if entry is not None:
                return Found(recipe, entry)
        places = self._possession.chunks(
            sight, session.name, session.domain, sent.values(), recipe, locate(session.index, session.domain, recipe)
        )
        try:
            missing = lacking(places, recipe)
        except IntegrityError as error:
            raise InvalidInput(f"{file.path}: {error.message}") from None
        if missing:
            return Found(recipe, lacking=_lacking(recipe, missing))
        return Found(recipe, places=places)

    def known(self, push: str, session: Session, chunks: Sequence[Chunk], sight: Lister) -> int:
        """How many of some chunks are here, as far as the caller may name them."""
        asked = Recipe.build(NOBODY, chunks)
        places = locate(session.index, session.domain, asked)
        own = self._log.sent(push).values()
        may = self._possession.chunks(sight, session.name, session.domain, own, asked, places)
        return sum(place is not None for place in may)

    def _as_it_is(self, session: Session, file: Announced, sha256: str) -> FileEntry | None:
        """The line for a manifest of a stored blob, the same as if it was sent, or None where that takes its bytes."""
        if not is_lfs(file.path, file.size, b""):
            return None  # what git makes of it depends on its content; it is small
        known = session.reuse(sha256)
        if known is None or known.size != file.size:
            return None
        if extension(file.path) == "safetensors":
            reader = self._catalog.contents.stored_blob(session.domain, sha256)
            cut(file.path, file.size, lambda count: reader.read(0, count))
        oid = git_blob_oid(lfs_pointer(sha256, file.size))
        return FileEntry(sha256, file.size, oid, known.recipe, True, file.executable)

    def compose(self, session: Session, file: Announced, found: Found, source: OwnSource) -> IngestedBlob:
        """Store a file whose chunks are all here. Raises InvalidInput where its recipe lies about the whole."""
        recipe = found.recipe
        source.inner = Composed(self._catalog.store, recipe, found.places, io.BytesIO())
        try:
            return session.ingest(
                file.path, file.size, source, executable=file.executable, expect_sha256=recipe.blob, stored=True
            )
        except (IntegrityError, NotFound) as error:
            self._check_chunks(file, found, source)
            raise InvalidInput(
                f"{file.path}: its recipe names the sha256 {recipe.blob}, but its chunks are those of another file"
            ) from error

    def _check_chunks(self, file: Announced, found: Found, source: OwnSource) -> None:
        """Look at the chunks that are stored, after they did not make up the file.

        Raises IntegrityError where one is damaged, Unavailable where that could be repaired from another copy.
        """
        recipe, healed = found.recipe, False
        buffer = memoryview(bytearray(max((length for _, length in recipe.chunks()), default=0)))
        for index, (id_, length) in enumerate(recipe.chunks()):
            place = found.places[index]
            assert place is not None
            part = Recipe.build(recipe.blob, [(id_, length)])
            source.inner = Composed(self._catalog.store, part, [place], io.BytesIO())
            if _is_good(source, buffer[:length], id_):
                continue
            if not self._catalog.store.heal(place.object_key, place.offset, place.encoded_length, good(place, id_)):
                log.error(
                    "a chunk in the store is damaged",
                    extra={"path": file.path, "chunk": id_.hex(), "object": place.object_key},
                )
                raise IntegrityError(
                    f"{file.path}: chunk {index} is damaged in the registry's store",
                    hint="Whoever runs the registry repairs it: helios store verify --repair. Then push again.",
                )
            healed = True
        if healed:
            raise Unavailable(f"{file.path}: a damaged chunk was repaired", hint="Ask again.")


def _is_good(source: OwnSource, buffer: memoryview, id_: bytes) -> bool:
    done = 0
    try:
        while done < len(buffer):
            done += source.readinto(buffer[done:])
    except (IntegrityError, NotFound):
        return False
    return blake3(buffer).digest() == id_


def _lacking(recipe: Recipe, missing: Sequence[int]) -> Lacking:
    """Runs of the chunks that must travel, each once, and whether most of the file must."""
    runs: list[tuple[int, int]] = []
    seen: set[bytes] = set()
    travelling = 0
    for index in missing:
        id_ = recipe.id(index)
        if id_ in seen:
            continue
        seen.add(id_)
        start, end = recipe.span(index)
        travelling += end - start
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    # As an ingest decides whether a blob becomes one object of its own (registry/ingest/writer.py).
    return Lacking(runs, whole=recipe.size - travelling <= recipe.size >> KNOWN_SHIFT)
