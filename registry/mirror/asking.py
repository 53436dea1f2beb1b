"""Asking the upstream: what a revision is, whether a ref has moved, who may read a repository.

Blocking, called in the mirror's threads. What an upstream says is believed for a while: a refusal for half a minute, a
permission for five. Tokens are known here by their hash alone, and sent to nobody but the upstream.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote

import msgspec

from helios.config import MirrorRule
from helios.errors import (
    DeadlineExceeded,
    EntryNotFound,
    Forbidden,
    HeliosError,
    IntegrityError,
    NotFound,
    RateLimited,
    RepoNotFound,
    Retired,
    Unavailable,
    UpstreamUnavailable,
)
from helios.names import RepoId, is_commit
from registry.admission.admission import Admission
from registry.mirror.brief import Brief
from registry.mirror.policy import Step, after_answer, rule_for, step_for_ref
from registry.mirror.state import MirrorState
from registry.pull import names
from registry.pull.faults import again
from registry.pull.listing import Snapshot, choose
from registry.pull.names import Past, may_be_tag
from registry.pull.retry import Retry
from registry.pull.upstream import Token, Upstream

log = logging.getLogger("helios.registry.mirror")

NO_S: Final = 30.0
"""How long a refusal or "not found" is believed, in seconds."""
DOWN_S: Final = 2.0
"""How long the same is not asked again of an upstream that failed, in seconds."""
YES_S: Final = 300.0
"""How long a caller's permission is believed, in seconds."""
TRY_S: Final = 4.0
"""How long one question is tried again while the upstream fails, in seconds."""
PATIENCE_S: Final = 3.0
"""Longest rate limit that is waited out while a client waits, in seconds."""
REMEMBERED: Final = 10_000
HISTORIES: Final = 64
"""Pages of histories in memory."""
SHARDS: Final = 8
"""Answers about the headers of sharded models in memory: some have megabytes."""
HISTORY_S: Final = 3600.0
"""How long each is kept, in seconds: what lies behind a commit does not change."""
DEFAULT_REVISION: Final = "main"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the token in the request's Authorization, if there is one. It never shows up in logs."""

    token: str | None

    @classmethod
    def of(cls, authorization: str | None) -> Caller:
        """From the header's value; anything but a bearer token counts as none."""
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip()
        plain = token.isascii() and token.isprintable() and " " not in token and len(token) <= 4096
        return cls(token if scheme.lower() == "bearer" and token and plain else None)

    @property
    def id(self) -> str:
        """Stands for the token in memory."""
        return "" if self.token is None else hashlib.sha256(self.token.encode()).hexdigest()

    @property
    def as_token(self) -> Token:
        return False if self.token is None else self.token

    def __repr__(self) -> str:
        return f"Caller({'nobody' if self.token is None else self.id[:8]})"


class Asking:
    """Questions to one upstream, and what is remembered of the answers. Threads may share it."""

    def __init__(
        self,
        client: Upstream,
        state: MirrorState,
        rules: Sequence[MirrorRule],
        admission: Admission,
        learnt: Callable[[Snapshot, Token], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``learnt`` is told of each snapshot that is new, with a token that may read it; ``clock`` is in seconds."""
        self._client, self._state, self._rules, self._learnt = client, state, rules, learnt
        self._admission = admission
        self.stop = threading.Event()
        self._refused: Brief[tuple[str, ...], HeliosError] = Brief(REMEMBERED, clock)
        self._allowed: Brief[tuple[str, ...], bool] = Brief(REMEMBERED, clock)
        self._histories: Brief[tuple[str, str, int, int], tuple[list[Past], bool]] = Brief(HISTORIES)
        self._shards: Brief[tuple[str, str, str], bytes] = Brief(SHARDS)
        self._changes: Brief[tuple[str, str, str], Past] = Brief(REMEMBERED)

    def learn(self, repo: RepoId, revision: str, caller: Caller) -> None:
        """Find out what the revision is and keep that. Raises what the client should be told."""
        key = ("learn", str(repo), revision, caller.id)
        ref = None if is_commit(revision) else revision
        self._state.look_again(repo, revision)  # all of it: what other processes have learnt is seen as a whole
        if self._state.ref(repo, revision) is not None if ref else self._state.has_snapshot(repo, revision):
            return  # somebody has learnt it since the caller looked
        with self._remembering(key):
            snapshot, token = self._snapshot(repo, revision, caller)
            self._admission.check_names(repo, [file.path for file in choose(snapshot.files)[0]])
            self._state.learn(snapshot, snapshot.restricted, ref, snapshot.commit, None)
        if ref is not None and may_be_tag(ref) and self._state.kind_of(repo, ref) != "tag":
            try:  # before it may be published: then it gets its kind
                self.list_refs(repo, caller, requests=False)
            except HeliosError as error:
                log.warning("whether a ref is a tag is not known", extra={"repo": str(repo), "error": error.message})
        self._learnt(snapshot, token)

    def look(self, repo: RepoId, revision: str, *, own_token: bool) -> Snapshot:
        """What a revision is, for somebody who may know what anybody or, with ``own_token``, the registry may."""
        with self._remembering(("look", str(repo), revision, "own" if own_token else "")):
            return self._ask(repo, revision, None if own_token else False)

    def renew(self, repo: RepoId, ref: str, caller: Caller) -> None:
        """Ask whether a followed ref has moved. Raises what went wrong; then nothing has changed."""
        known, rule = self._state.ref(repo, ref), rule_for(self._rules, repo, ref)
        if known is None or step_for_ref(rule, known, self._state.now()) is not Step.RENEW:
            return  # somebody has asked since the caller looked
        was_restricted = self._state.restricted(repo) or False
        token: Token = (caller.token or None) if was_restricted else False
        with self._remembering(("renew", str(repo), ref)):
            try:
                commit, restricted = self._client.commit_of(repo, ref, self.stop, token=token, retry=self._retry())
            except Forbidden:
                self._state.restrict(repo)
                raise
            if commit == known.commit:
                self._state.checked(known, repo)
                return
            snapshot = self._client.snapshot(repo, commit, self.stop, token=token, retry=self._retry())
            restricted = restricted or was_restricted
            points_at, pending = after_answer(rule, known, commit)
            self._state.learn(snapshot, restricted, ref, points_at, pending)
        log.info(
            "an upstream ref has moved",
            extra={"repo": str(repo), "ref": ref, "old": known.commit, "new": commit, "waits": pending is not None},
        )
        if pending is None:
            self._learnt(snapshot, token)

    def refs_due(self, repo: RepoId, *, requests: bool) -> bool:
        """Whether the upstream should be asked for its refs now: the rule for the default branch says how often."""
        known = self._state.listed(repo, requests)
        rule = rule_for(self._rules, repo, DEFAULT_REVISION)
        if known is None or rule.policy in ("pin", "local"):
            return known is None and rule.policy != "local"
        return not 0 <= self._state.now() - known.checked < rule.ttl_s

    def is_local(self, repo: RepoId) -> bool:
        """Whether a rule says that the upstream is not asked for the repository."""
        return rule_for(self._rules, repo, DEFAULT_REVISION).policy == "local"

    def list_refs(self, repo: RepoId, caller: Caller, *, requests: bool) -> None:
        """Ask for the upstream's refs and keep them; ``requests``: those of pull requests, too."""
        with self._remembering(("refs", str(repo), str(requests))):
            found = names.refs(
                self._client, repo, self.stop, requests=requests, token=self._token(repo, caller), retry=self._retry()
            )
        self._state.learn_refs(repo, found, requests)

    def history(self, repo: RepoId, commit: str, page: int, limit: int, caller: Caller) -> None:
        """Ask for a page of the history behind a commit of the upstream, and remember it for ``known_history``."""
        key = str(repo), commit, page, limit
        with self._remembering(("history", str(repo), commit, str(page))):
            found = names.history(
                self._client, repo, commit, self.stop, page=page, limit=limit, token=self._token(repo, caller),
                retry=self._retry(),
            )  # fmt: skip
        self._histories.put(key, found, HISTORY_S)

    def known_history(self, repo: RepoId, commit: str, page: int, limit: int) -> tuple[list[Past], bool] | None:
        """What ``history`` was told lately."""
        return self._histories.get((str(repo), commit, page, limit))

    def last_changes(self, repo: RepoId, commit: str, paths: Sequence[str], caller: Caller) -> None:
        """Ask which commits changed the paths last, and remember it for ``known_changes``."""
        with self._remembering(("changes", str(repo), commit, *paths[:1])):
            found = names.last_changes(
                self._client, repo, commit, paths, self.stop, token=self._token(repo, caller), retry=self._retry()
            )
        for path, past in found.items():
            self._changes.put((str(repo), commit, path), past, HISTORY_S)

    def known_changes(self, repo: RepoId, commit: str, paths: Sequence[str]) -> dict[str, Past]:
        """What ``last_changes`` was told lately."""
        found = {path: self._changes.get((str(repo), commit, path)) for path in paths}
        return {path: past for path, past in found.items() if past is not None}

    def safetensors(self, repo: RepoId, commit: str, path: str, caller: Caller) -> None:
        """Ask for the headers of all shards that an index names, and remember them for ``known_safetensors``.

        The call takes no revision, so nothing is believed when the upstream's ``main`` is elsewhere: EntryNotFound.
        """
        token, retry = self._token(repo, caller), self._retry()
        with self._remembering(("safetensors", str(repo), commit, path)):
            now, _ = self._client.commit_of(repo, DEFAULT_REVISION, self.stop, token=token, retry=retry)
            if now != commit:
                raise EntryNotFound(f"{path} of {repo.id} is not here, and {DEFAULT_REVISION} has moved upstream")
            call = f"/safetensors-metadata/{quote(path)}"
            found, _ = self._client.ask(repo, call, msgspec.Raw, self.stop, token=token, retry=retry)
        self._shards.put((str(repo), commit, path), bytes(found), YES_S)

    def known_safetensors(self, repo: RepoId, commit: str, path: str) -> bytes | None:
        """The JSON that ``safetensors`` was told lately."""
        return self._shards.get((str(repo), commit, path))

    def _token(self, repo: RepoId, caller: Caller) -> Token:
        """What to show for a repository that the caller has been let in to."""
        return (caller.token or None) if self._state.restricted(repo) else None

    def allowed(self, repo: RepoId, caller: Caller) -> bool:
        """Whether it is known that the caller may read the restricted repository."""
        return self._allowed.get((str(repo), caller.id)) is not None

    def check(self, repo: RepoId, commit: str, path: str, caller: Caller) -> None:
        """Ask whether the caller may read a restricted repository; raises what the upstream says if not."""
        with self._remembering(("access", str(repo), caller.id)):
            self._client.check_access(repo, commit, path, self.stop, token=caller.as_token, retry=self._retry())
        self._allowed.put((str(repo), caller.id), True, YES_S)

    def _snapshot(self, repo: RepoId, revision: str, caller: Caller) -> tuple[Snapshot, Token]:
        """The snapshot and a token that may read it. Public is what can be read without a token, or what the upstream
        calls public to somebody with the registry's own; all else is restricted."""
        try:
            return self._ask(repo, revision, False), False
        except (RepoNotFound, Forbidden) as error:
            refused: HeliosError = error
        own = self._client.has_token
        if own:
            try:
                return self._ask(repo, revision, None), None
            except (RepoNotFound, Forbidden) as error:
                log.debug("the registry's own token opens nothing", extra={"repo": str(repo), "error": error.message})
        if caller.token is None:
            raise refused
        return replace(self._ask(repo, revision, caller.token), restricted=True), caller.token

    def _ask(self, repo: RepoId, revision: str, token: Token) -> Snapshot:
        return self._client.snapshot(repo, revision, self.stop, token=token, retry=self._retry())

    def _retry(self) -> Retry:
        return Retry(TRY_S, patience_s=PATIENCE_S)

    def _remembering(self, key: tuple[str, ...]) -> _Remembering:
        return _Remembering(self._refused, key, self._client.endpoint)


class _Remembering:
    """Around a question: refusals are remembered; an upstream that fails is never "not found"."""

    def __init__(self, refused: Brief[tuple[str, ...], HeliosError], key: tuple[str, ...], endpoint: str) -> None:
        self._refused, self._key, self._endpoint = refused, key, endpoint

    def __enter__(self) -> None:
        found = self._refused.get(self._key)
        if found is not None:
            raise again(found)

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        match error:
            case RateLimited():
                return
            case NotFound() | Forbidden() | Retired() | IntegrityError():
                self._refused.put(self._key, again(error), NO_S)
            case DeadlineExceeded() | Unavailable():
                failed = unavailable(self._endpoint, error.message)
                self._refused.put(self._key, failed, DOWN_S)
                raise failed from error


def unavailable(endpoint: str, why: str) -> UpstreamUnavailable:
    """The error for an upstream that can't be asked."""
    return UpstreamUnavailable(
        f"the upstream {endpoint} can't be asked: {why}"[:400],
        hint="What the registry holds is served all the same; ask again when the upstream is well.",
    )
