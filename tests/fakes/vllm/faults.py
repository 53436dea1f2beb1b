"""Faults on demand: a plan that is asked once a request, and the sender that carries a fault out."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from tests.fakes.vllm.journal import Record

SETTLE_S: Final = 0.03
"""Between bytes sent and a broken connection, so that the other side has read them."""

BREAKING: Final = ("reset", "close", "stall", "die")
Kind = Literal["status", "garbage", "reset", "close", "stall", "slow", "hang", "die"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault.

    ``status``: answer with ``status``. ``garbage``: bytes that are not HTTP. ``reset`` and ``close``: the connection
    ends with RST or FIN. ``stall``: nothing more is sent. ``slow``: ``delay_s`` before the first byte. ``hang``: the
    engine never begins, so no token is made or counted. ``die``: the process kills itself. ``after_bytes`` says when:
    -1 before the first byte of the answer, n after n body bytes.
    """

    kind: Kind
    path: str | None = None
    """Only requests to this path; None: any but /health, /metrics and /v1/models."""
    times: int | None = 1
    """For so many requests; None: until cleared."""
    after_bytes: int = -1
    status: int = 503
    delay_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Entry:
    fault: Fault
    left: int | None


class FaultPlan:
    """The faults in force, first come first served."""

    QUIET: Final = ("/health", "/metrics", "/v1/models", "/version", "/load")

    def __init__(self) -> None:
        self._faults: list[_Entry] = []

    def add(self, fault: Fault) -> None:
        self._faults.append(_Entry(fault, fault.times))

    def clear(self) -> None:
        self._faults.clear()

    def take(self, path: str) -> Fault | None:
        """The fault for a request, which uses it up."""
        for entry in self._faults:
            if entry.fault.path == path or (entry.fault.path is None and path not in self.QUIET):
                if entry.left is not None:
                    entry.left -= 1
                    if entry.left == 0:
                        self._faults.remove(entry)
                return entry.fault
        return None


class Broken(Exception):
    """The fault was carried out; nothing more is to be sent."""


class Reply:
    """Sends one answer, counts and hashes its body, and carries out the request's fault."""

    def __init__(self, send: Any, cycle: Any, record: Record, fault: Fault | None, digest: Any) -> None:
        self._send, self._cycle, self._record, self._fault, self._digest = send, cycle, record, fault, digest
        self.finished = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        fault = self._fault
        if fault is not None:
            if fault.kind == "slow":
                await asyncio.sleep(fault.delay_s)
            elif fault.kind == "garbage" or (fault.kind in BREAKING and fault.after_bytes < 0):
                await self._act(fault)
        self._record.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes) -> None:
        fault = self._fault
        if fault is None or fault.kind not in BREAKING or self._record.sent_bytes + len(data) <= fault.after_bytes:
            await self._write(data)
        else:
            await self._write(data[: fault.after_bytes - self._record.sent_bytes])
            await asyncio.sleep(SETTLE_S)
            await self._act(fault)

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self.finished = True

    async def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._record.sent_bytes += len(data)
        self._record.sent_sha256 = self._digest.hexdigest()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _act(self, fault: Fault) -> None:
        transport = self._cycle.transport
        self._record.outcome = fault.kind
        if fault.kind == "stall":
            await asyncio.Event().wait()  # until the client leaves, which cancels this
        if fault.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self._cycle.disconnected = True
        if fault.kind == "garbage":
            transport.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        if fault.kind == "reset":
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()
        transport.close()
        raise Broken
