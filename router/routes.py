"""The allow-list: the paths that reach a worker. Every other path ends at the router.

vLLM serves more than is for users: ``/sleep``, ``/collective_rpc`` (remote code), ``/update_weights``, LoRA loading,
and its API key protects only some of it. So nothing passes that is not written here, spelled exactly like this: a
path with percent-encoding, a doubled slash, dots or other case is another path, and what is sent to a worker is the
path of this table, never the client's.
"""

from __future__ import annotations

from typing import Final, Literal

from router.errors import ANTHROPIC, OPENAI, RESPONSES, Dialect


class InferenceRoute:
    """One path, POST only. ``body``: where the model's name stands.

    ``repeatable``: a request may be done twice, since it leaves nothing behind and costs one pass at most. ``engine``:
    the model has to run for it. ``named``: its answer, JSON or events, says which model made it.
    """

    __slots__ = ("body", "dialect", "engine", "named", "path", "raw_path", "repeatable")

    def __init__(
        self, path: str, dialect: Dialect = OPENAI, body: Literal["json", "form"] = "json", *,
        repeatable: bool = False, engine: bool = True, named: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.raw_path, self.dialect, self.body = path, path.encode(), dialect, body
        self.repeatable, self.engine, self.named = repeatable, engine, named


ROUTES: Final = (
    InferenceRoute("/v1/chat/completions"),
    InferenceRoute("/v1/completions"),
    InferenceRoute("/v1/embeddings", repeatable=True),
    InferenceRoute("/v1/responses", RESPONSES),
    InferenceRoute("/v1/messages", ANTHROPIC),
    InferenceRoute("/v1/messages/count_tokens", ANTHROPIC, repeatable=True, engine=False, named=False),
    InferenceRoute("/v1/rerank", repeatable=True),
    InferenceRoute("/v2/rerank", repeatable=True),
    InferenceRoute("/rerank", repeatable=True),
    InferenceRoute("/v1/score", repeatable=True),
    InferenceRoute("/score", repeatable=True),
    InferenceRoute("/pooling", repeatable=True),
    InferenceRoute("/classify", repeatable=True),
    InferenceRoute("/tokenize", repeatable=True, engine=False, named=False),
    InferenceRoute("/detokenize", repeatable=True, engine=False, named=False),
    InferenceRoute("/v1/audio/transcriptions", body="form", named=False),
    InferenceRoute("/v1/audio/translations", body="form", named=False),
    InferenceRoute("/inference/v1/generate", named=False),
)

PROBES: Final = frozenset({b"/healthz", b"/readyz", b"/metrics"})
"""What those ask who look after the router."""

RAW_ROUTES: Final = {route.raw_path: route for route in ROUTES}
