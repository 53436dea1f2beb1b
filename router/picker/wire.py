"""The messages of Envoy's external processing, both ways: what is read of a gateway's, and what it is answered.

``ext_proc.proto`` says which there are; header, metadata and subset are as the Gateway API inference
extension's endpoint picker protocol has them (docs/proposals/004-endpoint-picker-protocol). An answer is made as bytes:
the part that only depends on the endpoint is made once and kept, since messages may be put one behind the other
(Protocol Buffers, Encoding: "Last one wins", of messages: merged).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from router.picker import ext_proc_pb2 as messages
from router.picker.subset import Subset
from router.relay.headers import Headers

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION: Final = "x-gateway-destination-endpoint"
SERVED: Final = "x-gateway-destination-endpoint-served"
NAMESPACE: Final = "envoy.lb"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
CHUNK: Final = 62_000
"""Longest piece of a body, in bytes: some gateways take no message beyond 64 KiB."""
OVERWRITE: Final = messages.OVERWRITE_IF_EXISTS_OR_ADD
"""Else a client could say where its request goes: what it sends would stay, and come first."""
DUPLEX: Final = messages.FULL_DUPLEX_STREAMED

decode = messages.ProcessingRequest.FromString
"""A gateway's message; raises google.protobuf.message.DecodeError."""


class Head(NamedTuple):
    """A request's. ``ended``: it has no body; ``headers`` are without pseudo-headers, names in lower case."""

    method: bytes
    target: bytes
    headers: Headers
    subset: Subset | None
    ended: bool
    sends: str
    """The mode in which the gateway sends the body, where that is not one in which it can be answered; else ""."""


def head_of(message: Any) -> Head:
    """What the first message about a request says (``request_headers``)."""
    said = message.request_headers
    pseudo, headers = {b":method": b"", b":path": b""}, []
    for one in said.headers.headers:
        pair = one.key.lower().encode(), one.raw_value or one.value.encode()
        if pair[0].startswith(b":"):
            pseudo[pair[0]] = pair[1]
        else:
            headers.append(pair)
    sends = ""
    if not said.end_of_stream and message.HasField("protocol_config"):
        mode = message.protocol_config.request_body_mode
        sends = "" if mode == DUPLEX else messages.BodySendMode.Name(mode)
    return Head(pseudo[b":method"], pseudo[b":path"], headers, _subset(message), said.end_of_stream, sends)


def echoes(message: Any) -> bool:
    """Whether the gateway waits for each piece of the answer to come back, as far as the first message says."""
    return not message.HasField("protocol_config") or message.protocol_config.response_body_mode == DUPLEX


def answer_of(message: Any) -> tuple[int, str]:
    """The status that ``response_headers`` says, 0 for none, and the endpoint that served it, "" where nobody said."""
    status = 0
    for one in message.response_headers.headers.headers:
        if one.key == ":status":
            text = one.raw_value or one.value.encode()
            status = int(text) if text.isdigit() and len(text) == 3 else 0
            break
    return status, _text(message, NAMESPACE, SERVED)


def _subset(message: Any) -> Subset | None:
    fields = _fields(message, SUBSET_NAMESPACE)
    if fields is None or SUBSET not in fields:
        return None
    value = fields[SUBSET]
    if value.WhichOneof("kind") == "list_value":
        return Subset(one.string_value for one in value.list_value.values)
    return Subset(value.string_value.split(","))


def _text(message: Any, namespace: str, name: str) -> str:
    fields = _fields(message, namespace)
    text: str = "" if fields is None or name not in fields else fields[name].string_value
    return text


def _fields(message: Any, namespace: str) -> Any:
    if not message.HasField("metadata_context"):
        return None
    known = message.metadata_context.filter_metadata
    return known[namespace].fields if namespace in known else None


# --- answers ---


def picked(endpoints: str, content_length: int, added: Headers, removed: Sequence[bytes]) -> bytes:
    """Where the request goes: ``request_headers``."""
    message = messages.ProcessingResponse()
    mutation = message.request_headers.response.header_mutation
    _set(mutation, "content-length", b"%d" % content_length)
    for name, value in added:
        _set(mutation, name.decode(), value)
    if removed:
        mutation.remove_headers.extend({name.decode() for name in removed})
    encoded: bytes = message.SerializeToString()
    return _destination(endpoints) + encoded


@lru_cache(4096)
def _destination(endpoints: str) -> bytes:
    message = messages.ProcessingResponse()
    message.request_headers.response.clear_route_cache = True
    _set(message.request_headers.response.header_mutation, DESTINATION, endpoints.encode())
    message.dynamic_metadata.update({NAMESPACE: {DESTINATION: endpoints}})
    encoded: bytes = message.SerializeToString()
    return encoded


def bodies(content: bytes, ends: bool) -> Iterator[bytes]:
    """The request's body, in pieces; ``ends``: nothing follows, no trailers either."""
    for start in range(0, len(content) or 1, CHUNK):
        yield _body("request_body", content[start : start + CHUNK], ends and start + CHUNK >= len(content))


def refused(status: int, headers: Headers, body: bytes) -> bytes:
    """An answer that the gateway gives at once: ``immediate_response``."""
    message = messages.ProcessingResponse()
    said = message.immediate_response
    said.status.code = status
    said.body = body
    said.details = "helios_picker"
    for name, value in headers:
        _set(said.headers, name.decode(), value)
    encoded: bytes = message.SerializeToString()
    return encoded


def passed(kind: str, message: Any, echoing: bool) -> bytes:
    """Another message of the gateway's, answered with: go on."""
    if kind == "response_body" and echoing:
        said = message.response_body
        return _body(kind, said.body, said.end_of_stream)
    answer = messages.ProcessingResponse()
    getattr(answer, kind).SetInParent()
    encoded: bytes = answer.SerializeToString()
    return encoded


def _body(kind: str, content: bytes, ends: bool) -> bytes:
    message = messages.ProcessingResponse()
    piece = getattr(message, kind).response.body_mutation.streamed_response
    piece.body = content
    piece.end_of_stream = ends
    encoded: bytes = message.SerializeToString()
    return encoded


def _set(mutation: Any, name: str, value: bytes) -> None:
    option = mutation.set_headers.add()
    option.append_action = OVERWRITE
    option.header.key = name
    option.header.raw_value = value
