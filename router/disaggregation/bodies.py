"""The bodies of the two requests that a disaggregated one becomes.

Both are the client's, field by field as it came, but for what is said here; where a name comes twice the last one
counts, as in vLLM's parser. The one for prefill asks for a single token, whole: the limits of its route are 1, and
what would contradict that (``min_tokens``, ``stream_options``) is left out. The other one has the client's own limits.
The fields of the connector are set in both; clients can't (``router.relay.fields``).

Source: vLLM 0.32, entrypoints' protocols, and llm-d-router's sidecar (pkg/sidecar/proxy), whose cases are our tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
from msgspec import Raw

from helios.decoding import json_decoder
from router.disaggregation.connectors import Connector, Known, Template

Values = Mapping[str, bytes]
"""What ``Known`` stands for, by its name; JSON."""
Document = dict[str, Raw]
"""A JSON object, its values as they came."""
_DOCUMENT: Final = json_decoder(Document)
_LIST: Final = json_decoder(list[Raw])
_ONE, _FALSE = Raw(b"1"), Raw(b"false")
_NOTHING: Final = (b"null", b"false", b"[]", b'""')


@dataclass(frozen=True, slots=True)
class Caps:
    """What a request of a route for one token looks like. ``inside``: the object in which limits stand."""

    ones: tuple[str, ...]
    """The limits that are 1."""
    away: tuple[str, ...] = ("min_tokens", "stream_options")
    off: tuple[str, ...] = ("stream",)
    """What is false."""
    inside: str = ""


CAPS: Final = {
    "/v1/chat/completions": Caps(("max_tokens", "max_completion_tokens")),
    "/v1/completions": Caps(("max_tokens",)),
    "/v1/messages": Caps(("max_tokens",)),
    # Nothing of it is to be kept, or made later.
    "/v1/responses": Caps(("max_output_tokens",), off=("stream", "store", "background")),
    "/inference/v1/generate": Caps(("max_tokens",), inside="sampling_params"),
}
"""The routes whose prompts another worker can compute."""
_SEVERAL: Final = ("n", "best_of")
"""Blocks that are fetched once can't serve several answers."""
_WHOLE_PROMPT: Final = ("prompt_logprobs", "echo", "use_beam_search")
"""What the answer is about is computed with the prompt, so it has to be where the answer is made."""
_KEPT: Final = ("previous_response_id", "previous_input_messages", "conversation")
"""What is behind these is in the memory of the worker that made it."""


def document_of(body: bytes) -> Document:
    """The fields of a JSON object that ``router.relay.fields`` has taken."""
    return _DOCUMENT.decode(body)


def why_whole(path: str, document: Document) -> str:
    """Why a request can't be split, as a label; empty: it can be."""
    if path not in CAPS:
        return "route"
    limits = _limits(CAPS[path], document)
    if any(_sent(limits, name) and bytes(limits[name]) != b"1" for name in _SEVERAL):
        return "several_answers"
    if any(_sent(limits, name) for name in _WHOLE_PROMPT):
        return "whole_prompt"
    if any(_sent(document, name) for name in _KEPT):
        return "kept_state"
    if path == "/v1/completions" and _prompts(document) != 1:
        return "several_prompts"
    return ""


def for_prefill(path: str, document: Document, connector: Connector, values: Values) -> bytes:
    """The request for one token, whole. Raises KeyError for a value that is not known."""
    caps = CAPS[path]
    if not connector.capped:
        out = {name: value for name, value in document.items() if name != "stream_options"} | {"stream": _FALSE}
        return with_fields(path, out, connector, connector.prefill, values)
    out = {name: value for name, value in document.items() if name not in caps.away}
    out |= dict.fromkeys(caps.off, _FALSE)
    if caps.inside:
        limits = {name: value for name, value in _limits(caps, document).items() if name not in caps.away}
        out[caps.inside] = Raw(msgspec.json.encode(limits | dict.fromkeys(caps.ones, _ONE)))
    else:
        out |= dict.fromkeys(caps.ones, _ONE)
    return with_fields(path, out, connector, connector.prefill, values)


def for_decode(path: str, document: Document, connector: Connector, values: Values) -> bytes:
    """The client's own request, with what the prefill worker left. Raises KeyError for a value that is not known."""
    return with_fields(path, document, connector, connector.decode, values)


def with_fields(path: str, document: Document, connector: Connector, fields: Template, values: Values) -> bytes:
    """The request with these fields."""
    own: Document = filled(fields, values)
    if path in connector.named:
        own[connector.named[path]] = Raw(b'"resp_' + values["request_id"][1:])
    return msgspec.json.encode(document | own)


def filled(fields: Template, values: Values) -> Document:
    """A row's fields with the values in their places."""
    out: Document = {}
    for name, value in fields.items():
        match value:
            case Known(known, optional):
                if not optional or known in values:
                    out[name] = Raw(values[known])
            case dict():
                out[name] = Raw(msgspec.json.encode(filled(value, values)))
            case _:
                out[name] = Raw(msgspec.json.encode(value))
    return out


def _limits(caps: Caps, document: Document) -> Document:
    """The object in which the limits stand; empty where there is none that is an object."""
    if not caps.inside:
        return document
    try:
        return _DOCUMENT.decode(document.get(caps.inside, Raw(b"{}")))
    except msgspec.DecodeError:
        return {}


def _sent(document: Document, name: str) -> bool:
    return name in document and bytes(document[name]) not in _NOTHING


def _prompts(document: Document) -> int:
    """How many prompts there are: a string is one, and so are numbers of tokens."""
    prompt = document.get("prompt")
    if prompt is None or not bytes(prompt).startswith(b"["):
        return 1
    items = _LIST.decode(prompt)
    return 1 if items and bytes(items[0])[:1].isdigit() else len(items)
