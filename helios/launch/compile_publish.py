"""Publishing what an engine has compiled, as a commit of the model's repository below a ref of its own.

The model's repository, because who may read its commits is then who may read the model, whatever the registry's
tenants, domains and upstreams say. One process of a home publishes at a time; between nodes the ref decides: whoever
finds it moved since the start lets the other's artifact be, and the next start builds on that.
"""

from __future__ import annotations

import shutil
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import Conflict, HeliosError, NotFound, Unavailable
from helios.launch.compile_artifact import FILES, INDEX, Index, seal, settled, snapshot
from helios.launch.compile_find import Artifact, reason
from helios.launch.compile_key import REFS, Key
from helios.lockfile import LockFile
from helios.names import RepoId
from helios.publish import LocalFile, publish
from helios.registry_client import RegistryClient

TURN_S: Final = 1.0
"""How often somebody else's publish, and whether an engine still compiles, is looked at, in seconds."""
QUIET_S: Final = 2.0
"""A file that was written to less long ago than this, in seconds, may be half of one: compilers write in place, too."""
PATIENCE_S: Final = 120.0
"""An engine that still compiles after so many seconds is waited for no longer: the next start publishes the rest."""
KEPT: Final = 8
"""Artifacts of a model that are kept; of more the oldest go: versions, devices and arguments come and go."""


@dataclass(frozen=True, slots=True)
class Published:
    """What became an artifact; ``stay`` is why older ones beyond KEPT are still there, empty where none is."""

    commit: str
    index: Index
    stay: str


@dataclass(slots=True)
class Publisher:
    """Publishes ``cache`` for ``key``. ``before``: the commit of the key's ref when the engine was started, ``good``:
    what the engine found there; at most ``most`` bytes are published."""

    client: RegistryClient
    repo: RepoId
    key: Key
    before: str | None
    good: Artifact | None
    cache: Path
    staging: Path
    secret: bytes
    most: int
    clock: Callable[[], float] = time.time
    """Of the files' times, in unix seconds."""

    def publish(self, closing: threading.Event) -> Published | None:
        """Publish what is new, and say what it was; None where there is nothing, or ``closing`` is set meanwhile.

        Raises HeliosError and OSError; nothing is visible then, and nothing left but in ``staging``.
        """
        self.staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        until = self.clock() + PATIENCE_S
        while not settled(self.cache, self.clock() - QUIET_S) and self.clock() < until:
            if closing.wait(TURN_S):
                return None
        while (turn := LockFile.acquire(self.staging / "publish.lock")) is None:
            if closing.wait(TURN_S):
                return None
        try:
            return self._publish(self.staging / "files", closing)
        finally:
            shutil.rmtree(self.staging / "files", ignore_errors=True)
            turn.release()

    def _publish(self, staging: Path, closing: threading.Event) -> Published | None:
        if staging.exists():
            shutil.rmtree(staging)  # of one that was killed
        if self.client.refs(self.repo).get(self.key.ref) != self.before:
            return None  # another start was first
        (staging / FILES).mkdir(parents=True)
        known, lower = (None, None) if self.good is None else (self.good.index, self.good.files)
        since = self.clock() - QUIET_S
        index = snapshot(self.cache, known, lower, self.key.facts, staging / FILES, self.most, since)
        if index is None or closing.is_set():
            return None
        (staging / INDEX).write_bytes(seal(index, self.secret))
        files = [_local(f"{FILES}/{path}", staging / FILES / path) for path in index.files]
        files.append(_local(INDEX, staging / INDEX))

        def go_on(_: int) -> None:
            if closing.is_set():
                raise Unavailable("the engine was stopped while what it had compiled was published")

        try:
            pushed = publish(
                self.client, staging, self.repo, self.key.ref, message="compiled kernels", files=files, progress=go_on
            )
        except Conflict:
            return None  # another node was first
        return Published(pushed.commit, index, self._drop_old())

    def _drop_old(self) -> str:
        """Remove the oldest artifacts beyond KEPT; returns why some stay, or nothing."""
        try:
            refs = {ref: at for ref, at in self.client.refs(self.repo).items() if ref.startswith(REFS)}
            if len(refs) <= KEPT:
                return ""
            aged = sorted((self._time(at), ref) for ref, at in refs.items() if ref != self.key.ref)
            for _, ref in aged[: len(refs) - KEPT]:
                self._drop(ref, refs[ref])
        except HeliosError as error:  # who may push need not be one who may remove
            return reason(error)
        return ""

    def _time(self, commit: str) -> float:
        """When an artifact was published, in unix seconds; 0 for one that another node has removed meanwhile."""
        try:
            return self.client.commits(self.repo, commit, 1)[0].time
        except NotFound:
            return 0.0

    def _drop(self, ref: str, commit: str) -> None:
        try:
            self.client.delete(self.repo, ref, expect=commit)
        except (NotFound, Conflict):
            return  # removed or replaced meanwhile


def _local(path: str, local: Path) -> LocalFile:
    status = local.stat()
    return LocalFile(path, local, status.st_size, bool(status.st_mode & stat.S_IXUSR))
