"""A tree's source in memory, for tests: repositories, refs and commits as they are told."""

from __future__ import annotations

from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import Known, Repos

NOW = 1000.0
C1, C2, C3 = "1" * 40, "2" * 40, "3" * 40


def file(number: int, size: int = 10, *, lfs: bool = False, executable: bool = False) -> FileEntry:
    return FileEntry(f"{number:064x}", size, f"{number:040x}", "f" * 64, lfs, executable)


class Registry:
    """A source in memory; ``seen`` commits are those that were asked for."""

    def __init__(self, repos, commits):
        self.named = {RepoId.from_canonical(name): dict(refs) for name, refs in repos.items()}
        self.commits = {(RepoId.from_canonical(name), commit): files for (name, commit), files in commits.items()}
        self.asked: set[tuple[RepoId, str]] = set()

    async def repos(self, *, fresh=False):
        return Known(Repos.of(self.named), NOW)

    async def refs(self, repo, *, fresh=False):
        return Known(self.named.get(repo), NOW)

    async def commit_time(self, repo, commit):
        if (repo, commit) not in self.commits:
            return Known(None, NOW)
        self.asked.add((repo, commit))
        return Known(1234, NOW)

    async def snapshot(self, repo, commit):
        files = self.commits.get((repo, commit))
        if files is None:
            return Known(None, NOW)
        self.asked.add((repo, commit))
        return Known(Snapshot(repo, commit, 1234, files), NOW)

    async def seen(self, repo):
        asked = sorted(commit for r, commit in self.asked if r == repo)
        return Known(tuple({*self.named.get(repo, {}).values(), *asked}), NOW)


FILES = {
    "config.json": file(1),
    "run.sh": file(2, executable=True),
    "model.safetensors": file(3, 5000, lfs=True),
    "a/b/deep.txt": file(4),
    "a/same.txt": file(1),
}
