"""Verifying as a job of the mount: local bytes are hashed again, of one commit or of everything that is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import trio

from heliosfs.blobs import BlobStore
from heliosfs.care import Care
from heliosfs.control.jobs import Wish
from heliosfs.tree.snapshot import Snapshot
from heliosfs.warming import each

AT_ONCE: Final = 2
"""Files that are looked at side by side: one is read while the other is hashed."""

MAX_NAMED: Final = 1000
"""Damaged blobs that one answer names."""


class VerifyWork:
    """``snapshot``: whose files are meant; None: every blob that is here."""

    kind: Final = "verify"

    def __init__(self, store: BlobStore, care: Care, snapshot: Snapshot | None) -> None:
        self._store, self._care, self._snapshot = store, care, snapshot
        self._paths: dict[str, str] = {}
        if snapshot is not None:
            self._paths = {entry.sha256: path for path, entry in sorted(snapshot.files.items(), reverse=True)}
        self._blobs = self._blobs_done = self._local = self._bytes = self._bytes_done = 0
        self._blob = ""
        self._bad: list[dict[str, Any]] = []

    @property
    def wish(self) -> Wish:
        return Wish("verify", *(() if self._snapshot is None else (str(self._snapshot.repo), self._snapshot.commit)))

    @property
    def about(self) -> Mapping[str, Any]:
        snapshot = self._snapshot
        return {"repo": None if snapshot is None else str(snapshot.repo), "commit": snapshot and snapshot.commit}

    def shown(self) -> Mapping[str, Any]:
        return {
            "blobs": self._blobs,
            "blobs_done": self._blobs_done,
            "local": self._local,
            "bytes": self._bytes,
            "bytes_done": self._bytes_done,
            "path": self._paths.get(self._blob, self._blob),
            "bad": self._bad[:MAX_NAMED],
        }

    @property
    def failed(self) -> bool:
        return bool(self._bad)

    async def run(self) -> None:
        names = list(self._paths) if self._snapshot is not None else await trio.to_thread.run_sync(self._everything)
        self._blobs = len(names)
        sizes = await trio.to_thread.run_sync(self._sizes, names)
        self._bytes = sum(sizes.values())
        self._blobs_done = sum(not size for size in sizes.values())
        await each([name for name in names if sizes[name]], AT_ONCE, self._check)
        self._blob = ""

    async def _check(self, sha256: str) -> None:
        self._blob = sha256
        found = await self._care.check(sha256, self._looked)
        self._local += bool(found.bytes or found.reason)
        if found.reason:
            path = self._paths.get(sha256)
            what = {"reason": found.reason, "outcome": found.outcome, "in_use": found.in_use}
            self._bad.append({"sha256": sha256, "path": path} | what)
        self._blobs_done += 1

    async def _looked(self, count: int) -> None:
        self._bytes_done += count
        await trio.lowlevel.checkpoint()

    def _everything(self) -> list[str]:
        return sorted({name for tier in self._store.tiers for name in tier.files.scan()})

    def _sizes(self, names: list[str]) -> dict[str, int]:
        """Local bytes by name."""
        return {name: sum(tier.files.held(name)[0] for tier in self._store.tiers) for name in names}
