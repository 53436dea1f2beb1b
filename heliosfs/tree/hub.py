"""``/.hub``: every repository in the layout of the Hugging Face cache.

``models--org--name/`` holds ``refs/<ref>`` (the commit, exactly 40 characters), ``snapshots/<commit>/<path>`` (links to
``blobs``), ``blobs/<etag>`` and ``trees/<commit>.json``. With ``HF_HUB_CACHE=<mount>/.hub HF_HUB_OFFLINE=1`` every
client library finds its files there. Layout: huggingface_hub's guide "Understand caching", and ``_tree_cache.py`` of
its version 1.33.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from helios.errors import RevisionNotFound
from helios.names import RepoId, is_commit
from heliosfs.tree.commits import hub_snapshot
from heliosfs.tree.names import hub_folder, hub_repo
from heliosfs.tree.nodes import REGULAR, Absent, BlobFile, Directory, Found, Node, TextFile
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import NAME_TTL_S, Known, Source

TREE_SUFFIX = ".json"


class Hub(Directory):
    """``/.hub``."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(("hub",))

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        repo = hub_repo(name)
        if repo is None:
            return Absent(f"{name!r} is not a folder of a repository, such as models--org--name")
        refs = await source.refs(repo)
        if refs.value is None:
            return Absent(f"the registry has no {repo}", refs.absent_until)
        return Found(name, HubRepository(repo), refs.fresh_until)

    async def entries(self, source: Source) -> Iterable[Found]:
        repos = await source.repos()
        return [Found(hub_folder(repo), HubRepository(repo), repos.fresh_until) for repo in repos.value.all()]


class HubRepository(Directory):
    """``/.hub/models--org--name``."""

    __slots__ = ("parts",)

    def __init__(self, repo: RepoId) -> None:
        super().__init__(("hub-repo", str(repo)))
        self.parts: dict[str, Directory] = {
            "blobs": HubBlobs(repo),
            "refs": HubRefs(repo),
            "snapshots": HubSnapshots(repo),
            "trees": HubTrees(repo),
        }

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        if name not in self.parts:
            return Absent(f"the cache layout has no {name!r}")
        return Found(name, self.parts[name])

    async def entries(self, source: Source) -> Iterable[Found]:
        return [Found(name, node) for name, node in self.parts.items()]


class HubRefs(Directory):
    """``refs`` or a directory below it: ``refs/pr/1`` is the file ``1`` in ``refs/refs/pr``.

    A client that was given a commit asks for a ref of that name first, and then looks for the commit in the listing of
    ``snapshots`` (huggingface_hub's ``try_to_load_from_cache``). So being asked for one makes it known, and listed.
    """

    __slots__ = ("prefix", "repo")

    def __init__(self, repo: RepoId, prefix: str = "") -> None:
        super().__init__(("hub-refs", str(repo), prefix))
        self.repo, self.prefix = repo, prefix

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        if not self.prefix and is_commit(name):
            time = await source.commit_time(self.repo, name)
            return Absent(f"{name} is a commit, not a ref", time.absent_until)
        found = self._children(await source.refs(self.repo)).get(name)
        if found is not None:
            return found
        refs = await source.refs(self.repo, fresh=True)
        return self._children(refs).get(name) or Absent(
            f"{self.repo.id} has no ref {self.prefix + name!r}", refs.absent_until
        )

    async def entries(self, source: Source) -> Iterable[Found]:
        return self._children(await source.refs(self.repo)).values()

    def _children(self, refs: Known[Mapping[str, str] | None]) -> dict[str, Found]:
        """The names here. Where ``a`` and ``a/b`` are both refs, ``a`` is shown: a name is a file or a directory."""
        out: dict[str, Found] = {}
        for ref, commit in sorted((refs.value or {}).items()):
            if not ref.startswith(self.prefix):
                continue
            name, slash, _ = ref.removeprefix(self.prefix).partition("/")
            if name in out:
                continue
            if slash:
                node: Directory | TextFile = HubRefs(self.repo, f"{self.prefix}{name}/")
            else:
                key = ("hub-ref", str(self.repo), ref, commit)
                node = TextFile(key, commit.encode(), lifetime=NAME_TTL_S)
            out[name] = Found(name, node, refs.fresh_until)
        return out


class HubSnapshots(Directory):
    """``snapshots``: a directory a commit. Listed are those that refs name and those that were asked for."""

    __slots__ = ("repo",)

    def __init__(self, repo: RepoId) -> None:
        super().__init__(("hub-snapshots", str(repo)))
        self.repo = repo

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        if not is_commit(name):
            return Absent(f"{name!r} is not a commit (40 hexadecimal digits)")
        time = await source.commit_time(self.repo, name)
        if time.value is None:
            return Absent(f"{self.repo.id} has no commit {name}", time.absent_until)
        return Found(name, hub_snapshot(self.repo, name, time.value))

    async def entries(self, source: Source) -> Iterable[Found]:
        found = []
        for commit in sorted((await source.seen(self.repo)).value):
            time = (await source.commit_time(self.repo, commit)).value
            if time is not None:
                found.append(Found(commit, hub_snapshot(self.repo, commit, time)))
        return found


class HubTrees(Directory):
    """``trees``: the listing of each commit, made from its manifest."""

    __slots__ = ("repo",)

    def __init__(self, repo: RepoId) -> None:
        super().__init__(("hub-trees", str(repo)))
        self.repo = repo

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        commit = name.removesuffix(TREE_SUFFIX)
        if not (name.endswith(TREE_SUFFIX) and is_commit(commit)):
            return Absent(f"{name!r} is not <commit>.json")
        snapshot = await source.snapshot(self.repo, commit)
        if snapshot.value is None:
            return Absent(f"{self.repo.id} has no commit {commit}", snapshot.absent_until)
        return self._found(snapshot.value)

    async def entries(self, source: Source) -> Iterable[Found]:
        snapshots = [await source.snapshot(self.repo, c) for c in sorted((await source.seen(self.repo)).value)]
        return [self._found(snapshot.value) for snapshot in snapshots if snapshot.value is not None]

    def _found(self, snapshot: Snapshot) -> Found:
        return Found(snapshot.commit + TREE_SUFFIX, TreeFile(snapshot))


class TreeFile(Node):
    """``<commit>.json``. Made anew when it is opened: the listings of all commits would be too much to keep."""

    __slots__ = ("commit", "repo")

    def __init__(self, snapshot: Snapshot) -> None:
        key = ("hub-tree", str(snapshot.repo), snapshot.commit)
        super().__init__(key, REGULAR, size=len(snapshot.tree_json()), mtime=snapshot.time)
        self.repo, self.commit = snapshot.repo, snapshot.commit

    async def content(self, source: Source) -> bytes:
        """The file's bytes."""
        snapshot = (await source.snapshot(self.repo, self.commit)).value
        if snapshot is None:
            raise RevisionNotFound(f"{self.repo.id} no longer has the commit {self.commit}")
        return snapshot.tree_json()


class HubBlobs(Directory):
    """``blobs``: the content of every known commit, named by etag."""

    __slots__ = ("repo",)

    def __init__(self, repo: RepoId) -> None:
        super().__init__(("hub-blobs", str(repo)))
        self.repo = repo

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        seen = await source.seen(self.repo)
        for commit in seen.value:
            snapshot = (await source.snapshot(self.repo, commit)).value
            if snapshot is not None and name in snapshot.by_etag:
                return self._found(name, snapshot)
        return Absent(f"no known commit of {self.repo.id} holds {name!r}", seen.absent_until)

    async def entries(self, source: Source) -> Iterable[Found]:
        found: dict[str, Found] = {}
        for commit in (await source.seen(self.repo)).value:
            snapshot = (await source.snapshot(self.repo, commit)).value
            if snapshot is not None:
                for name in snapshot.by_etag:
                    found.setdefault(name, self._found(name, snapshot))
        return found.values()

    def _found(self, name: str, snapshot: Snapshot) -> Found:
        path = snapshot.by_etag[name]
        return Found(name, BlobFile(snapshot.files[path], snapshot, path, executable=False))
