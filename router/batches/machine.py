"""What may become of a batch: records in, records out, with the time given in unix seconds.

    validating -> in_progress -> finalizing -> completed
        |              |-> expired, failed
        |-> failed, expired
    validating, in_progress -> cancelling -> cancelled

An owner claims a batch by a new epoch and renews his claim by changing the record; one whose record has changed under
him (``shelf.Lost``) reads it again and goes on only if the epoch is still his. So of two that believe to own a batch
only one can write, and what the other has written since is not in the record and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from msgspec.structs import replace

from router.batches.progress import Progress
from router.batches.records import BatchRecord, LineError, Part, Status, Usage

WINDOW_S: Final = 86400
"""The completion window, in seconds: clients say "24h"."""
MAX_ERRORS: Final = 100
"""Errors that a record lists."""

NEXT: Final[dict[Status, Sequence[Status]]] = {
    "validating": ("in_progress", "failed", "expired", "cancelling"),
    "in_progress": ("finalizing", "failed", "expired", "cancelling"),
    "finalizing": ("completed", "failed"),
    "cancelling": ("cancelled",),
    "completed": (), "failed": (), "expired": (), "cancelled": (),
}  # fmt: skip

Verdict = Literal["run", "cancel", "expire"]


class NotPossible(Exception):
    """The batch is in another state than that."""


def moved(record: BatchRecord, status: Status, now: float, **changes: Any) -> BatchRecord:
    """The batch in its next state, since ``now``. Raises NotPossible."""
    if status not in NEXT[record.status]:
        raise NotPossible(f"a batch that is {record.status} can't become {status}")
    return replace(record, status=status, **{f"{status}_at": int(now)}, **changes)


# --- whose it is ---


def claimed(record: BatchRecord, owner: str) -> BatchRecord:
    """It is this owner's from now on."""
    return replace(record, owner=owner, epoch=record.epoch + 1)


def renewed(record: BatchRecord) -> BatchRecord:
    """It is still its owner's: another record, so that those who watch it see him live."""
    return replace(record, beat=record.beat + 1)


def released(record: BatchRecord) -> BatchRecord:
    """It is nobody's, so that the next may have it at once."""
    return replace(record, owner="")


# --- how far it is ---


def validated(record: BatchRecord, total: int, model: str | None, now: float) -> BatchRecord:
    """Its input is sound: ``total`` requests. Raises NotPossible."""
    return moved(record, "in_progress", now, total=total, model=model)


def failed(record: BatchRecord, errors: Sequence[LineError], now: float) -> BatchRecord:
    """It can't be run, or not any further. Raises NotPossible."""
    return moved(record, "failed", now, errors=list(errors[:MAX_ERRORS]), owner="")


def advanced(
    record: BatchRecord, progress: Progress, output: Sequence[Part], error: Sequence[Part], usage: Usage
) -> BatchRecord:
    """More of it is done; ``output`` and ``error`` are all parts there are now, ``usage`` is that of all answers."""
    return replace(
        record, below=progress.below, ahead=sorted(progress.ahead), completed=progress.completed,
        failed=progress.failed, usage=usage, output=list(output), error=list(error),
    )  # fmt: skip


def verdict(record: BatchRecord, now: float) -> Verdict:
    """What its owner is to do with what is not done yet."""
    if record.status == "cancelling":
        return "cancel"
    if record.status in ("validating", "in_progress") and now >= record.expires_at:
        return "expire"
    return "run"


def cancelling(record: BatchRecord, now: float) -> BatchRecord:
    """Somebody wants no more of it; again is no error. Raises NotPossible where it is too late."""
    return record if record.status == "cancelling" else moved(record, "cancelling", now)


def ended(record: BatchRecord, now: float) -> BatchRecord:
    """All that will be written is. Raises NotPossible."""
    status: Status = {"finalizing": "completed", "cancelling": "cancelled"}.get(record.status, "expired")  # type: ignore[assignment]
    return moved(record, status, now, owner="")
