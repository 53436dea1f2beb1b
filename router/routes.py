"""The allow-list: the paths that reach a worker. Every other path ends at the router.

vLLM serves more than is for users: ``/sleep``, ``/collective_rpc`` (remote code), ``/update_weights``, LoRA loading,
and its API key protects only some of it. So nothing passes that is not written here, spelled exactly like this: a
path with percent-encoding, a doubled slash, dots or other case is another path, and what is sent to a worker is the
path of this table, never the client's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from router.errors import ANTHROPIC, OPENAI, RESPONSES, Dialect


@dataclass(frozen=True, slots=True)
class InferenceRoute:
    """One path, POST only. ``body``: where the model's name stands."""

    path: str
    dialect: Dialect = OPENAI
    body: Literal["json", "form"] = "json"


ROUTES: Final = (
    InferenceRoute("/v1/chat/completions"),
    InferenceRoute("/v1/completions"),
    InferenceRoute("/v1/embeddings"),
    InferenceRoute("/v1/responses", RESPONSES),
    InferenceRoute("/v1/messages", ANTHROPIC),
    InferenceRoute("/v1/messages/count_tokens", ANTHROPIC),
    InferenceRoute("/v1/rerank"),
    InferenceRoute("/v2/rerank"),
    InferenceRoute("/rerank"),
    InferenceRoute("/v1/score"),
    InferenceRoute("/score"),
    InferenceRoute("/pooling"),
    InferenceRoute("/classify"),
    InferenceRoute("/tokenize"),
    InferenceRoute("/detokenize"),
    InferenceRoute("/v1/audio/transcriptions", body="form"),
    InferenceRoute("/v1/audio/translations", body="form"),
    InferenceRoute("/inference/v1/generate"),
)
