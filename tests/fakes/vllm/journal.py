"""What a fake was told and what it answered: one record a request, bounded."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Final

KEPT: Final = 10_000
"""Most records kept; older ones are dropped."""


@dataclass(slots=True)
class Record:
    """One request. ``target`` is the request line's path and query as they came; ``headers`` have lower-case names."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body_bytes: int
    body_sha256: str
    at: float = field(default_factory=time.monotonic)
    status: int | None = None
    sent_bytes: int = 0
    sent_sha256: str = ""
    outcome: str = "open"
    """``open``, ``finished``, ``disconnected`` (the client left first) or the kind of the fault that ended it."""
    ended_at: float | None = None
    violations: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each uploaded file, by the name of its form field."""

    def header(self, name: str) -> list[str]:
        """All values of a header."""
        return [v for k, v in self.headers if k == name]


class Journal:
    """The records of one fake, oldest first."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque(maxlen=KEPT)

    def open(self, scope: Any, body: bytes) -> Record:
        """Begin the record of a request whose body is here."""
        query = scope["query_string"].decode("latin-1")
        target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        record = Record(scope["method"], target, headers, len(body), hashlib.sha256(body).hexdigest())
        self.records.append(record)
        return record

    def malformed(self, message: str) -> None:
        """Record bytes that are not HTTP."""
        record = Record("?", "?", [], 0, "", outcome="malformed", violations=[f"malformed HTTP: {message}"])
        self.records.append(record)

    def under_way(self) -> int:
        """Requests with a body that are not answered to their end."""
        return sum(record.method == "POST" and record.ended_at is None for record in self.records)

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]
