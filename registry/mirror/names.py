"""What an upstream tells of its refs, its history and its weights' headers, beside the listings: nice to know.

Where it can't be asked, what is known counts, and the client is warned.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from helios.names import RepoId
from registry.mirror.asking import Asking, Caller
from registry.mirror.questions import ANSWER_S, Questions
from registry.mirror.state import MirrorState
from registry.pull.names import Past


class Names:
    """Of followed repositories, to callers who have been let in."""

    def __init__(self, state: MirrorState, asking: Asking, questions: Questions, *, asks: bool) -> None:
        """``asks``: whether the upstream may be asked."""
        self._state, self._asking, self._questions, self._asks = state, asking, questions, asks

    async def learn_refs(self, repo: RepoId, authorization: str | None, *, requests: bool) -> str | None:
        """Know which refs the upstream has, if the repository is followed; returns a warning for the client.

        ``requests``: those of pull requests, too. Where the upstream can't be asked, what is known counts.
        """
        if not self._asks or await asyncio.to_thread(self._state.restricted, repo) is None:
            return None
        if not await asyncio.to_thread(self._asking.refs_due, repo, requests=requests):
            return None
        key = "refs", str(repo), str(requests)
        work = functools.partial(self._asking.list_refs, repo, Caller.of(authorization), requests=requests)
        return await self._questions.attempt(key, work, f"the refs of {repo.id} may be out of date")

    async def history(
        self, repo: RepoId, commit: str, page: int, limit: int, authorization: str | None
    ) -> tuple[tuple[list[Past], bool] | None, str | None]:
        """A page of what the upstream tells of the past of one of its commits, and whether more follows; None where
        that is not known. And a warning for the client."""
        if not await asyncio.to_thread(self._is_followed_commit, repo, commit):
            return None, None
        found = self._asking.known_history(repo, commit, page, limit)
        if found is not None or not self._may_ask(repo):
            return found, None
        key = "history", str(repo), commit, str(page), str(limit)
        work = functools.partial(self._asking.history, repo, commit, page, limit, Caller.of(authorization))
        warning = await self._questions.attempt(key, work, f"the history of {repo.id} may be incomplete")
        return self._asking.known_history(repo, commit, page, limit), warning

    async def last_changes(
        self, repo: RepoId, commit: str, paths: Sequence[str], authorization: str | None
    ) -> tuple[dict[str, Past], str | None]:
        """Which commits changed the paths last, as far as an upstream tells it of its own; and a warning."""
        if not await asyncio.to_thread(self._is_followed_commit, repo, commit):
            return {}, None
        found = self._asking.known_changes(repo, commit, paths)
        left = [path for path in paths if path not in found]
        if not left or not self._may_ask(repo):
            return found, None
        key = "changes", str(repo), commit, left[0], str(len(left))
        work = functools.partial(self._asking.last_changes, repo, commit, left, Caller.of(authorization))
        warning = await self._questions.attempt(key, work, f"the last changes of {repo.id} may be incomplete")
        return self._asking.known_changes(repo, commit, paths), warning

    async def safetensors(self, repo: RepoId, commit: str, path: str, authorization: str | None) -> bytes | None:
        """The headers of a sharded model whose files are not here, as the upstream tells them in JSON; None where it is
        not to be asked. Raises as ``prepare``, and EntryNotFound."""
        if not self._may_ask(repo):
            return None
        if self._asking.known_safetensors(repo, commit, path) is None:
            key = "safetensors", str(repo), commit, path
            work = functools.partial(self._asking.safetensors, repo, commit, path, Caller.of(authorization))
            await self._questions.ask(key, work, ANSWER_S)
        return self._asking.known_safetensors(repo, commit, path)

    def _is_followed_commit(self, repo: RepoId, commit: str) -> bool:
        return self._state.restricted(repo) is not None and self._state.has_snapshot(repo, commit)

    def _may_ask(self, repo: RepoId) -> bool:
        return self._asks and not self._asking.is_local(repo)
