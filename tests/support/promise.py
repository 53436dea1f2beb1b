"""The filesystem that docs/semantics.md promises, in memory: what a mount may show after what was done to the registry.

Names age: what the registry had at any moment from a second before a question until its answer may be shown, and what
was looked up in vain may be missing for five seconds. Content never does: a commit's files are what was published.
``World`` is told of every change with the times between which it took effect, and says what an observation between two
times may be. It knows nothing of the mount.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

NAME_S: Final = 1.0
UNKNOWN_S: Final = 5.0
"""How old a name, and the absence of one, may be: docs/semantics.md, "How fresh names are"."""

SLACK_S: Final = 1.0
"""For a machine so busy that an answer lies about for a while before the kernel starts to count."""

T = TypeVar("T")


class Timeline(Generic[T]):
    """The values of one thing over time. A change takes effect somewhere between ``begin`` and ``end``."""

    def __init__(self, value: T) -> None:
        self._spans: list[tuple[T, float, float]] = [(value, float("-inf"), float("inf"))]

    @property
    def now(self) -> T:
        return self._spans[-1][0]

    def change(self, value: T, begin: float, end: float) -> None:
        last, since, _ = self._spans[-1]
        self._spans[-1] = (last, since, end)
        self._spans.append((value, begin, float("inf")))

    def during(self, begin: float, end: float) -> Iterator[T]:
        """Every value that it may have had at some moment from ``begin`` to ``end``."""
        return (value for value, since, until in self._spans if since <= end and until >= begin)


@dataclass(frozen=True)
class Repo:
    """A repository at one moment: its refs, and the commits that can be reached."""

    refs: Mapping[str, str] = field(default_factory=dict)
    commits: frozenset[str] = frozenset()


@dataclass(frozen=True)
class File:
    """``data`` are its bytes; ``sha256`` names them."""

    data: bytes
    sha256: str
    executable: bool = False


class World:
    """Repositories by id (``org/name``); ``commits`` are the files of each commit that ever was, by path."""

    def __init__(self) -> None:
        self.repos: dict[str, Timeline[Repo | None]] = {}
        self.commits: dict[str, Mapping[str, File]] = {}
        self._vain: dict[str, float] = {}  # organisations and repositories: when something there was not found

    # --- what is done ---

    def timeline(self, repo: str) -> Timeline[Repo | None]:
        return self.repos.setdefault(repo, Timeline(None))

    def published(self, repo: str, ref: str, commit: str, files: Mapping[str, File], begin: float, end: float) -> None:
        known = self.commits.setdefault(commit, files)
        assert known == files, "one commit, two contents"
        line = self.timeline(repo)
        old = line.now or Repo()
        line.change(Repo({**old.refs, ref: commit}, old.commits | {commit}), begin, end)

    def moved(self, repo: str, ref: str, commit: str | None, begin: float, end: float) -> None:
        """A ref was moved, or removed (None)."""
        line = self.timeline(repo)
        assert line.now is not None
        refs = {name: to for name, to in {**line.now.refs, ref: commit}.items() if to is not None}
        line.change(Repo(refs, line.now.commits), begin, end)

    def removed(self, repo: str, begin: float, end: float) -> None:
        self.timeline(repo).change(None, begin, end)

    # --- what may be seen ---

    def states(self, repo: str, begin: float, end: float) -> list[Repo | None]:
        """What the repository may seem to be between two times; None: not there."""
        line = self.timeline(repo)
        found = list(line.during(begin - NAME_S - SLACK_S, end))
        org = repo.partition("/")[0]
        if max(self._vain.get(name, float("-inf")) for name in (repo, org)) > begin - UNKNOWN_S - SLACK_S:
            found += [state for state in line.during(begin - UNKNOWN_S - SLACK_S, end) if _poorer(state, found)]
        return found

    def missed(self, repo: str, at: float) -> None:
        """Something of a repository was looked up in vain."""
        self._vain[repo] = self._vain[repo.partition("/")[0]] = at

    def targets(self, repo: str, ref: str, begin: float, end: float) -> set[str | None]:
        """The commits that a ref may name; None: there is no such ref."""
        return {None if state is None else state.refs.get(ref) for state in self.states(repo, begin, end)}

    def has_commit(self, repo: str, commit: str, begin: float, end: float) -> set[bool]:
        """Whether a commit may be there."""
        return {state is not None and commit in state.commits for state in self.states(repo, begin, end)}

    def stays(self, repo: str, since: float, until: float) -> bool:
        """Whether the repository was there all that time, as far as anybody may believe."""
        return None not in self.timeline(repo).during(since, until)

    def names(self, commit: str, directory: str = "") -> set[str]:
        """What a directory of a commit lists."""
        prefix = f"{directory}/" if directory else ""
        return {path.removeprefix(prefix).partition("/")[0] for path in self.commits[commit] if path.startswith(prefix)}


def _poorer(state: Repo | None, others: list[Repo | None]) -> bool:
    """Whether less is there than in one of the others: only absence is remembered for long."""
    if state is None:
        return any(other is not None for other in others)
    there = [other for other in others if other is not None]
    return any(other.refs.keys() - state.refs.keys() or other.commits - state.commits for other in there)
