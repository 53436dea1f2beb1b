"""Answers from the catalog: blocking, called in worker threads."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from helios.errors import (
    EntryNotFound,
    IntegrityError,
    InvalidInput,
    NotFound,
    Quarantined,
    RepoNotFound,
    Retired,
    RevisionNotFound,
)
from helios.names import RepoId
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from heliosfs.store.placement import PlacedBlob
from heliosfs.store.safetensors import header_length
from registry.access import Access
from registry.cache import Cache
from registry.card import MAX_CARD, read_card
from registry.catalog import Catalog, RepoInfo
from registry.hub import shapes
from registry.hub.asked import repo_of
from registry.hub.lists import Wanted, pick
from registry.hub.paths import HubCall
from registry.hub.shapes import Json
from registry.hub.tree import Node, Tree
from registry.mirror.mirror import Mirror
from registry.mirror.state import Mirrored
from registry.pull.names import kind_in, short
from registry.xet.layouts import Layouts

TREES = 64
"""Snapshots whose tree is kept in memory; one of a thousand files takes some 300 KB."""
HISTORY = 100
"""How many commits back the last change of a file is looked for; older changes are shown as the oldest of these."""
CARDS = 1024
"""Cards kept in memory, by the blob of their README."""
SUMMARIES = 4096
"""Summaries kept in memory of commits of which only the listing is sure to be here."""
MAX_INDEX = 64 << 20
"""Longest index of a sharded model, in bytes."""
DEFAULT_REVISION = "main"

log = logging.getLogger("helios.registry.hub")


class EntryMissing(EntryNotFound):
    """A path that a commit does not have; clients remember that under the commit."""

    def __init__(self, message: str, commit: str) -> None:
        super().__init__(message)
        self.commit = commit


@dataclass(frozen=True, slots=True)
class Found:
    """A reading of the request's path whose repository and revision are held."""

    call: HubCall
    repo: RepoId
    commit: str
    manifest: Manifest
    digest: str
    mirrored: Mirrored | None = None
    """Set where only the listing is sure to be here."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a commit and where its bytes lie; ``placed`` is None where only its metadata is wanted, or is here.

    ``xet`` is its hash in the Xet protocol, where clients are told to use that.
    """

    commit: str
    entry: FileEntry
    placed: PlacedBlob | None
    xet: str | None = None


class Lookup:
    """What the Hub's calls look up. Threads may share it."""

    def __init__(self, catalog: Catalog, mirror: Mirror, layouts: Layouts) -> None:
        """``layouts`` say which files clients are told to get over Xet."""
        self._catalog, self._mirror, self._layouts = catalog, mirror, layouts
        self._trees: Cache[str, Tree] = Cache(TREES)
        self._cards: Cache[str, Json] = Cache(CARDS)
        self._summaries: Cache[tuple[str, str], Json] = Cache(SUMMARIES)

    def find(self, readings: Sequence[HubCall]) -> Found:
        """The first reading whose repository and revision exist; else the error of the likeliest one."""
        problem: NotFound | None = None
        for call in readings:
            try:
                repo = repo_of(call)
                return self._find(call, repo, call.revision or DEFAULT_REVISION)
            except (RepoNotFound, RevisionNotFound) as error:
                problem = problem or error
        assert problem is not None, "a path has at least one reading"
        raise problem

    def _find(self, call: HubCall, repo: RepoId, revision: str) -> Found:
        """What is held, or else what is known of the upstream's."""
        revision = self._mirror.commit_of(repo, revision) or revision
        try:
            commit, digest = self._resolve(repo, revision)
        except (RepoNotFound, RevisionNotFound):
            mirrored = self._mirror.snapshot(repo, revision)
            if mirrored is None:
                raise
            return Found(call, repo, revision, mirrored.manifest, mirrored.digest, mirrored)
        return Found(call, repo, commit, self._catalog.contents.manifest(repo, commit), digest)

    def info(self, readings: Sequence[HubCall], *, blobs: bool, security: bool, expand: Sequence[str]) -> Json:
        item = self._info(self.find(readings), blobs=blobs, security=security)
        return pick(item, [*expand, "securityRepoStatus"]) if expand else item

    def _info(self, found: Found, *, blobs: bool = False, security: bool = False) -> Json:
        record = self._history(found, 1)[0]
        card = self._card(found.repo, found.manifest) if found.mirrored is None else found.mirrored.card
        restricted = self._mirror.restricted(found.repo)
        return shapes.info(
            found.repo, record, found.manifest, card, blobs=blobs, security=security, restricted=restricted
        )

    def repo(self, readings: Sequence[HubCall]) -> RepoId:
        """The first reading's repository that is held or followed. Raises RepoNotFound."""
        problem: RepoNotFound | None = None
        for call in readings:
            try:
                repo = repo_of(call)
                if not self._mirror.refs(repo):
                    self._catalog.refs(repo)
                return repo
            except RepoNotFound as error:
                problem = problem or error
        assert problem is not None, "a path has at least one reading"
        raise problem

    def refs(self, repo: RepoId, *, include_prs: bool) -> Json:
        """The refs that are here, those that are followed as they are here, and the upstream's others."""
        listed, followed = self._mirror.listed_refs(repo, requests=include_prs), self._mirror.refs(repo)
        held, kinds = {}, {}
        if not followed or self._holds(repo):
            held, kinds = self._catalog.refs(repo), self._catalog.ref_kinds(repo)
        targets = {ref: commit for ref, commit in listed.items() if short(ref) not in held}
        for name, commit in held.items():
            if name not in followed:
                targets[shapes.full_name(name, kinds.get(name, "branch"))] = commit
        for name, commit in followed.items():
            kind = kind_in(listed, name)
            targets[shapes.full_name(name, kind if kind == "tag" else kinds.get(name, kind))] = commit
        return shapes.refs(targets, include_prs=include_prs)

    def file(self, readings: Sequence[HubCall], *, bytes_too: bool) -> tuple[Found, File]:
        """The file at the path. Raises EntryMissing when the commit has none."""
        found = self.find(readings)
        entry = found.manifest.files.get(found.call.path)
        if entry is None:
            raise _missing(found, found.call.path)
        placed = None
        if found.mirrored is not None:
            placed = self._mirror.placed(found.mirrored, found.call.path) if bytes_too else None
        elif bytes_too:
            placed = self._catalog.contents.placed(found.repo, entry.sha256)
        else:
            self._catalog.contents.held(found.repo, entry.sha256)  # what is kept back has no head either
        return found, File(found.commit, entry, placed, self._hashes(found, [entry]).get(entry.sha256))

    def file_now(self, readings: Sequence[HubCall]) -> tuple[Found, File] | None:
        """``file``, its metadata only, if the likeliest reading is in memory. Does not block: for the event loop.

        None, too, for a file that may have to be announced over Xet: that is looked up.
        """
        call = readings[0]
        try:
            repo = repo_of(call)
        except RepoNotFound:
            return None
        revision = call.revision or DEFAULT_REVISION
        resolved = self._catalog.resolved_now(repo, revision) if self._mirror.is_own(repo, revision) else None
        if resolved is None:
            return None
        hot = self._catalog.contents.hot(repo, resolved, call.path)
        if hot is None or self._layouts.concerns(hot[1]):
            return None
        manifest, entry = hot
        found = Found(call, repo, resolved.commit, manifest, resolved.manifest_digest)
        return found, File(resolved.commit, entry, None)

    def listing(
        self, readings: Sequence[HubCall], *, recursive: bool, expand: bool, after: str, limit: int
    ) -> tuple[Found, list[Json], str | None]:
        """A page of the directory at the path and, where more follows, the path after which the next page starts."""
        found = self.find(readings)
        below = found.call.path.strip("/")
        tree = self._tree(found.digest, found.manifest)
        node = tree.get(below)
        if node is None or isinstance(node, FileEntry):
            raise _missing(found, below, "a file, not a directory" if node is not None else None)
        page, more = tree.listing(below, recursive=recursive, after=after, limit=limit)
        return found, self._items(found, page, expand), page[-1][0] if more else None

    def paths(self, readings: Sequence[HubCall], paths: Iterable[str], *, expand: bool) -> tuple[Found, list[Json]]:
        """Those of the paths that exist, as in listings."""
        found = self.find(readings)
        tree = self._tree(found.digest, found.manifest)
        nodes = {path.strip("/"): tree.get(path.strip("/")) for path in paths}
        known = [(path, node) for path, node in nodes.items() if path and node is not None]
        return found, self._items(found, known, expand)

    def commits(self, found: Found, *, skip: int, limit: int, formatted: bool) -> tuple[list[Json], bool]:
        """A page of the history, newest first, and whether more follows."""
        records = self._history(found, skip + limit + 1)[skip:]
        return [shapes.commit_item(record, formatted=formatted) for record in records[:limit]], len(records) > limit

    def safetensors(self, found: Found) -> Json:
        """The index at the path and the header of every shard that it names, at the default revision."""
        index = self._json(found, found.call.path)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InvalidInput(f"{found.call.path!r} of {found.repo.id} is not the index of a safetensors model")
        directory = found.call.path.rpartition("/")[0]
        headers = {}
        for shard in sorted(set(shards.values())):
            path = f"{directory}/{shard}" if directory else shard
            entry = found.manifest.files.get(path)
            if entry is None:
                raise _missing(found, path)
            reader = self._catalog.contents.blob_reader(found.repo, entry.sha256)
            length = header_length(reader.read(0, 8), entry.size, path)
            headers[shard] = json.loads(reader.read(8, length))
        return {"index": {key: value for key, value in index.items() if key != "weight_map"}, "headers": headers}

    def lfs_files(self, readings: Sequence[HubCall]) -> list[Json]:
        """The LFS files of the default revision."""
        found = self.find(readings)
        record = self._history(found, 1)[0]
        files = sorted(found.manifest.files.items())
        return [shapes.lfs_file(path, entry, record) for path, entry in files if entry.lfs]

    def repos(
        self, kind: str, access: Access, wanted: Wanted, *, authorization: str | None, after: str, limit: int
    ) -> tuple[list[Json], str | None]:
        """A page of the repositories that the caller may see, and the cursor of the next one.

        ``authorization`` is what he shows an upstream: restricted repositories are for whom it has let in lately.
        """
        key, _, last = after.rpartition("\n")
        # Not everybody may know that it is here.
        hidden = set() if access.trusted else self._mirror.hidden_from(authorization)
        known = (h for h in self._known(kind) if str(h.repo) not in hidden)
        held = {h.repo.id: h for h in known if access.visible(h.repo) and wanted.names(h.repo)}
        items: dict[str, Json] = {}
        if wanted.sort:
            items = {id_: item for id_, each in held.items() if (item := self._summary(each)) is not None}
        positions = wanted.order([(wanted.key(items[id_]), id_) for id_ in items] if items else [("", i) for i in held])
        out: list[tuple[tuple[str, str], Json]] = []
        for position in positions:
            if after and not wanted.follows(position, (key, last)):
                continue
            item = items.get(position[1]) or self._summary(held[position[1]])
            if item is None or not wanted.takes(item):
                continue
            if len(out) == limit:
                return [each for _, each in out], "\n".join(out[-1][0])
            out.append((position, self._listed(held[position[1]], item, wanted)))
        return [each for _, each in out], None

    def _known(self, kind: str) -> list[RepoInfo]:
        """What is held, and what is followed whether its files are here or not."""
        followed = self._mirror.followed_repos(kind)
        out = []
        for held in self._catalog.repos(kind):
            refs = followed.pop(held.repo, {})
            out.append(replace(held, refs={**refs, **held.refs}))
        return out + [RepoInfo(repo, refs, 0, 0, {}) for repo, refs in followed.items()]

    def _summary(self, held: RepoInfo) -> Json | None:
        """A repository in a list, at its default revision; None when nothing of it has a name any more."""
        commit = _shown(held)
        if commit is None:
            return None
        try:
            record = self._catalog.commit_record(held.repo, commit)
        except (RepoNotFound, RevisionNotFound):
            try:
                item = self._summaries.get((str(held.repo), commit), lambda: self._summary_of(held.repo, commit))
            except RevisionNotFound:
                return None
        else:
            try:
                card = self._card(held.repo, self._catalog.contents.manifest(held.repo, commit))
            except Retired:  # nobody is to find it any more; the list goes on
                return None
            item = shapes.summary(held.repo, record, card)
        return item | {"gated": "auto"} if self._mirror.restricted(held.repo) else item

    def _summary_of(self, repo: RepoId, commit: str) -> Json:
        """The same of a commit of which the listing is known."""
        mirrored = self._mirror.snapshot(repo, commit)
        if mirrored is None:
            raise RevisionNotFound(f"nothing is known of {repo.id}@{commit}")
        return shapes.summary(repo, mirrored.record, mirrored.card)

    def _listed(self, held: RepoInfo, summary: Json, wanted: Wanted) -> Json:
        """The summary with what else the list should tell."""
        if not (wanted.full or wanted.card or wanted.expand):
            return summary
        call = HubCall("info", held.repo.kind, held.repo.id, summary["sha"])
        whole = self._info(self._find(call, held.repo, summary["sha"]))
        if wanted.expand:
            return pick(whole, wanted.expand)
        return whole if wanted.full else summary | {"cardData": whole.get("cardData", {})}

    def _card(self, repo: RepoId, manifest: Manifest) -> Json:
        entry = manifest.files.get("README.md")
        return {} if entry is None else self._cards.get(entry.sha256, lambda: self._load_card(repo, entry))

    def _load_card(self, repo: RepoId, entry: FileEntry) -> Json:
        try:
            return read_card(self._catalog.contents.blob_reader(repo, entry.sha256).read(0, min(entry.size, MAX_CARD)))
        except (IntegrityError, Quarantined) as error:  # whoever downloads the README is told; a listing goes on
            log.warning("a card can't be read", extra={"repo": str(repo), "error": error.message})
            return {}

    def _json(self, found: Found, path: str) -> Json:
        """A small JSON object among the files."""
        entry = found.manifest.files.get(path)
        if entry is None:
            raise _missing(found, path)
        if found.mirrored is not None:
            raise _missing(found, path, "not here before somebody has downloaded all files")
        if entry.size > MAX_INDEX:
            raise InvalidInput(f"{path!r} has {entry.size} bytes; an index has {MAX_INDEX} at most")
        try:
            data = json.loads(self._catalog.contents.blob_reader(found.repo, entry.sha256).read(0, entry.size))
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise InvalidInput(f"{path!r} of {found.repo.id} is not a JSON object")
        return data

    def _resolve(self, repo: RepoId, revision: str) -> tuple[str, str]:
        try:
            resolved = self._catalog.resolve(repo, revision)
        except InvalidInput as error:
            raise RevisionNotFound(error.message) from None
        return resolved.commit, resolved.manifest_digest

    def _hashes(self, found: Found, entries: Iterable[FileEntry]) -> dict[str, str]:
        """Xet hashes, by sha256, of those files that clients are told to get over Xet."""
        if (mirrored := found.mirrored) is not None:
            concerned = [entry for entry in entries if self._layouts.concerns(entry)]
            entries = [entry for entry in concerned if self._mirror.at_once(mirrored, entry.sha256)]
        return self._layouts.announced(found.repo, entries)

    def _history(self, found: Found, limit: int) -> list[CommitRecord]:
        """Records from the commit back; of one that is only known from the upstream, its own."""
        if found.mirrored is not None:
            return [found.mirrored.record]
        return self._catalog.history(found.repo, found.commit, limit)

    def _holds(self, repo: RepoId) -> bool:
        try:
            self._catalog.refs(repo)
        except RepoNotFound:
            return False
        return True

    def _tree(self, digest: str, manifest: Manifest) -> Tree:
        return self._trees.get(digest, lambda: Tree(manifest))

    def _items(self, found: Found, nodes: list[tuple[str, Node]], expand: bool) -> list[Json]:
        xet = self._hashes(found, (node for _, node in nodes if isinstance(node, FileEntry)))
        items = [shapes.tree_item(path, node, xet) for path, node in nodes]
        if expand:
            last = self._last_changes(found, dict(nodes))
            return [item | shapes.expansion(last[path], node) for item, (path, node) in zip(items, nodes, strict=True)]
        return items

    def _last_changes(self, found: Found, nodes: dict[str, Node]) -> dict[str, CommitRecord]:
        """The oldest commit since which each path has its present content."""
        history = self._history(found, HISTORY)
        last = dict.fromkeys(nodes, history[0])
        left = dict(nodes)
        for record in history[1:]:
            tree = self._tree(record.manifest, self._catalog.contents.manifest(found.repo, record.commit))
            left = {path: node for path, node in left.items() if tree.get(path) == node}
            last.update(dict.fromkeys(left, record))
            if not left:
                break
        return last


def _shown(held: RepoInfo) -> str | None:
    """The commit that a list shows of a repository."""
    return held.refs.get(DEFAULT_REVISION) or next(iter(held.refs.values()), None)


def _missing(found: Found, path: str, what: str | None = None) -> EntryMissing:
    where = f"{found.repo.id}@{found.commit}"
    return EntryMissing(f"{path!r} is {what} in {where}" if what else f"{where} has no {path!r}", found.commit)
