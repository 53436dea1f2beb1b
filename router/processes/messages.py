"""What the processes tell each other: messages over one unix socket for each, between it and the supervisor.

A frame is its length (4 bytes, big endian) and a message in MessagePack. The supervisor passes on what one tells the
others, keeps what a new process has to know, and answers what only it can: what all have counted.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helios.config import WorkerSettings
from helios.decoding import msgpack_decoder
from router.admission.line_words import FromOwner, ToOwner
from router.demand.counts import ModelCounts
from router.discovery.names import Standing
from router.discovery.progress import Progress
from router.discovery.registration import Lease
from router.processes.frames import Cutter, framed
from router.processes.tally import Family
from router.worker_metrics import WorkerMetrics

MAX_FRAME: Final = 32 << 20
"""Longest message, in bytes: some thousand workers with what they say of their models, or the metrics of as many."""


class Message(msgspec.Struct, frozen=True, tag=True):
    """One message."""


class Ready(Message, frozen=True):
    """A process serves (or, the control process, checks)."""


class Leaving(Message, frozen=True):
    """A process accepts no more: another may take its place."""


class Known(Message, frozen=True):
    """To a new process: it has been told what it has to know."""


class Draining(Message, frozen=True):
    """To the control process: the router takes no more requests."""


class Stop(Message, frozen=True):
    """To a process: accept no more, and end when what is in flight has ended; ``cut``: end it now."""

    cut: bool = False


class Membership(Message, frozen=True):
    """From the control process to all: the workers that a source knows now, all of them. The supervisor numbers it."""

    source: str
    workers: list[WorkerSettings]
    version: int = 0


class Applied(Message, frozen=True):
    """A process goes by this version and those before: nothing begins at a worker that they took away."""

    version: int


class WorkerState(msgspec.Struct, frozen=True):
    """A worker's health as the control process judges it (``Health``), and its entries of ``/v1/models``.

    ``cordoned``: an administrator gives it no new requests; ``home``: its number where it is remembered who got which
    prompt, the same in all processes; 0: the one that it has there.
    """

    state: str
    reason: str
    cards: dict[str, dict[str, Any]] = {}
    cordoned: bool = False
    home: int = 0


class States(Message, frozen=True):
    """From the control process to all: the workers whose state was decided, by URL."""

    workers: dict[str, WorkerState]


class Failed(Message, frozen=True):
    """To the control process: a request found no connection to the worker."""

    url: str
    reason: str


class Reading(Message, frozen=True):
    """From the control process to all: what a worker says of itself. ``at`` is the machine's monotonic clock."""

    url: str
    metrics: WorkerMetrics


class Registered(Message, frozen=True):
    """From the control process to its successors: a registration, or (None) its end."""

    identity: str
    lease: Lease | None


class Wanted(Message, frozen=True):
    """To the control process: clients ask for a model that no worker serves."""

    model: str


class Asked(Message, frozen=True):
    """To the control process: clients use this name; what does it stand for at the registry?"""

    model: str


class Resolved(Message, frozen=True):
    """From the control process to all: what a name stands for that was asked about."""

    model: str
    answer: Standing


class Progressed(Message, frozen=True):
    """From the control process to all: how far a model is that was wanted."""

    progress: Progress


class Wakes(Message, frozen=True):
    """To the control process: the models that requests of process ``member`` wait for, all of them.

    The supervisor says whose it is."""

    models: list[str]
    member: int = 0


class Woken(Message, frozen=True):
    """From the control process to all: how far a model is that it wakes.

    ``failed_at``: since when it can't be woken, and ``reason`` why; the machine's monotonic clock. None: it can.
    """

    model: str
    progress: str = ""
    reason: str = ""
    failed_at: float | None = None


class Owned(Message, frozen=True):
    """To a data process: whose word counts now, the control process of this number; 0: of none. What was told to the
    one before has to be said again."""

    number: int


class Deposed(Message, frozen=True):
    """To a control process: another one's word counts from now on."""


class Gone(Message, frozen=True):
    """To control processes: a data process has ended."""

    member: int


class ToLine(Message, frozen=True):
    """To the control process: what process ``member`` says of those who wait there. The supervisor says whose it is."""

    words: list[ToOwner]
    member: int = 0


class FromLine(Message, frozen=True):
    """From the control process: what it says of the queue to a data process, or (0) to all."""

    member: int
    words: list[FromOwner]


class Demands(Message, frozen=True):
    """To the control process: what process ``member`` has counted of these models; of others what it said before holds.

    The supervisor says whose it is."""

    models: list[ModelCounts]
    member: int = 0


class Collect(Message, frozen=True):
    """From a process: what have all counted? To a process: what have you counted? ``number`` comes back."""

    number: int


class Counted(Message, frozen=True):
    """What the process has counted since it began."""

    number: int
    families: list[Family]


class Collected(Message, frozen=True):
    """All that was counted, as Prometheus reads it. ``silent``: how many processes did not answer in time."""

    number: int
    text: bytes
    silent: int = 0


AnyMessage = (
    Ready | Leaving | Known | Draining | Stop | Membership | Applied | States | Failed | Reading | Registered | Wanted
    | Asked | Resolved | Progressed | Wakes | Woken | Owned | Deposed | Gone | ToLine | FromLine
    | Demands | Collect | Counted | Collected
)  # fmt: skip
_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgpack_decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """One frame. Raises ValueError for a message that is too long."""
    return framed(_encoder.encode(message), MAX_FRAME, type(message).__name__)


class Frames(Cutter[AnyMessage]):
    """Cuts a stream of bytes into messages."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(_decoder.decode, MAX_FRAME)
