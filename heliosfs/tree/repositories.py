"""The directories above commits: organisations, repositories, refs."""

from __future__ import annotations

from collections.abc import Iterable

from helios.names import RepoId, is_commit
from heliosfs.tree.commits import plain_commit
from heliosfs.tree.names import NO_ORG, parse_repo, ref_name, ref_of
from heliosfs.tree.nodes import Absent, Directory, Found, Link
from heliosfs.tree.source import Source


class Kind(Directory):
    """All repositories of one kind by organisation: ``/`` for models, ``/.datasets`` for datasets."""

    __slots__ = ("fixed", "kind")

    def __init__(self, kind: str, fixed: Iterable[tuple[str, Directory]] = ()) -> None:
        super().__init__(("kind", kind))
        self.kind = kind
        self.fixed = dict(fixed)

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        if name in self.fixed:
            return Found(name, self.fixed[name])
        if name == NO_ORG:
            return Found(name, Organisation(self.kind, None))
        if parse_repo(self.kind, name) is None:
            return Absent(f"{name!r} is not the name of an organisation")
        repos = await source.repos()
        if not repos.value.within(self.kind, name):
            repos = await source.repos(fresh=True)
        if not repos.value.within(self.kind, name):
            return Absent(f"the registry has no {self.kind} of {name!r}", repos.absent_until)
        return Found(name, Organisation(self.kind, name), repos.fresh_until)

    async def entries(self, source: Source) -> Iterable[Found]:
        repos = await source.repos()
        found = [Found(name, node) for name, node in self.fixed.items()]
        if repos.value.within(self.kind, None):
            found.append(Found(NO_ORG, Organisation(self.kind, None)))
        return found + [Found(o, Organisation(self.kind, o), repos.fresh_until) for o in repos.value.orgs(self.kind)]


class Organisation(Directory):
    """The repositories of one organisation, or those without one."""

    __slots__ = ("kind", "org")

    def __init__(self, kind: str, org: str | None) -> None:
        super().__init__(("org", kind, org or NO_ORG))
        self.kind, self.org = kind, org

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        repo = parse_repo(self.kind, name if self.org is None else f"{self.org}/{name}")
        if repo is None:
            return Absent(f"{name!r} is not the name of a repository")
        refs = await source.refs(repo)
        if refs.value is None:
            return Absent(f"the registry has no {repo}", refs.absent_until)
        return Found(name, Repository(repo), refs.fresh_until)

    async def entries(self, source: Source) -> Iterable[Found]:
        repos = await source.repos()
        return [Found(r.name, Repository(r), repos.fresh_until) for r in repos.value.within(self.kind, self.org)]


class Repository(Directory):
    """A repository's refs, as links ``@ref``, and its commits."""

    __slots__ = ("repo",)

    def __init__(self, repo: RepoId) -> None:
        super().__init__(("repo", str(repo)))
        self.repo = repo

    async def lookup(self, name: str, source: Source) -> Found | Absent:
        if is_commit(name):
            time = await source.commit_time(self.repo, name)
            if time.value is None:
                return Absent(f"{self.repo.id} has no commit {name}", time.absent_until)
            return Found(name, plain_commit(self.repo, name, time.value))
        ref = ref_of(name)
        if ref is None or ref_name(ref) != name:
            return Absent(f"{name!r} is neither a commit (40 hexadecimal digits) nor a ref (@main)")
        refs = await source.refs(self.repo)
        if ref not in (refs.value or {}):
            refs = await source.refs(self.repo, fresh=True)
        if refs.value is None or ref not in refs.value:
            return Absent(f"{self.repo.id} has no ref {ref!r}", refs.absent_until)
        return Found(name, self._link(ref, refs.value[ref]), refs.fresh_until)

    async def entries(self, source: Source) -> Iterable[Found]:
        refs = await source.refs(self.repo)
        targets = refs.value or {}
        times = {
            commit: (await source.commit_time(self.repo, commit)).value for commit in sorted(set(targets.values()))
        }
        here = {commit: time for commit, time in times.items() if time is not None}
        # A commit that is not there any more went with its repository: what is known of the refs is older.
        links = [(ref, commit) for ref, commit in sorted(targets.items()) if commit in here]
        return [
            *(Found(ref_name(ref), self._link(ref, commit), refs.fresh_until) for ref, commit in links),
            *(Found(commit, plain_commit(self.repo, commit, time)) for commit, time in here.items()),
        ]

    def _link(self, ref: str, commit: str) -> Link:
        return Link(("ref", str(self.repo), ref, commit), commit)
