"""What a request asks for, as far as admission needs it: whether it streams, and about how many tokens it will use.

Read only where a limit in tokens or the queue needs it. The prompt is taken for a token in four bytes of the body,
which is right within a factor of two for text; what was really used is settled at the end (``usage``).
"""

from __future__ import annotations

from typing import Final

from router.relay.said import Fields

BYTES_A_TOKEN: Final = 4
GENERATING: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate"}
)
"""Routes whose answers are made of tokens."""
MOST: Final = 1 << 30


class Asked:
    """``tokens``: about how many, prompt and answer."""

    __slots__ = ("stream", "tokens")

    def __init__(self, stream: bool = False, tokens: float = 1.0) -> None:
        self.stream, self.tokens = stream, tokens


NOTHING: Final = Asked()
"""Of a request that nobody has looked at."""


def read(path: str, fields: Fields | None, size: int, output_tokens: int) -> Asked:
    """``fields`` of a JSON document, or None for a form; ``size`` in bytes; ``output_tokens`` are
    assumed where the request has no maximum."""
    output = output_tokens if path in GENERATING else 0
    if fields is None:
        return Asked(False, float(max(1, output_tokens)))
    if output:
        most = fields.max_completion_tokens or fields.max_tokens or fields.max_output_tokens
        if most is not None and 0 < most <= MOST:
            output = most
        if fields.n is not None and 0 < fields.n <= MOST:
            output *= fields.n
    return Asked(fields.stream is True, float(max(1, min(MOST, size // BYTES_A_TOKEN + output))))
