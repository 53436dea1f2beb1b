"""One request from the moment its body is whole until a worker may have it: what its limits say, and the queue.

``Entry`` decides; here is what an exchange does about it. It is driven by calls: from whoever keeps the limits, from
the queue (``called``, ``waits_for``, ``pushed_out``, ``refused``), and from the relay's timer (``look``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from router.errors import ApiError

if TYPE_CHECKING:
    from router.admission.entry import Entry
    from router.relay.intake import Intake


class Told(Protocol):
    """Where a client hears that its request waits."""

    def comment(self, text: bytes, keep_alive: bool) -> None: ...


class Owner(Protocol):
    """Whose request it is. Exactly one of ``admitted`` and ``fail`` is called once what it asks for is known."""

    deadline: float
    keep_alive: bool

    def admitted(self) -> None:
        """Its rights and limits allow it: it may go to a worker, if there is one."""
        ...

    def called(self) -> None:
        """It has waited, and its turn has come."""
        ...

    def fail(self, error: ApiError) -> None: ...


class Queued:
    """What one request does while it is QUEUED; ``owner.deadline`` is when ``look`` is due."""

    __slots__ = ("_entry", "_owner", "_told")

    def __init__(self, owner: Owner, entry: Entry, told: Told) -> None:
        self._owner, self._entry, self._told = owner, entry, told

    def admit(self, intake: Intake) -> None:
        """The request is whole and has its turn."""
        self._owner.deadline = math.inf  # who is asked about limits has a deadline of his own
        try:
            self._entry.admit(intake, self._admitted)
        except ApiError as error:
            self._admitted(error)

    def _admitted(self, error: ApiError | None) -> None:
        if error is not None:
            self._owner.fail(error)
        else:
            self._owner.admitted()

    def wait(self) -> None:
        """Nothing can take it now."""
        try:
            self._entry.wait(self)
        except ApiError as error:
            self._owner.fail(error)
        else:
            self._owner.deadline = self._entry.due()

    def look(self) -> None:
        """It gives up, or a stream is told that it waits."""
        entry = self._entry
        error = entry.gives_up()
        if error is not None:
            self._owner.fail(error)
            return
        if entry.streams:
            self._told.comment(entry.comment(), self._owner.keep_alive)
        self._owner.deadline = entry.due()

    # --- what the queue says ---

    def called(self) -> None:
        """Its turn has come."""
        self._entry.called()
        self._owner.called()

    def waits_for(self, waking: bool) -> None:
        self._entry.waits_for(waking)
        self._owner.deadline = min(self._owner.deadline, self._entry.due())

    def pushed_out(self) -> None:
        self._owner.fail(self._entry.pushed_out())

    def refused(self) -> None:
        self._owner.fail(self._entry.turned_away())
