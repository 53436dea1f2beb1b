"""One route: journal, checks, fault, handler, answer; a client that leaves cancels the work, as in vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tests.fakes.vllm.errors import VllmError
from tests.fakes.vllm.faults import Broken, Reply
from tests.fakes.vllm.journal import Record
from tests.fakes.vllm.verify import problems

if TYPE_CHECKING:
    from tests.fakes.vllm.app import Fake

CYCLE: Final = "fake.cycle"
"""ASGI extension: uvicorn's cycle of the request, for faults below HTTP."""


@dataclass(frozen=True, slots=True)
class Json:
    """A whole answer."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(self.content, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Raw:
    """A whole answer that is not JSON."""

    content: bytes
    type: str | None = None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Events:
    """Server-sent events, each a whole block."""

    source: AsyncGenerator[bytes, None]


@dataclass(slots=True)
class Call:
    """One request, as a handler gets it."""

    fake: Fake
    record: Record
    scope: Any
    body: bytes

    @property
    def request_id(self) -> str:
        given = self.record.header("x-request-id")
        return given[0] if given else hashlib.sha256(repr(self.record.at).encode()).hexdigest()[:16]

    @property
    def created(self) -> int:
        return self.fake.created()


Answer = Json | Raw | Events
Handler = Callable[[Call], Awaitable[Answer]]


class Endpoint:
    """The ASGI application of one route."""

    def __init__(
        self, fake: Fake, handler: Handler, *, anthropic: bool = False, json_only: bool = False, owned: bool = False
    ) -> None:
        """``owned``: its owner calls it, and nobody else may."""
        self._fake, self._handler, self._anthropic, self._json_only = fake, handler, anthropic, json_only
        self._owned = owned

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await read(receive)
        record = self._fake.journal.open(scope, body)
        record.violations += problems(
            record, self._fake.own_host, owned=self._owned, gateway=self._fake.settings.gateway
        )
        cycle = scope["extensions"][CYCLE]
        fault = self._fake.faults.take(scope["path"])
        reply = Reply(send, cycle, record, fault, hashlib.sha256())
        call = Call(self._fake, record, scope, body)
        work = asyncio.create_task(self._work(call, reply, None if fault is None else fault.kind, fault))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not reply.finished:
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        except Broken:
            pass
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({gone, work})
            if record.outcome == "open":
                record.outcome = "finished" if reply.finished else "disconnected"
            record.ended_at = time.monotonic()

    async def _work(self, call: Call, reply: Reply, kind: str | None, fault: Any) -> None:
        try:
            if kind == "status":
                raise VllmError("a fault was ordered", status=fault.status, type="InternalServerError")
            if kind == "hang":
                call.record.outcome = "hang"
                await asyncio.Event().wait()  # until the client leaves, which cancels this
            if not admitted(call):
                await send_answer(Json({"error": "Unauthorized"}, 401), reply)
                return
            if call.record.violations:
                raise VllmError(f"refused by the fake: {call.record.violations}")
            if self._json_only:
                check_content_type(call.record)
            if call.record.method == "POST" and not self._owned:
                call.fake.sleep.usable(call.record)
            answer = await self._handler(call)
        except VllmError as error:
            answer = Json(error.anthropic() if self._anthropic else error.openai(), error.status)
        await send_answer(answer, reply)


def admitted(call: Call) -> bool:
    """Whether the request has the key that its path wants."""
    key = call.fake.settings.api_key
    guarded = call.scope["path"].startswith(("/v1", "/v2", "/inference"))
    return not (key and guarded) or call.record.header("authorization") == [f"Bearer {key}"]


async def send_answer(answer: Answer, reply: Reply) -> None:
    if isinstance(answer, Events):
        async with aclosing(answer.source) as source:
            await reply.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
            try:
                async for block in source:
                    await reply.body(block)
            except VllmError as error:  # too late for a status: vLLM says it in the stream
                await reply.body(sse(error.openai()))
                await reply.body(sse("[DONE]"))
    else:
        content = answer.encode() if isinstance(answer, Json) else answer.content
        kind = "application/json" if isinstance(answer, Json) else answer.type
        headers = [(b"content-length", str(len(content)).encode())]
        if kind is not None:
            headers.append((b"content-type", kind.encode()))
        await reply.start(answer.status, headers)
        if content:
            await reply.body(content)
    await reply.end()


async def read(receive: Any) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def check_content_type(record: Record) -> None:
    """vLLM's JSON routes take no other type."""
    given = (record.header("content-type") or [""])[0].split(";")[0].lower()
    if given != "application/json":
        raise VllmError(
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed", type="Bad Request"
        )


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event as vLLM writes it."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()
