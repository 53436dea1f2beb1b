"""What the store holds of a file and of a batch: JSON with a version, replaced as a whole.

A file's record never changes; its content lies in parts, which are written before it and never change either. So an
output file is the list of the parts that its batch has written, and nothing is copied. A batch's record is changed by
one owner at a time and by whoever cancels it, each time only if it is still what was read (``objects``).
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Final, Literal

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip
FINAL: Final = frozenset({"failed", "completed", "expired", "cancelled"})
NOBODY: Final = "-"
"""Stands for the tenant where there are none; no tenant can be called so."""

FILE_ID: Final = re.compile(r"file-[0-9a-f]{32}\Z")
BATCH_ID: Final = re.compile(r"batch_[0-9a-f]{32}\Z")


def new_id(prefix: str, now: float) -> str:
    """An id that sorts by its time (unix seconds, to the millisecond) and that nobody can guess."""
    return f"{prefix}{round(now * 1000):012x}{secrets.token_hex(10)}"


def born_at(identity: str) -> float:
    """When an id was made, in unix seconds."""
    return int(identity[-32:-20], 16) / 1000


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a file's content: the object that holds it, and its bytes."""

    key: str
    size: int


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file. Times are unix seconds; ``tenant`` as in keys (``NOBODY`` where there is none)."""

    version: Literal[1] = 1
    id: str
    tenant: str
    filename: str
    purpose: Literal["batch", "batch_output"]
    created_at: int
    expires_at: int | None = None
    parts: list[Part] = []

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def shown(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {
            "id": self.id, "object": "file", "bytes": self.size, "created_at": self.created_at,
            "expires_at": self.expires_at, "filename": self.filename, "purpose": self.purpose,
            "status": "processed", "status_details": None,
        }  # fmt: skip


class Who(msgspec.Struct, frozen=True):
    """For whom a batch runs. ``key``: the API key's id, which has to be good still when a line is asked; where it is
    empty (a token, or nobody is asked who he is) ``rights`` are those that there were when the batch was made."""

    tenant: str
    key: str = ""
    rights: list[tuple[list[str], list[str]]] = []


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed; ``line`` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens, of all answers together."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input + other.input, self.cached + other.cached, self.output + other.output,
            self.reasoning + other.reasoning,
        )  # fmt: skip

    def shown(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input, "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output, "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }  # fmt: skip


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are unix seconds.

    ``owner`` and ``epoch``: which process runs it, and how many have; ``beat`` makes every renewal another record.
    ``below``, ``ahead``: the requests that are done (``progress``). ``output``, ``error``: what was written of them.
    """

    version: Literal[1] = 1
    id: str
    who: Who
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_expires_s: int
    status: Status = "validating"
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    errors: list[LineError] = []
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    owner: str = ""
    epoch: int = 0
    beat: int = 0
    below: int = 0
    ahead: list[int] = []
    output: list[Part] = []
    error: list[Part] = []

    @property
    def tenant(self) -> str:
        """As in keys."""
        return self.who.tenant or NOBODY

    @property
    def over(self) -> bool:
        return self.status in FINAL

    def shown(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        times = {
            name: getattr(self, name)
            for name in (
                "created_at", "expires_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at",
                "expired_at", "cancelling_at", "cancelled_at",
            )
        }  # fmt: skip
        errors = {"object": "list", "data": msgspec.to_builtins(self.errors)} if self.errors else None
        return {
            "id": self.id, "object": "batch", "endpoint": self.endpoint, "model": self.model, "errors": errors,
            "input_file_id": self.input_file_id, "completion_window": self.completion_window, "status": self.status,
            "output_file_id": self.output_file_id if self.over and self.output else None,
            "error_file_id": self.error_file_id if self.over and self.error else None, **times,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": self.usage.shown(), "metadata": self.metadata,
        }  # fmt: skip


def encode(record: FileRecord | BatchRecord) -> bytes:
    return msgspec.json.encode(record)


def file_of(data: bytes, key: str) -> FileRecord:
    """Raises IntegrityError for what is no record, or one of another version."""
    try:
        return from_json(data, FileRecord)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{key} is no record of a file: {error}") from None


def batch_of(data: bytes, key: str) -> BatchRecord:
    """Raises IntegrityError for what is no record, or one of another version."""
    try:
        return from_json(data, BatchRecord)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{key} is no record of a batch: {error}") from None
