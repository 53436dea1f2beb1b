"""A request as scheduling sees it. What costs something is made when a policy asks for it, once.

Tokens are estimates, for comparing loads: a prompt has a token for every 4 bytes of the body, up to ``PROMPT_MAX`` (an
image in it is not that long); an answer has ``max_tokens``, up to ``OUTPUT_MAX`` since clients ask for more than they
get, or ``OUTPUT_USUAL`` where the client does not say. Routes that generate nothing have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from router.relay.headers import Headers
from router.relay.said import Fields
from router.scheduling.keys import key_of
from router.scheduling.marks import Marks
from router.scheduling.prompt import beginning

if TYPE_CHECKING:
    from router.kv.dialogue import Answer

BYTES_PER_TOKEN: Final = 4
PROMPT_MAX: Final = 1 << 17
OUTPUT_MAX: Final = 2048
OUTPUT_USUAL: Final = 512
GENERATES: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate"}
)
FORM: Final = 2048
"""Tokens of an upload (audio), which says nothing of its length in tokens."""


class Request:
    """One request for ``model``. ``body`` and ``fields`` are there until a worker answers."""

    __slots__ = (
        "_begins", "_marks", "_sessions", "adapter", "alone", "body", "cached", "fields", "headers", "model",
        "output_tokens", "path", "prefill", "prompt_tokens", "stream",
    )  # fmt: skip

    def __init__(
        self, model: str, fields: Fields | None = None, *, path: str = "", headers: Headers = (), body: bytes = b"",
        adapter: str | None = None, known: Answer | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        """``fields``: what the body says, None for a form; ``headers`` have lower-case names; ``adapter``: the model's
        name where it is that of a LoRA adapter; ``known``: what the index of KV events says of the prompt; ``alone``:
        the model has one worker, so there is nothing to choose, nor to remember for the next choice."""
        self.model, self.fields, self.path, self.headers, self.body = model, fields, path, headers, body
        self.adapter, self.alone = adapter, alone
        self.cached: Mapping[str, int] = known.cached if known is not None else {}
        """Tokens of the prompt that workers have cached, by URL; of those that are left out it is not known."""
        self.stream = fields is not None and bool(fields.stream)
        self.prompt_tokens, self.output_tokens = _estimate(path, fields, len(body))
        if known is not None:
            self.prompt_tokens = known.length
        self.prefill = self.prompt_tokens
        """Tokens of the prompt that the chosen worker will have to compute, as far as the policy knows."""
        self._begins: dict[int, int | None] = {}
        self._marks: Marks | None = None
        self._sessions: dict[tuple[bytes, str], int | None] = {}

    @property
    def tokens(self) -> int:
        """About how many tokens the request is, prompt and answer together."""
        return self.prompt_tokens + self.output_tokens

    def prefix_key(self, chars: int) -> int | None:
        """A key of the adapter and the prompt's first ``chars`` characters; None without a prompt."""
        if chars not in self._begins:
            text = beginning(self.fields, chars) if self.fields is not None else ""
            self._begins[chars] = key_of(self.adapter or "", text) if text else None
        return self._begins[chars]

    def marks(self) -> Marks | None:
        """What the prompt begins with, at several lengths; None for a form."""
        if self._marks is None and self.fields is not None:
            self._marks = Marks(self.adapter or self.model, self.fields)
        return self._marks

    def session_key(self, header: bytes, field: str) -> int | None:
        """A key of the session that the header names, or else the body's field; empty ones name none."""
        where = header, field
        if where not in self._sessions:
            name = next((value.strip() for key, value in self.headers if key == header), b"").decode("latin-1")
            if not name and field and self.fields is not None:
                name = getattr(self.fields, field) or ""
            self._sessions[where] = key_of("session", name) if name else None
        return self._sessions[where]


def _estimate(path: str, fields: Fields | None, size: int) -> tuple[int, int]:
    if fields is None:
        return FORM, 0
    prompt = min(size // BYTES_PER_TOKEN, PROMPT_MAX) + 1
    if path not in GENERATES:
        return prompt, 0
    asked = fields.max_tokens or fields.max_completion_tokens or fields.max_output_tokens or OUTPUT_USUAL
    return prompt, min(max(asked, 1), OUTPUT_MAX)
