"""A request's body as it comes: bounded, looked at once, kept so that it can be sent again to another worker.

Bodies stay in memory until a worker answers: each has a most (``router.max_body_mib``), and all together have one
(``router.max_buffered_mib``). Of JSON the few fields that decide are read when it is whole. A form, which carries a
file, is scanned as it comes, and what is longer than a MiB goes to the disk (``spool``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from router import errors
from router.relay.fields import read
from router.relay.form import FormScan
from router.relay.said import Fields
from router.relay.spool import Spool
from router.routes import InferenceRoute

IN_MEMORY: Final = 1 << 20
"""Bytes of a form that are kept before they go to the disk."""

_READ: Final = frozenset({b"content-encoding", b"content-length", b"content-type"})


class Budget:
    """Bytes of request bodies held in memory by all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, count: int) -> None:
        """Count more bytes; raises ApiError (503) beyond the limit."""
        if self.used + count > self.limit:
            raise errors.overloaded(self.limit)
        self.used += count

    def give(self, count: int) -> None:
        self.used -= count


class Intake:
    """One body. When it is whole, ``content`` is it, or its rest where the beginning is in ``spool``.

    ``release`` gives memory and disk back, early or at the end.
    """

    __slots__ = (
        "_budget", "_form", "_held", "_limit", "_parts", "_size", "_writing", "asked", "content", "fields", "model",
        "spool",
    )  # fmt: skip

    def __init__(
        self, route: InferenceRoute, headers: Sequence[tuple[bytes, bytes]], limit: int, budget: Budget
    ) -> None:
        """``headers`` have lower-case names; ``limit`` is in bytes. Raises ApiError."""
        self._limit, self._budget, self._held, self._size = limit, budget, 0, 0
        self._writing = 0
        self.spool: Spool | None = None
        self._parts: list[bytes] = []
        self._form: FormScan | None = None
        self.content = b""
        self.model: str | None = None
        self.asked = ""
        """The model's name as it came, where ``rewrite`` has changed it."""
        self.fields: Fields | None = None
        """What a JSON body says; None for a form."""
        kind = b""
        for name, value in headers:
            if name not in _READ:
                continue
            if name == b"content-encoding" and value.strip().lower() != b"identity":
                raise errors.content_encoding(value.decode("latin-1")[:50])
            if name == b"content-length" and int(value) > limit:
                raise errors.too_large(limit)
            if name == b"content-type":
                kind = value
        if route.body == "form":
            self._form = FormScan(kind)

    def feed(self, piece: bytes) -> None:
        """The next bytes. Raises ApiError."""
        self._size += len(piece)
        if self._size > self._limit:
            raise errors.too_large(self._limit)
        self._budget.take(len(piece))
        self._held += len(piece)
        self._parts.append(piece)
        if self._form is not None:
            self._form.feed(piece)

    @property
    def full(self) -> bool:
        """Whether ``flush`` is to be called before more comes."""
        return self._form is not None and self._held > IN_MEMORY and not self._writing

    @property
    def writing(self) -> bool:
        """Whether a flush is under way."""
        return self._writing > 0

    @property
    def size(self) -> int:
        """Bytes of the body that have come."""
        return self._size

    def flush(self, done: Callable[[OSError | None], None]) -> None:
        """Move what is in memory to the disk; ``done`` hears when it is there, or why not."""

        def written(error: OSError | None) -> None:
            self._budget.give(self._writing)
            self._writing = 0
            done(error)

        if self.spool is None:
            self.spool = Spool()
        data, self._parts = b"".join(self._parts), []
        self._writing, self._held = self._held, 0
        self.spool.append(data, written)

    def finish(self) -> None:
        """That was all: ``content``, ``model`` and ``fields`` are there. Raises ApiError."""
        parts = self._parts
        self.content = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts = []
        if self._form is None:
            self.fields = read(self.content)
            self.model = self.fields.model
        else:
            self.model = self._form.finish()
        self.asked = self.model or ""

    def rewrite(self, content: bytes, model: str) -> None:
        """Another body, of JSON, takes the place of the one that came."""
        self._budget.give(self._held - len(content))
        self._held = self._size = len(content)
        self.content, self.model = content, model

    def release(self) -> None:
        """Give memory and disk back: the body won't be sent again."""
        self._budget.give(self._held)
        self._held = 0
        self._parts, self.content, self.fields = [], b"", None
        if self.spool is not None:
            self.spool.close()
