"""What an upstream calls its commits: refs, and the history behind one. Blocking; what it says is checked here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

import msgspec

from helios.errors import HeliosError, IntegrityError, InvalidInput
from helios.names import RepoId, check_ref, is_commit
from registry.pull.retry import Retry
from registry.pull.upstream import NEXT, Token, Upstream

log = logging.getLogger("helios.registry.pull")

MAX_REFS: Final = 20_000
"""Most refs that are kept of one repository; the rest are left out."""
MAX_TEXT: Final = 8192
"""Most characters of a commit's message that are kept."""
AT_A_TIME: Final = 100
"""Paths that are asked about at a time."""
HEADS: Final = "refs/heads/"
TAGS: Final = "refs/tags/"
PREFIXES: Final = {"branches": HEADS, "tags": TAGS, "converts": "refs/convert/", "pullRequests": "refs/pr/"}
"""Where each list of the answer has its refs."""


class _Ref(msgspec.Struct):
    ref: str
    targetCommit: str  # noqa: N815 - as it is written


class _Refs(msgspec.Struct):
    branches: list[_Ref] | None = None
    tags: list[_Ref] | None = None
    converts: list[_Ref] | None = None
    pullRequests: list[_Ref] | None = None  # noqa: N815 - as it is written


class _Author(msgspec.Struct):
    user: str = ""


class _Commit(msgspec.Struct):
    id: str
    date: str
    title: str = ""
    message: str = ""
    authors: list[_Author] = []


class _Changed(msgspec.Struct):
    path: str
    lastCommit: _Commit | None = None  # noqa: N815 - as it is written


@dataclass(frozen=True, slots=True)
class Past:
    """A commit in the history; ``time`` in whole seconds since 1970."""

    commit: str
    title: str
    message: str
    author: str
    time: int


def refs(
    upstream: Upstream,
    repo: RepoId,
    stop: threading.Event,
    *,
    requests: bool,
    token: Token = None,
    retry: Retry | None = None,
) -> dict[str, str]:
    """The refs by their full names (``refs/heads/main``) and where they point; ``requests``: those of pull requests,
    too. Raises as ``Upstream.snapshot``."""
    call = "/refs?include_prs=1" if requests else "/refs"
    found, _ = upstream.ask(repo, call, _Refs, stop, token=token, retry=retry)
    out: dict[str, str] = {}
    for name, prefix in PREFIXES.items():
        listed: list[_Ref] | None = getattr(found, name)
        for each in listed or []:
            if each.ref.startswith(prefix) and is_commit(each.targetCommit) and _is_ref(short(each.ref)):
                out[each.ref] = each.targetCommit
            if len(out) >= MAX_REFS:
                return out
    return out


def kind_of(upstream: Upstream, repo: RepoId, ref: str, stop: threading.Event) -> str:
    """``tag`` for a ref that the upstream calls one; ``branch`` for all others, and where it can't be asked."""
    if not may_be_tag(ref):
        return "branch"
    try:
        return kind_in(refs(upstream, repo, stop, requests=False), ref)
    except HeliosError as error:
        log.warning(
            "whether a ref is a tag is not known", extra={"repo": str(repo), "ref": ref, "error": error.message}
        )
        return "branch"


def may_be_tag(ref: str) -> bool:
    """Whether a ref could be one: ``main`` and the full names of others are not asked about."""
    return ref != "main" and not ref.startswith("refs/")


def kind_in(listed: Mapping[str, str], ref: str) -> str:
    """What a list of the upstream's refs calls a ref; a branch of the same name comes first, as with revisions."""
    return "tag" if TAGS + ref in listed and HEADS + ref not in listed else "branch"


def short(ref: str) -> str:
    """What a ref with this full name is called: branches and tags go by their bare names."""
    return ref.removeprefix(HEADS).removeprefix(TAGS)


def history(
    upstream: Upstream,
    repo: RepoId,
    commit: str,
    stop: threading.Event,
    *,
    page: int,
    limit: int,
    token: Token = None,
    retry: Retry | None = None,
) -> tuple[list[Past], bool]:
    """A page of the history, newest first, and whether more follows. Raises as ``Upstream.snapshot``."""
    call = f"/commits/{commit}?limit={limit}&p={page}"
    found, answer = upstream.ask(repo, call, list[_Commit], stop, token=token, retry=retry)
    out = []
    for each in found[:limit]:
        if not is_commit(each.id):
            raise IntegrityError(f"{upstream.endpoint} lists {each.id[:80]!r} as a commit of {repo.id}")
        author = each.authors[0].user if each.authors else ""
        out.append(Past(each.id, each.title[:MAX_TEXT], each.message[:MAX_TEXT], author[:200], _time(each.date)))
    return out, NEXT.search(answer.headers.get("link") or "") is not None


def last_changes(
    upstream: Upstream,
    repo: RepoId,
    commit: str,
    paths: Sequence[str],
    stop: threading.Event,
    *,
    token: Token = None,
    retry: Retry | None = None,
) -> dict[str, Past]:
    """The commits that changed the paths last, seen from a commit. Raises as ``Upstream.snapshot``."""
    out = {}
    for start in range(0, len(paths), AT_A_TIME):
        asked = [("paths", path) for path in paths[start : start + AT_A_TIME]]
        form = urlencode([*asked, ("expand", "true")]).encode()
        call = f"/paths-info/{commit}"
        found, _ = upstream.ask(repo, call, list[_Changed], stop, form=form, token=token, retry=retry)
        for each in found:
            if each.lastCommit is not None and is_commit(each.lastCommit.id):
                last = each.lastCommit
                out[each.path] = Past(last.id, last.title[:MAX_TEXT], "", "", _time(last.date))
    return out


def _is_ref(name: str) -> bool:
    try:
        check_ref(name)
    except InvalidInput:
        return False
    return True


def _time(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise IntegrityError(f"the upstream gives {text[:40]!r} as the time of a commit") from None
