"""What a collection did, or, as a dry run, would do."""

from __future__ import annotations

from typing import Any

import msgspec


class Report(msgspec.Struct):
    """Counts and bytes. In a dry run ``removed_*`` and ``freed_bytes`` are what runs would remove in the end."""

    dry_run: bool
    commits: int = 0
    """Commits that there were at the start; each is kept for the first reason of the next three, or is garbage."""
    kept_refs: int = 0
    kept_history: int = 0
    kept_pinned: int = 0
    kept_recent: int = 0
    condemned_commits: int = 0
    """Garbage that waits for the grace to end."""
    condemned_blobs: int = 0
    removed_commits: int = 0
    removed_blobs: int = 0
    removed_objects: int = 0
    freed_bytes: int = 0
    """Of objects that nothing needs any more; they are deleted once no reader can know of them."""
    busy_blobs: int = 0
    """Garbage that pushes or pulls under way rely on; it is looked at again in the next run."""
    rewritten_objects: int = 0
    """Objects that were mostly garbage: what is needed of them was copied into packs."""
    rewritten_bytes: int = 0
    deleted_objects: int = 0
    """Objects deleted from the store in this run, of this one and earlier ones."""
    waiting_objects: int = 0
    """Objects to be deleted later."""
    problems: list[str] = []

    def result(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        return out
