"""What the registry answers, as the registry's clients read it: docs/native-api.md says what it means."""

from __future__ import annotations

import msgspec

from helios.names import RepoId


class Repo(msgspec.Struct, frozen=True):
    """A repository: its canonical name, its refs, the bytes of its distinct files, when a ref last moved (unix s), and
    which refs are tags or aliases."""

    repo: str
    refs: dict[str, str]
    bytes: int
    updated: int
    kinds: dict[str, str] = {}

    @property
    def id(self) -> RepoId:
        return RepoId.from_canonical(self.repo)


class Revision(msgspec.Struct, frozen=True):
    """What a revision names: a commit (40 hex) and its manifest's digest (64 hex)."""

    commit: str
    manifest: str


class Signature(msgspec.Struct, frozen=True):
    signer: str | None


class Commit(msgspec.Struct, frozen=True):
    """A commit record; ``time`` in unix seconds."""

    repo: str
    commit: str
    manifest: str
    author: str
    time: int
    message: str = ""
    parent: str | None = None
    lineage: dict[str, str] = {}


class Move(msgspec.Struct, frozen=True):
    """A ref's way from a commit (None: it was new) to another (None: it was removed); ``time`` in unix seconds."""

    ref: str
    old: str | None
    new: str | None
    author: str
    time: int


class Notice(msgspec.Struct, frozen=True):
    """``commit`` is empty for the whole repository; ``state`` is ``deprecated`` or ``retired``; ``time`` in unix s."""

    commit: str
    state: str
    message: str
    author: str
    time: int
    replacement: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Bytes: every commit as a full copy; distinct files; what the store keeps."""

    logical: int
    unique: int
    stored: int


class Bytes(msgspec.Struct, frozen=True):
    """Of a quota: of all commits, each a full copy, and of what is stored for them."""

    logical: int
    stored: int


class QuotaState(msgspec.Struct, frozen=True):
    """How full a quota is; a ``limit`` of 0 is none. ``repos`` are patterns of repositories."""

    quota: str
    repos: list[str]
    limit: Bytes
    used: Bytes
    reserved: Bytes


class Priority(msgspec.Struct, frozen=True):
    """The class of a repository (canonical name), or of one ref of it (None: all); ``time`` in unix seconds."""

    repo: str
    ref: str | None
    priority: str
    author: str
    time: int

    @property
    def id(self) -> RepoId:
        return RepoId.from_canonical(self.repo)


class ReadRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """Files read, and their bytes, in the ``span`` seconds from ``time`` on; what was not told apart is None."""

    reads: int
    bytes: int
    time: int | None = None
    span: int | None = None
    repo: str | None = None
    commit: str | None = None
    node: str | None = None


class Reads(msgspec.Struct, frozen=True):
    """An answer on usage; ``more``: there is too much for one."""

    since: int
    until: int
    rows: list[ReadRow]
    more: bool


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a push that is stored; its bytes are new or deduplicated."""

    path: str
    sha256: str
    size: int
    new_bytes: int
    deduplicated_bytes: int


class StartedPush(msgspec.Struct, frozen=True):
    """A push's id, and whether its files may be offered by their recipes: older registries take whole files only."""

    push: str
    recipes: bool = False


class Offered(msgspec.Struct, frozen=True):
    """What becomes of a file that was offered by its recipe: it is stored where ``missing`` is None.

    Else these runs of chunks, (first, count), have to be sent, or better the ``whole`` file.
    """

    missing: list[tuple[int, int]] | None = None
    whole: bool = False


class KnownChunks(msgspec.Struct, frozen=True):
    """How many of the chunks that were asked about are there."""

    known: int


class PushState(msgspec.Struct, frozen=True):
    """How far a push is: files stored, and bytes read including those of files under way."""

    files: int
    bytes: int


class Pushed(msgspec.Struct, frozen=True):
    """A finished push; ``unchanged`` when the ref pointed at this commit before.

    ``sent_bytes`` is the client's own count of what it sent over the network.
    """

    commit: str
    manifest: str
    logical_bytes: int
    new_bytes: int
    deduplicated_bytes: int
    unchanged: bool
    sent_bytes: int = 0


class Kept(msgspec.Struct, frozen=True):
    """A file that is or was kept back; times in unix seconds."""

    repo: str
    path: str
    sha256: str
    findings: str
    since: int
    released: int | None = None
    released_by: str | None = None


class FollowedRef(msgspec.Struct, frozen=True):
    """An upstream ref that is followed: where it points here, a commit that waits for approval, when it was asked."""

    repo: str
    ref: str
    commit: str
    pending: str | None
    checked: float
    policy: str


class DomainInfo(msgspec.Struct, frozen=True):
    """A domain, the tenants that have it, and its bytes; ``waiting`` objects are deleted at ``until`` at the latest, in
    unix seconds."""

    domain: str
    tenants: list[str]
    repositories: int
    unique: int
    stored: int
    waiting: int
    until: float


class Imported(msgspec.Struct, frozen=True):
    """What a bundle brought: commits, bytes of their files, bytes that were not here before, and notices."""

    commits: list[str]
    logical_bytes: int
    new_bytes: int
    notices: int = 0


class Levels(msgspec.Struct, frozen=True):
    """Bytes of the objects that are needed, of those on the fast disk in front (None: there is none), and of those
    that only it has. ``memory``: whether the names are in memory."""

    stored: int
    front: int | None
    waiting: int
    memory: bool


class FetchError(msgspec.Struct, frozen=True):
    code: str
    message: str
    hint: str | None = None


class Fetch(msgspec.Struct, frozen=True):
    """A pull that nobody waits for: ``state`` is ``running``, ``done`` or ``failed``; bytes that are here and in all,
    as far as they are known."""

    state: str
    done: int
    total: int
    files: int
    error: FetchError | None = None
    retry_after_s: int | None = None


class Place(msgspec.Struct, frozen=True):
    """Where a revision is: ``here``, ``partial``, ``upstream``, ``nowhere`` or ``unknown``."""

    repo: str
    rev: str
    state: str
    commit: str | None = None
    bytes: int | None = None
    held: int = 0
    levels: Levels | None = None
    reason: str | None = None
    fetch: Fetch | None = None


class ModelPlace(msgspec.Struct, frozen=True):
    """Where a repository is; ``commit`` is set for a listed upstream commit that is not all here."""

    repo: str
    state: str
    commit: str | None
    bytes: int
    levels: Levels


class RepoList(msgspec.Struct, frozen=True):
    repos: list[Repo]


class RefTable(msgspec.Struct, frozen=True):
    refs: dict[str, str]
    kinds: dict[str, str] = {}


class NoticeList(msgspec.Struct, frozen=True):
    notices: list[Notice]


class Lease(msgspec.Struct, frozen=True):
    """A commit that somebody keeps until then, in unix seconds."""

    holder: str
    repo: str
    commit: str
    expires: float


class Allowed(msgspec.Struct, frozen=True):
    """Whether somebody may read a repository, and if not, why."""

    allowed: bool
    reason: str | None = None


class PodAllowed(msgspec.Struct, frozen=True):
    """Whether a pod may read a repository, if not, why, and whose it is by its token; ``pod_uid`` is empty where the
    token is bound to no pod."""

    allowed: bool
    reason: str | None
    namespace: str
    service_account: str
    pod_uid: str


class LeaseList(msgspec.Struct, frozen=True):
    leases: list[Lease]


class QuotaList(msgspec.Struct, frozen=True):
    quotas: list[QuotaState]


class PriorityList(msgspec.Struct, frozen=True):
    priorities: list[Priority]


class MoveList(msgspec.Struct, frozen=True):
    moves: list[Move]


class CommitList(msgspec.Struct, frozen=True):
    commits: list[Commit]


class PlaceList(msgspec.Struct, frozen=True):
    models: list[ModelPlace]


class FollowedList(msgspec.Struct, frozen=True):
    refs: list[FollowedRef]


class DomainList(msgspec.Struct, frozen=True):
    domains: list[DomainInfo]


class KeptList(msgspec.Struct, frozen=True):
    files: list[Kept]
