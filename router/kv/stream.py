"""Whether all of a publisher's messages have come: a state machine without I/O.

vLLM numbers its messages from 0 and keeps the last ten thousand for a replay. A subscriber that joins late, is too slow
or loses its connection misses some. A missed store costs a claim; a missed removal leaves a false one, so after a gap
that can't be filled nothing is believed any more.

- Joined: everything from 0 on is asked for. If that is gone, what is left is a beginning: only what was stored before
  is not known.
- A gap: live messages wait while the missing ones are asked for.
- Another process may publish at the same address, with numbers of its own. So whatever is asked for begins with the
  last message that was taken, which must come back as it was. If it doesn't, all is forgotten and asked for anew. For
  the same reason numbers that go back mean another process.
- Without replays (no endpoint, or it doesn't answer) a gap or a new connection is a new beginning.

After an answer the same question is a cheap proof (``audit``) that nothing was lost at the end, after which no message
came that would show the gap.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

WAITING_BYTES: Final = 64 << 20
"""Most bytes of live messages that wait for a replay. Beyond, the oldest are dropped, which is another gap."""
FRUITLESS: Final = 2
"""Answers without a new message after which those that wait are taken as a beginning. The first may have been given
before what is missing was published."""


class Sink(Protocol):
    """What a stream orders."""

    def take(self, payload: bytes) -> None:
        """The next message, in order."""

    def forget(self) -> None:
        """Nothing that was taken counts any more."""

    def ask(self, first: int) -> None:
        """Ask for all messages from ``first`` on; gives up what was asked for before."""


class Stream:
    """The messages of one publisher. ``replays``: it can be asked for messages again."""

    def __init__(self, sink: Sink, *, replays: bool) -> None:
        self._sink, self._replays = sink, replays
        self._last: int | None = None
        """Number of the last message taken."""
        self._mark = 0
        """Hash of its payload."""
        self._newest = -1
        """Number of the last live message."""
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._asked: int | None = None
        """The first number that was asked for, while an answer is awaited."""
        self._same = False
        """Whether the answer comes from the process whose messages were taken."""
        self._fruitless = 0
        """Answers in a row that brought nothing."""
        self._empty = False
        """Whether the publisher had no message yet when it answered: its first one is number 0."""
        self._answers = False
        """Whether a question was ever answered."""
        self.gaps = 0
        """Times that messages missed."""

    @property
    def asking(self) -> bool:
        return self._asked is not None

    def opened(self) -> None:
        """There is a connection to a publisher, perhaps another one than before."""
        self._newest = -1
        if self._replays:
            self._ask()
        else:
            self._anew()

    def closed(self) -> None:
        """The connection is lost, and with it the answer that was awaited."""
        self._asked = None
        self._drop_waiting()

    def lost(self) -> None:
        """There has been no connection for so long that what was taken no longer counts."""
        self.closed()
        self._anew()

    def audit(self) -> None:
        """Nothing has come for a while: make sure that nothing was lost."""
        if self._asked is None and self._answers:
            self._ask()

    def live(self, number: int, payload: bytes) -> None:
        """A published message."""
        if number <= self._newest:
            self._newest = number
            self._drop_waiting()
            self._anew()
            if self._replays:
                self._wait(number, payload)
                self._ask()
            else:
                self._take(number, payload)
            return
        self._newest = number
        if self._asked is not None:
            self._wait(number, payload)
        else:
            self._follow(number, payload)

    def replayed(self, number: int, payload: bytes) -> None:
        """A message of the answer to ``ask``."""
        if self._asked is None or number < 0:
            return
        if not self._same:
            if number == self._last and hash(payload) == self._mark:
                self._same = True
                return
            self._anew()
            if number == self._asked:  # another process, which may have earlier ones
                self._ask()
                return
            self._same = True  # the oldest that there is
        if self._last is not None and number > self._last + 1:
            self._anew()
        if self._last is None or number > self._last:
            self._take(number, payload)

    def replay_ended(self) -> None:
        """The answer to ``ask`` is whole."""
        if self._asked is None:
            return
        self._answers = True
        if not self._same:  # a process that hasn't come so far
            self._anew()
            self._ask()
            return
        nothing = self._waiting if self._last is None else self._last == self._asked
        self._fruitless = self._fruitless + 1 if nothing else 0
        self._asked, self._empty = None, self._last is None and self._fruitless < FRUITLESS
        if self._waiting and self._fruitless >= FRUITLESS:
            self._anew()  # what is missing is not to be had
        self._work_off()

    def replay_failed(self) -> None:
        """There was no answer within the deadline."""
        if self._asked is None:
            return
        self._asked = None
        self._anew()
        self._work_off()

    def _follow(self, number: int, payload: bytes) -> None:
        """The next live message."""
        if number == self._last + 1 if self._last is not None else number == 0 or not self._empty:
            self._take(number, payload)
        elif self._last is None or number > self._last:
            self.gaps += 1
            if self._replays:
                self._wait(number, payload)
                self._ask()
            else:
                self._anew()
                self._take(number, payload)

    def _take(self, number: int, payload: bytes) -> None:
        self._last, self._mark = number, hash(payload)
        self._sink.take(payload)

    def _anew(self) -> None:
        self._empty = False
        if self._last is not None:
            self._last = None
            self._sink.forget()

    def _ask(self) -> None:
        self._same = self._last is None
        self._asked = self._last or 0
        self._sink.ask(self._asked)

    def _wait(self, number: int, payload: bytes) -> None:
        self._waiting.append((number, payload))
        self._waiting_bytes += len(payload)
        while self._waiting_bytes > WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft()[1])

    def _work_off(self) -> None:
        while self._waiting and self._asked is None:
            number, payload = self._waiting.popleft()
            self._waiting_bytes -= len(payload)
            self._follow_waiting(number, payload)

    def _follow_waiting(self, number: int, payload: bytes) -> None:
        """Like ``_follow``, but a message that has to wait goes back to the front."""
        before = len(self._waiting)
        self._follow(number, payload)
        if len(self._waiting) > before:
            self._waiting.rotate(1)

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
