"""The lines of a batch's input: one JSON object each, checked before anything is asked.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …}}

A body goes to the worker as it is written. Blank lines are no requests. Lines count from 1, requests from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Final

import msgspec

from helios.decoding import from_json
from router.batches.records import LineError

ENDPOINTS: Final = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/score", "/v1/rerank",
)  # fmt: skip
MAX_LINE: Final = 16 << 20
"""Longest line, in bytes."""
MAX_CUSTOM_ID: Final = 512
"""Longest ``custom_id``, in characters."""


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct):
    model: Any = None
    stream: Any = None


class Wanted(msgspec.Struct, frozen=True):
    """A request of a batch."""

    custom_id: str
    model: str
    body: bytes


class Splitter:
    """Bytes in, lines out: (number, text without its end), None for one that is too long. Blank ones are left out."""

    def __init__(self, most: int = MAX_LINE) -> None:
        self._most, self._rest, self._number, self._over = most, bytearray(), 0, False

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes | None]]:
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._take(data[start:end])
            yield from self._line()
            start = end + 1
        self._take(data[start:])

    def finish(self) -> Iterator[tuple[int, bytes | None]]:
        """What stands behind the last end of a line."""
        yield from self._line()

    def _take(self, piece: bytes) -> None:
        if len(self._rest) + len(piece) > self._most:
            self._over = True
            self._rest.clear()
        if not self._over:
            self._rest += piece

    def _line(self) -> Iterator[tuple[int, bytes | None]]:
        self._number += 1
        text = bytes(self._rest)
        over, self._over = self._over, False
        self._rest.clear()
        if self._number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")
        text = text.strip()
        if over:
            yield self._number, None
        elif text:
            yield self._number, text


class BadLine(Exception):
    """A line that is no request of the batch."""

    def __init__(self, error: LineError) -> None:
        super().__init__(error.message)
        self.error = error


def read(number: int, text: bytes | None, endpoint: str, max_body: int) -> Wanted:
    """The request of a line; ``max_body`` in bytes. Raises BadLine."""

    def bad(code: str, message: str, param: str | None = None) -> BadLine:
        return BadLine(LineError(code=code, message=message, param=param, line=number))

    if text is None:
        raise bad("line_too_large", f"This line is longer than {MAX_LINE >> 20} MiB.")
    try:
        line = from_json(text, _Line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise bad("invalid_json_line", "This line is not parseable as a valid JSON object.") from None
    if not isinstance(line.custom_id, str) or not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id has to be a string of 1 to {MAX_CUSTOM_ID} characters."
        raise bad("invalid_custom_id", message, "custom_id")
    if line.method != "POST":
        raise bad("invalid_method", 'method has to be "POST".', "method")
    if line.url != endpoint:
        raise bad("invalid_url", f"url has to be the endpoint of the batch, {endpoint}.", "url")
    if len(line.body) > max_body:
        raise bad("body_too_large", f"body is longer than {max_body} bytes.", "body")
    try:
        body = from_json(line.body, _Body)
    except msgspec.DecodeError:
        raise bad("invalid_body", "body has to be a JSON object.", "body") from None
    if not isinstance(body.model, str) or not body.model:
        raise bad("missing_required_parameter", "body names no model.", "body.model")
    if body.stream not in (None, False):
        raise bad("stream_not_supported", "An answer in a batch can't be a stream.", "body.stream")
    return Wanted(line.custom_id, body.model, bytes(line.body))


class Census:
    """All lines of an input, looked at one after the other: how many, which errors, which model.

    A ``custom_id`` is remembered by 16 bytes, so 50,000 of them cost some megabytes.
    """

    def __init__(self, endpoint: str, max_body: int, max_lines: int, max_errors: int) -> None:
        self._endpoint, self._max_body, self._max_lines = endpoint, max_body, max_lines
        self._max_errors = max_errors
        self._seen: set[bytes] = set()
        self.total = 0
        self.errors: list[LineError] = []
        self._models: set[str] = set()

    @property
    def model(self) -> str | None:
        """The one that all requests ask for; None where they ask for several."""
        return next(iter(self._models)) if len(self._models) == 1 else None

    @property
    def hopeless(self) -> bool:
        """Whether the rest need not be looked at."""
        return self.total > self._max_lines or len(self.errors) >= self._max_errors

    def count(self, number: int, text: bytes | None) -> None:
        """The next line."""
        self.total += 1
        if self.total > self._max_lines:
            message = f"The batch has more than {self._max_lines} requests."
            self.errors.append(LineError(code="too_many_requests", message=message, line=number))
            return
        try:
            wanted = read(number, text, self._endpoint, self._max_body)
        except BadLine as bad:
            self.errors.append(bad.error)
            return
        digest = blake2b(wanted.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            message = f"The custom_id {wanted.custom_id[:100]!r} is that of an earlier line, too."
            error = LineError(code="duplicate_custom_id", message=message, param="custom_id", line=number)
            self.errors.append(error)
        self._seen.add(digest)
        if len(self._models) < 2:
            self._models.add(wanted.model)

    def finish(self) -> None:
        """There are no more lines."""
        if not self.total:
            self.errors.append(LineError(code="empty_file", message="The input file has no requests."))
