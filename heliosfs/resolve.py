"""From a repository and a revision to the commit's files: the same answer for volumes and for clients."""

from __future__ import annotations

from helios.errors import RepoNotFound, RevisionNotFound, Unavailable
from helios.names import RepoId, is_commit
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.source import Source


async def resolve(repo: RepoId, revision: str, source: Source) -> Snapshot:
    """What ``revision``, a commit or a ref, names now; while no registry answers, what it named last.

    Raises RepoNotFound, RevisionNotFound, Unavailable (DeadlineExceeded).
    """
    commit = revision
    if not is_commit(revision):
        try:
            refs = (await source.refs(repo, fresh=True)).value
        except Unavailable:
            refs = (await source.refs(repo)).value  # names keep their last value while nobody answers
        if refs is None:
            raise RepoNotFound(
                f"the registry has no {repo}", hint=f"`helios pull {repo.id}` brings it from the upstream Hub."
            )
        if revision not in refs:
            raise RevisionNotFound(f"{repo.id} has no ref {revision!r}; it has {', '.join(sorted(refs)[:10])}")
        commit = refs[revision]
    snapshot = (await source.snapshot(repo, commit)).value
    if snapshot is None:
        raise RevisionNotFound(f"{repo.id} has no commit {commit}")
    return snapshot
