"""Answers that a worker compresses go on as they are, whatever the router would do with them otherwise."""

from __future__ import annotations

import gzip
import zlib

import pytest

from tests.support.plain_worker import Handler, working
from tests.support.routing import StartRouter, start_router

__all__ = ["start_router"]


@pytest.mark.parametrize("mode", ["served", "asked"])
def test_compressed_answers_pass_as_they_are(start_router: StartRouter, mode: str) -> None:
    """Also one that was not asked for, where the model's name would be replaced."""
    document, events = b'{"model": "m", "object": "list"}', [b'data: {"model": "m"}\n\n', b"data: [DONE]\n\n"]
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) for event in events] + [packer.flush()]
    asked: list[str | None] = []

    def serve(handler: Handler) -> None:
        asked.append(handler.headers["accept-encoding"])
        streamed = b"stream" in handler.rfile.read(int(handler.headers["content-length"]))
        handler.send_response(200)
        handler.send_header("content-encoding", "gzip")
        handler.send_header("content-type", "text/event-stream" if streamed else "application/json")
        if streamed:
            handler.send_header("transfer-encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        else:
            body = gzip.compress(document)
            handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    with working(serve) as worker:
        router = start_router(worker.url, answer_model=mode)
        for fields, whole, kind in (
            ({"input": "x"}, document, "application/json"),
            ({"input": "x", "stream": True}, b"".join(events), "text/event-stream"),
        ):
            body = {"model": "m", **fields}
            answer = router.request("POST", "/v1/responses", body, {"accept-encoding": "gzip"})
            assert (answer.header("content-encoding"), answer.header("content-type")) == ("gzip", kind)
            assert gzip.decompress(answer.body) == whole
    assert asked == {"served": ["gzip"] * 2, "asked": [None] * 2}[mode]
