"""Bundles: commits with everything they need in one file, for registries that no network reaches.

A bundle is a tar archive (GNU's form, for files of more than 8 GiB), written and read as a stream (docs/format.md):

    helios-bundle             JSON: format, per commit its repository, refs, and the blobs that are left out; notices
    commits/<n>               the commit record
    manifests/<n>             the manifest
    recipes/<sha256>          a blob's recipe...
    blobs/<sha256>            ...and behind it the blob

Each blob once, before the end of the first commit that needs it. A bundle made for somebody who has other commits
leaves their blobs out (``have``); where they are missing after all the import says which.
"""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, NotFound, Retired
from helios.names import RepoId, check_ref
from heliosfs.store.bulk import MAX_MANIFEST
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from heliosfs.store.recipe import MAX_RECIPE, Recipe
from registry.catalog import Catalog
from registry.ingest import Source
from registry.metadata.notices import Notice
from registry.sessions import Sessions
from registry.transfer.arrive import MAX_RECORD, Arrivals, Arrived, check_record
from registry.transfer.refs import check_kind

FORMAT: Final = 2
"""Since 2 with the refs' kinds and with notices; 1 is read, too."""
AUTHOR: Final = "bundle"
"""Who moves refs here and puts notices up."""
HEAD: Final = "helios-bundle"
MAX_HEAD: Final = 16 << 20


class Piece(msgspec.Struct, frozen=True):
    """One commit of a bundle; ``refs`` point at it, of ``kinds`` where they are no branches; ``known`` are blobs
    (sha256) that the receiver has."""

    repo: str
    commit: str
    refs: list[str]
    known: list[str] = []
    kinds: dict[str, str] = {}


class Noticed(msgspec.Struct, frozen=True):
    """What is deprecated or retired of a repository."""

    repo: str
    notices: list[Notice]


class Head(msgspec.Struct, frozen=True):
    """The first member."""

    commits: Annotated[list[Piece], msgspec.Meta(max_length=10_000)]
    format: int = FORMAT
    notices: Annotated[list[Noticed], msgspec.Meta(max_length=10_000)] = []


class Readable(Protocol):
    """What an import reads from: blocks, with a deadline of its own."""

    def read(self, count: int, /) -> bytes: ...


# --- export


def export(
    catalog: Catalog, wanted: Sequence[tuple[RepoId, str]], have: Sequence[tuple[RepoId, str]] = ()
) -> Iterator[bytes]:
    """A bundle of revisions, piece by piece, without the blobs of the revisions in ``have``; with the notices of the
    repositories of both.

    Every chunk is checked as it leaves. Raises RepoNotFound, RevisionNotFound, Retired or Quarantined before the first
    byte; a damaged chunk raises IntegrityError in the middle, and what was written then is no bundle: it lacks its end.
    """
    known: set[str] = set()
    for repo, rev in have:
        with contextlib.suppress(Retired):  # the other side has it, and is to hear of that
            commit = catalog.resolve(repo, rev).commit
            known |= {entry.sha256 for entry in catalog.contents.manifest(repo, commit).files.values()}
    plan = [(repo, rev, catalog.resolve(repo, rev).commit) for repo, rev in wanted]
    refs = {
        (repo, commit): sorted(name for name, at in catalog.refs(repo).items() if at == commit and name == rev)
        for repo, rev, commit in plan
    }
    pieces = []
    for (repo, commit), names in refs.items():
        blobs = {entry.sha256 for entry in catalog.contents.manifest(repo, commit).files.values()}
        for sha256 in blobs:
            catalog.contents.held(repo, sha256)
        kinds = {name: kind for name, kind in catalog.ref_kinds(repo).items() if name in names}
        pieces.append(Piece(str(repo), commit, names, sorted(blobs & known), kinds))
    told = {repo: catalog.notices_on(repo) for repo, _ in (*wanted, *have)}
    noticed = [Noticed(str(repo), notices) for repo, notices in told.items() if notices]
    return _write(catalog, Head(pieces, notices=noticed), known)


def _write(catalog: Catalog, head: Head, done: set[str]) -> Iterator[bytes]:
    yield from _member(HEAD, msgspec.json.encode(head))
    done = set(done)
    for number, piece in enumerate(head.commits):
        repo = RepoId.from_canonical(piece.repo)
        yield from _member(f"commits/{number}", catalog.commit_record(repo, piece.commit).encode())
        yield from _member(f"manifests/{number}", catalog.contents.manifest_bytes(repo, piece.commit))
        for _, entry in sorted(catalog.contents.manifest(repo, piece.commit).files.items()):
            if entry.sha256 in done:
                continue
            done.add(entry.sha256)
            yield from _member(f"recipes/{entry.sha256}", catalog.contents.recipe_bytes(repo, entry.sha256))
            yield _header(f"blobs/{entry.sha256}", entry.size)
            for data in catalog.contents.blob_reader(repo, entry.sha256).iterate(0, entry.size):
                yield bytes(data)
            yield _padding(entry.size)
    yield b"\0" * 2 * tarfile.BLOCKSIZE


def _member(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, len(content)) + content + _padding(len(content))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(time.time()), 0o444
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return b"\0" * (-size % tarfile.BLOCKSIZE)


# --- import


@dataclass(slots=True)
class Imported:
    """What an import did."""

    commits: list[str]
    logical_bytes: int = 0
    new_bytes: int = 0
    notices: int = 0
    """Put up and changed."""


def load(catalog: Catalog, sessions: Sessions, stream: Readable) -> Imported:
    """Bring a bundle in. A commit becomes visible when all of it is here; what came before a broken end stays.

    Notices count as ``registry.metadata.notices.heed`` says; none is taken down: a bundle may be an old one.

    Raises IntegrityError for what is no bundle, is cut short or contradicts itself, and NotFound naming a blob that the
    bundle left out and that is not here.
    """
    arrivals, members, done = Arrivals(catalog, sessions), _Members(stream), Imported([])
    head = _decode_head(members.content(HEAD, MAX_HEAD))
    done.notices += _heed(catalog, head)
    for number, piece in enumerate(head.commits):
        arrived = _load_commit(catalog, arrivals, members, number, piece)
        done.commits.append(f"{piece.repo}@{piece.commit}")
        done.logical_bytes += arrived.logical
        done.new_bytes += arrived.travelled
    done.notices += _heed(catalog, head)  # of what has come only now
    return done


def _heed(catalog: Catalog, head: Head) -> int:
    told = [(RepoId.from_canonical(each.repo), each.notices) for each in head.notices]
    return sum(catalog.heed(repo, notices, AUTHOR, complete=False).changes for repo, notices in told)


def _load_commit(catalog: Catalog, arrivals: Arrivals, members: _Members, number: int, piece: Piece) -> Arrived:
    repo = RepoId.from_canonical(piece.repo)
    refs = {check_ref(ref): check_kind(piece.kinds.get(ref, "branch"), "the bundle") for ref in piece.refs}
    record = CommitRecord.decode(members.content(f"commits/{number}", MAX_RECORD))
    check_record(repo, record)
    if record.commit != piece.commit:
        raise IntegrityError(f"a bundle announces {repo}@{piece.commit} and holds {record.commit}")
    manifest = Manifest.decode(members.content(f"manifests/{number}", MAX_MANIFEST), record.manifest)
    arrived = arrivals.bring(repo, record, manifest, _BundleOrigin(members), lambda path, done, size: None)
    for ref, kind in refs.items():
        catalog.follow_ref(repo, ref, record.commit, author=AUTHOR, kind=kind)
    return arrived


def _decode_head(data: bytes) -> Head:
    try:
        head = from_json(data, Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"this is no bundle: its head does not decode: {error}") from None
    if not 1 <= head.format <= FORMAT:
        raise IntegrityError(f"bundle format {head.format} is newer than this Helios; upgrade it")
    return head


class _Member:
    """The member that comes next: its name, and its bytes as far as they are left."""

    def __init__(self, stream: Readable, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._stream, self._left, self._padding = stream, size, -size % tarfile.BLOCKSIZE

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill some of the buffer; 0 at the member's end. Raises IntegrityError where the bundle ends before."""
        wanted = min(len(buffer), self._left)
        if not wanted:
            return 0
        data = self._stream.read(wanted)
        if not data:
            raise IntegrityError(f"the bundle is cut short in {self.name}")
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def read(self) -> bytes:
        """All that is left."""
        out = bytearray(self._left)
        done = 0
        while count := self.readinto(memoryview(out)[done:]):
            done += count
        return bytes(out)

    def skip(self, count: int | None = None) -> None:
        """Pass over so many bytes, or over all that is left and what fills the last block."""
        left = self._left if count is None else count
        scratch = memoryview(bytearray(1 << 20))
        while left:
            left -= self.readinto(scratch[: min(left, len(scratch))])
        if count is None and self._padding:
            _exactly(self._stream, self._padding, self.name)
            self._padding = 0


class _AtEnd(IntegrityError):
    """The mark that ends an archive, where a member should be."""


class _Members:
    """The archive's members in order; blobs that are here already are passed over."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._open: _Member | None = None
        self._next: _Member | None = None

    def content(self, name: str, limit: int) -> bytes:
        """The content of the next member that is no blob or recipe, which must be this one."""
        while (member := self._peek()).name.startswith(("blobs/", "recipes/")):
            self._take()
        if member.name != name or member.size > limit:
            raise IntegrityError(f"a bundle has {member.name!r} ({member.size} bytes) where {name} should be")
        return self._take().read()

    def blob(self, name: str) -> _Member:
        """A blob or recipe by its name; those before it are passed over."""
        with contextlib.suppress(_AtEnd):
            while (member := self._peek()).name.startswith(("blobs/", "recipes/")):
                self._take()
                if member.name == name:
                    return member
        raise NotFound(
            f"the bundle does not hold {name}, and it is not here either",
            hint="It was made for a registry that has more commits: import an earlier bundle first.",
        )

    def _take(self) -> _Member:
        member = self._peek()
        self._open, self._next = member, None
        return member

    def _peek(self) -> _Member:
        if self._next is None:
            if self._open is not None:
                self._open.skip()
            block = _exactly(self._stream, tarfile.BLOCKSIZE, "a header")
            if not any(block):
                raise _AtEnd("the bundle ends too early: a commit is not all there")
            try:
                info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise IntegrityError(f"this is no bundle, or it is damaged: {error}") from None
            if not info.isreg() or info.size < 0:
                raise IntegrityError(f"{info.name[:100]!r} in a bundle is no file")
            self._next = _Member(self._stream, info.name, info.size)
        return self._next


def _exactly(stream: Readable, count: int, what: str) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = stream.read(count - len(data))
        if not part:
            raise IntegrityError(f"the bundle is cut short in {what}")
        data += part
    return bytes(data)


@dataclass(frozen=True, slots=True)
class _BundleOrigin:
    members: _Members

    def recipe(self, path: str, entry: FileEntry) -> Recipe:
        member = self.members.blob(f"recipes/{entry.sha256}")
        if member.size > MAX_RECIPE:
            raise IntegrityError(f"the recipe of {path} in a bundle has {member.size} bytes")
        record = member.read()
        if hashlib.sha256(record).hexdigest() != entry.recipe:
            raise IntegrityError(f"the recipe of {path} in a bundle is not the manifest's")
        recipe = Recipe.decode(record, entry.recipe)
        if (recipe.blob, recipe.size) != (entry.sha256, entry.size):
            raise IntegrityError(f"the recipe of {path} in a bundle is of another blob")
        return recipe

    def chunks(self, path: str, recipe: Recipe, numbers: list[int], until: ExitStack) -> Source:
        member = self.members.blob(f"blobs/{recipe.blob}")
        if member.size != recipe.size:
            raise IntegrityError(f"{path} has {member.size} bytes in a bundle, {recipe.size} in its recipe")
        return _Chosen(member, recipe, numbers)


class _Chosen:
    """Some chunks of a blob that comes as a whole: the others are read and thrown away."""

    def __init__(self, member: _Member, recipe: Recipe, numbers: list[int]) -> None:
        self._member, self._recipe = member, recipe
        self._numbers = iter(numbers)
        self._at = self._end = 0

    def readinto(self, buffer: memoryview, /) -> int:
        if self._at == self._end:
            number = next(self._numbers, None)
            if number is None:
                return 0
            start, self._end = self._recipe.span(number)
            self._member.skip(start - self._at)
            self._at = start
        count = self._member.readinto(buffer[: self._end - self._at])
        self._at += count
        return count
