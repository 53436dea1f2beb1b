"""Publishing what an engine has compiled, as a commit of the model's repository below a ref of its own.

The model's repository, because who may read its commits is then who may read the model, whatever the registry's
tenants, domains and upstreams say. One process of a home publishes at a time; between nodes the ref decides: whoever
finds it moved since the start lets the other's artifact be, and the next start builds on that.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import Conflict, HeliosError, Unavailable
from helios.launch.compile_artifact import FILES, INDEX, Index, seal, snapshot
from helios.launch.compile_key import REFS, Key
from helios.lockfile import LockFile
from helios.names import RepoId
from helios.publish import LocalFile, publish
from helios.registry_client import RegistryClient

TURN_S: Final = 1.0
"""How often somebody else's publish is looked at, in seconds."""
KEPT: Final = 8
"""Artifacts of a model that are kept; of more the oldest go: versions, devices and arguments come and go."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """One that is there and good; ``files`` is its directory in the mount."""

    index: Index
    files: Path


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

    def publish(self, closing: threading.Event) -> str | None:
        """Publish what is new, and say what it was; None where there is nothing, or ``closing`` is set meanwhile.

        Raises HeliosError and OSError; nothing is visible then, and nothing left but in ``staging``.
        """
        self.staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        while (turn := LockFile.acquire(self.staging / "publish.lock")) is None:
            if closing.wait(TURN_S):
                return None
        try:
            return self._publish(self.staging / "files", closing)
        finally:
            shutil.rmtree(self.staging / "files", ignore_errors=True)
            turn.release()

    def _publish(self, staging: Path, closing: threading.Event) -> str | None:
        if staging.exists():
            shutil.rmtree(staging)  # of one that was killed
        if self.client.refs(self.repo).get(self.key.ref) != self.before:
            return None  # another start was first
        (staging / FILES).mkdir(parents=True)
        known, lower = (None, None) if self.good is None else (self.good.index, self.good.files)
        index = snapshot(self.cache, known, lower, self.key.facts, staging / FILES, self.most)
        if index is None:
            return None
        (staging / INDEX).write_bytes(seal(index, self.secret))
        files = [LocalFile(f"{FILES}/{path}", staging / FILES / path, entry.size, False)
                 for path, entry in index.files.items()]  # fmt: skip
        files.append(LocalFile(INDEX, staging / INDEX, (staging / INDEX).stat().st_size, False))

        def go_on(_: int) -> None:
            if closing.is_set():
                raise Unavailable("the engine was stopped while what it had compiled was published")

        try:
            pushed = publish(
                self.client, staging, self.repo, self.key.ref, message="compiled kernels", files=files, progress=go_on
            )
        except Conflict:
            return None  # another node was first
        self._drop_old()
        return (
            f"Compiled kernels of {self.repo.id} are published: {len(index.files)} files, {index.bytes / 1e6:.1f} MB, "
            f"commit {pushed.commit[:12]}."
        )

    def _drop_old(self) -> None:
        """Remove the oldest artifacts beyond KEPT, as far as this caller may."""
        refs = {ref: at for ref, at in self.client.refs(self.repo).items() if ref.startswith(REFS)}
        old = sorted(refs, key=lambda ref: self.client.commits(self.repo, ref, 1)[0].time) if len(refs) > KEPT else []
        for ref in [ref for ref in old if ref != self.key.ref][: len(refs) - KEPT]:
            try:
                self.client.delete(self.repo, ref, expect=refs[ref])
            except HeliosError:
                return  # who may push need not be one who may remove
