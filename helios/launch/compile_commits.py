"""Where artifacts of compiled kernels are read from: a mount that shows every commit, or the registry itself where an
engine has nothing but its own model's volume."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from helios.errors import DeadlineExceeded, IntegrityError
from helios.home import Home
from helios.launch.compile_artifact import FILES, INDEX, MAX_INDEX, Index, check
from helios.names import RepoId, is_commit

READERS: Final = 8
PARTS: Final = 3
"""``org/name/commit``, of a model in a mount."""
PIECE: Final = 1 << 20


class Commits(Protocol):
    """Commits of models. Threads share it; all calls raise HeliosError and OSError."""

    def of(self, path: Path) -> tuple[RepoId, str] | None:
        """The commit whose files a model's directory holds; None for one that nobody knows."""
        ...

    def index(self, repo: RepoId, commit: str) -> bytes:
        """An artifact's index, at most one byte longer than it may be."""
        ...

    def files(self, repo: RepoId, commit: str, index: Index, late: threading.Event) -> Path:
        """A directory with exactly the index's files, every byte of them here and right, while this lasts. Nobody
        wants it any more once ``late`` is set: it may return early then, or raise DeadlineExceeded."""
        ...


class MountedCommits:
    """Those that a mount shows."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint

    def of(self, path: Path) -> tuple[RepoId, str] | None:
        if not path.is_relative_to(self._mountpoint):
            return None
        parts = path.relative_to(self._mountpoint).parts
        if len(parts) != PARTS or not is_commit(parts[2]):
            return None
        org, name, commit = parts
        return RepoId("models", None if org == "_" else org, name), commit

    def _root(self, repo: RepoId, commit: str) -> Path:
        return self._mountpoint / (repo.org or "_") / repo.name / commit

    def index(self, repo: RepoId, commit: str) -> bytes:
        with (self._root(repo, commit) / INDEX).open("rb") as file:
            return file.read(MAX_INDEX + 1)

    def files(self, repo: RepoId, commit: str, index: Index, late: threading.Event) -> Path:
        root = self._root(repo, commit) / FILES
        check(root, index, digest_of)
        read_all([root / path for path in index.files], late)
        return root


class FetchedCommits(contextlib.ExitStack):
    """Those of one model whose directory is ``path``, fetched from the registry to ``home``; a context."""

    def __init__(self, home: Home, path: Path, repo: RepoId, commit: str, registry: Sequence[str]) -> None:
        """``registry``: its URLs."""
        super().__init__()
        self._home, self._path, self._repo, self._commit, self._registry = home, path, repo, commit, registry
        self._base = home.root / "vllm" / "compiled" / "fetched"

    def of(self, path: Path) -> tuple[RepoId, str] | None:
        return (self._repo, self._commit) if path == self._path else None

    def index(self, repo: RepoId, commit: str) -> bytes:
        from heliosfs import client

        with client.connect(home=self._home.root, registry=self._registry) as store:
            with store.resolve(f"{repo.id}@{commit}").open(INDEX) as file:
                return bytes(file.read(0, MAX_INDEX + 1))

    def files(self, repo: RepoId, commit: str, index: Index, late: threading.Event) -> Path:
        self._base.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._base / f"{commit}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_SH)  # until the engines have ended
        root = self._base / commit
        if not root.exists():
            self._fetch(repo, commit, index, root, late)
        try:
            check(root, index, sha256_of)
        except IntegrityError:
            shutil.rmtree(root)  # fetched again at the next start
            raise
        self._drop_others(commit)
        return root

    def _fetch(self, repo: RepoId, commit: str, index: Index, root: Path, late: threading.Event) -> None:
        from heliosfs import client

        fresh = root.with_name(f".{commit}.{secrets.token_hex(8)}")
        fresh.mkdir(mode=0o700)
        try:
            with client.connect(home=self._home.root, registry=self._registry) as store:
                model = store.resolve(f"{repo.id}@{commit}")
                model.warm([f"{FILES}/{path}" for path in index.files])
                for path in index.files:
                    (fresh / path).parent.mkdir(parents=True, exist_ok=True)
                    with model.open(f"{FILES}/{path}") as source, (fresh / path).open("wb") as target:
                        while not late.is_set() and (piece := source.read(target.tell(), PIECE)):
                            target.write(piece)
                    if late.is_set():
                        raise DeadlineExceeded(f"{path} came too late")
                    if model.files[f"{FILES}/{path}"].executable:
                        (fresh / path).chmod(0o700)
            with contextlib.suppress(FileExistsError, OSError):  # another engine of this home was first
                fresh.rename(root)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _drop_others(self, commit: str) -> None:
        """Remove what was fetched of other commits, unless an engine uses it."""
        for path in self._base.glob("*.lock"):
            if path.stem != commit:
                other = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                finally:
                    os.close(other)


def digest_of(path: Path) -> str:
    """The sha256 by which a mount knows a file, and against which it checks what is read; raises OSError."""
    return os.getxattr(path, "user.helios.sha256").decode()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_all(paths: Sequence[Path], late: threading.Event) -> None:
    """Have a mount fetch and check all of these files now: an engine may not survive an error in the midst of one.
    Ends early when ``late`` is set. Raises OSError."""
    left, errors = deque(paths), deque[OSError]()

    def work() -> None:
        while not late.is_set() and not errors:
            try:
                path = left.popleft()
            except IndexError:
                return
            try:
                with path.open("rb", buffering=0) as file:
                    while not late.is_set() and file.read(1 << 20):
                        pass
            except OSError as error:
                errors.append(error)

    # Daemons: one whose mount says nothing must not keep the process from ending.
    threads = [threading.Thread(target=work, name="compile cache", daemon=True) for _ in range(min(READERS, len(left)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
