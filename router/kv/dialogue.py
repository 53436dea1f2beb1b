"""What data processes and the owner of the index say to each other: a question for a request, and its answer.

Over a unix socket of their own, not over the channels to the supervisor: every request with a prompt is a question, and
the supervisor would be one more process to wake up on each way.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Final

import msgspec

from helios.decoding import msgpack_decoder
from router.processes.frames import Cutter, framed

QUESTION_MAX: Final = 8 << 20
"""Longest question in bytes: two million token ids."""
ANSWER_MAX: Final = 4 << 20
QUESTIONERS: Final = 512
"""Processes whose connections may wait for the owner: of two configurations at a time."""


class Question(msgspec.Struct, frozen=True, array_like=True):
    """How much of a prompt do the workers of ``model`` have? ``number`` comes back.

    The prompt is its token ids, packed, or else what ``/tokenize`` is asked (``router.kv.tokens.Prompt``).
    """

    number: int
    model: str
    adapter: str | None
    salt: str | None
    tokens: bytes = b""
    text: bytes = b""


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """``length``: tokens of the prompt; 0: they can't be had in time, and nothing is known.

    ``cached``: for each worker, by URL, the tokens of the prompt that it has; one that is left out is not followed.
    """

    number: int
    length: int = 0
    cached: Mapping[str, int] = {}


_encoder: Final = msgspec.msgpack.Encoder()
_question: Final = msgpack_decoder(Question)
_answer: Final = msgpack_decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    """One frame. Raises ValueError for a message that is too long."""
    most = QUESTION_MAX if isinstance(message, Question) else ANSWER_MAX
    return framed(_encoder.encode(message), most, type(message).__name__)


def questions() -> Cutter[Question]:
    return Cutter(_question.decode, QUESTION_MAX)


def answers() -> Cutter[Answer]:
    return Cutter(_answer.decode, ANSWER_MAX)


def listen() -> socket.socket:
    """A listening unix socket without a path: Linux gives it a name, which ends with its last descriptor.

    The supervisor makes it before there are processes, so its address is the same for all owners, one after another.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("")
    sock.listen(QUESTIONERS)
    sock.setblocking(False)
    return sock
