"""Finding the artifact of a start's key: whether there is one, and every byte of it here and right, within a deadline.

A registry or a mount that does not answer keeps a thread waiting, and not the engine's start: that goes on without.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from helios.config import CompileCacheSettings
from helios.errors import DeadlineExceeded, HeliosError, InvalidInput, Unavailable
from helios.home import Home
from helios.launch.compile_artifact import Index, unseal
from helios.launch.compile_commits import Commits
from helios.lockfile import LockFile
from helios.names import RepoId
from helios.registry_client import RegistryClient

T = TypeVar("T")

ASK_S: Final = 10.0
"""Longest that a start waits for the registry to say which artifact there is, in seconds."""
MADE_S: Final = 5.0
"""Longest wait for another start that makes the home's secret, in seconds."""
_SECRET: Final = re.compile(r"[0-9a-fA-F]{64}\Z")
OTHERS_WRITE: Final = 0o022


@dataclass(frozen=True, slots=True)
class Artifact:
    """One that is there and good, at ``commit``; ``files`` is its directory."""

    commit: str
    index: Index
    files: Path


def within(seconds: float, what: str, run: Callable[[], T]) -> T:
    """What ``run`` returns or raises, in a thread of its own. It is left alone when it takes longer: DeadlineExceeded
    says that ``what`` did."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:  # for whoever waits
            future.set_exception(error)

    threading.Thread(target=work, name="compile cache", daemon=True).start()
    try:
        return future.result(max(0.0, seconds))
    except TimeoutError:
        if future.done():
            raise  # its own
        raise DeadlineExceeded(f"{what} took more than {seconds:.0f} s") from None


def ask(client: RegistryClient, repo: RepoId, commit: str, seconds: float) -> tuple[str, dict[str, str]]:
    """The digest of a commit's manifest, and the refs of its repository. Raises HeliosError and OSError."""
    return within(
        min(ASK_S, seconds), "the registry's answer", lambda: (client.resolve(repo, commit).manifest, client.refs(repo))
    )


def artifact_at(commits: Commits, repo: RepoId, commit: str, secret: bytes, facts: str, seconds: float) -> Artifact:
    """The artifact that is the commit, checked and here to its last byte.

    Raises IntegrityError for one that is not for ``facts``, DeadlineExceeded, OSError."""
    late = threading.Event()

    def read() -> Artifact:
        index = unseal(commits.index(repo, commit), secret, facts)
        return Artifact(commit, index, commits.files(repo, commit, index, late))

    try:
        return within(seconds, "fetching and checking it", read)
    finally:
        late.set()


def secret_of(home: Home, settings: CompileCacheSettings) -> bytes:
    """What this node seals artifacts with, made if it is the home's own and not there. Raises InvalidInput, OSError."""
    if settings.key_file:
        path = Path(settings.key_file).expanduser()
        if path.stat().st_mode & OTHERS_WRITE:
            raise InvalidInput(
                f"{path} can be changed by others than its owner, who would run code here",
                hint=f"chmod go-w {path}",
            )
        return read_secret(path)
    path = home.root / "compile-cache.key"
    if not path.exists():
        _make_secret(path)
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The secret in a file. Raises InvalidInput, OSError."""
    text = path.read_text(errors="replace").strip()
    if not _SECRET.match(text):
        raise InvalidInput(f"{path} does not hold 64 hexadecimal digits", hint="`openssl rand -hex 32` prints some.")
    return bytes.fromhex(text)


def _make_secret(path: Path) -> None:
    """Make it, whole or not at all, once: another start may be at it."""
    until = time.monotonic() + MADE_S
    while (lock := LockFile.acquire(path.with_name(f"{path.name}.lock"))) is None:
        if time.monotonic() > until:
            raise Unavailable(f"{path} is being made by another process, which does not end")
    try:
        if not path.exists():
            fresh = path.with_name(f"{path.name}.new")
            fresh.unlink(missing_ok=True)  # of one that was killed
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    finally:
        lock.release()


def reason(error: HeliosError | OSError) -> str:
    """An error in one line, with what to do."""
    if isinstance(error, HeliosError):
        return error.message + (f" {error.hint}" if error.hint else "")
    return str(error)
