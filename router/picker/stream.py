"""One stream of a gateway, which is about one request: its messages are read, a ``Pick`` is driven, answers written.

The order of answers is the protocol's: the head with where it goes, when the body is whole; then the body. Before the
last piece of it an error may be answered, after it never. The stream is a task of the gRPC server's, which is cancelled
when the gateway gives the request up. When the pick ends by itself (a deadline, the router's end) the stream is woken
out of a read by a cancellation of its own, which it takes back, as ``asyncio.timeout`` does.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from router import errors
from router.errors import OPENAI, ApiError
from router.picker import wire
from router.picker.pick import Pick
from router.picker.picker import Picker
from router.relay import ending
from router.relay.headers import request_id


class Context(Protocol):
    """What gRPC gives."""

    async def read(self) -> Any:
        """The next message; something false at the end."""
        ...

    async def write(self, message: bytes) -> None: ...


class Stream:
    __slots__ = ("_context", "_ended", "_picker", "_reading", "_task", "_turn", "_woken")

    def __init__(self, picker: Picker, context: Context, ended: object) -> None:
        """``ended``: what ``context.read`` gives at the end."""
        self._picker, self._context, self._ended = picker, context, ended
        self._task: asyncio.Task[Any] | None = None
        self._turn: asyncio.Future[None] | None = None
        self._reading = self._woken = False

    async def run(self) -> None:
        """Until the gateway has what it wants, or goes."""
        self._task = asyncio.current_task()
        message = await self._read()
        if message is None or message.WhichOneof("request") != "request_headers":
            return  # an answer of the gateway's own: it needs nobody
        head, echoing = wire.head_of(message), wire.echoes(message)
        del message
        try:
            if (error := self._picker.overloaded()) is not None:
                raise error
            if head.sends:
                raise errors.gateway_mode(head.sends)
            listed = self._picker.models(head.method, head.target, head.headers)
            pick = (
                None if listed is not None else self._picker.begin(head.method, head.target, head.headers, head.subset)
            )
        except ApiError as error:
            self._picker.count(error.code)
            identity = request_id(head.headers)
            await self._refuse(error, identity, OPENAI.body(error, identity.decode()))
            return
        if pick is None:
            await self._context.write(wire.refused(200, [(b"content-type", b"application/json")], listed or b""))
            return
        pick.over = self._wake
        try:
            await self._answer(pick, head)
            if pick.picked():
                await self._after(pick, echoing)
        finally:
            pick.end()

    async def _answer(self, pick: Pick, head: wire.Head) -> None:
        ended, trailers = head.ended, False
        while not (ended or pick.answered()):
            message = await self._read()
            if message is None:
                if not pick.answered():
                    return  # the gateway has gone
                break
            kind = message.WhichOneof("request")
            if kind == "request_body":
                pick.feed(message.request_body.body)
                ended = message.request_body.end_of_stream
            elif kind == "request_trailers":
                ended = trailers = True
        pick.complete()
        if not pick.answered():
            self._turn = asyncio.get_running_loop().create_future()
            await self._turn
        if pick.error is not None:
            await self._refuse(pick.error, pick.identity, pick.description(pick.error))
        elif pick.worker is not None:
            added, removed = self._picker.changes(head.headers, pick.worker)
            write = self._context.write
            await write(wire.picked(pick.endpoints, len(pick.body), added, removed))
            if not head.ended:
                for piece in wire.bodies(pick.body, not trailers):
                    await write(piece)
            if trailers:
                await write(wire.passed("request_trailers", None, False))
            pick.told()

    async def _after(self, pick: Pick, echoing: bool) -> None:
        """The request is on its way to its worker."""
        if self._picker.settings.response == "leave":
            pick.leave()
            return
        while pick.picked() and (message := await self._read()) is not None:
            kind = message.WhichOneof("request")
            if kind is None:
                continue
            if kind == "response_headers":
                pick.headers(*wire.answer_of(message))
            elif kind == "response_body":
                pick.piece()
            await self._context.write(wire.passed(kind, message, echoing))

    async def _refuse(self, error: ApiError, identity: bytes, body: bytes) -> None:
        await self._context.write(wire.refused(error.status, ending.headers(error, identity), body))

    async def _read(self) -> Any:
        """The next message; None at the end, or when this has been woken."""
        if self._is_woken():
            return None
        self._reading = True
        try:
            message = await self._context.read()
        except asyncio.CancelledError:
            if not self._is_woken() or self._task is None or self._task.uncancel() > 0:
                raise
            return None
        finally:
            self._reading = False
        return None if message is self._ended else message

    def _is_woken(self) -> bool:
        return self._woken

    def _wake(self) -> None:
        """The pick is answered, or to be left."""
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)
        elif self._reading and self._task is not None:
            self._woken = True
            self._task.cancel()
