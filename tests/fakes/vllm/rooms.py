"""Where two workers that have a request at once meet: each request has a room of its own, which both were told of.

The prefill worker keeps the rooms. Who answers comes (``meet``, over the control port, in the place of a side channel),
waits until the prompt is computed, takes its blocks once, and is refused where it was told anything else than the one
that computes. A room whose prompt never is computed keeps whoever waits in it for ever, as engines do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.fakes.vllm.kv import KvError

PENDING: Final = "pending"
TAKEN: Final = "taken"


@dataclass(slots=True)
class Room:
    """``said``: what both must have been told; ``expires``: when its blocks go, on the clock."""

    said: dict[str, Any]
    tokens: int
    computed: bool = False
    joined: bool = False
    expires: float = 0.0


class Rooms:
    """Those of one prefill worker. ``clock`` gives seconds."""

    def __init__(self, lease_s: float, block_tokens: int, clock: Callable[[], float]) -> None:
        self._lease_s, self._block_tokens, self._clock = lease_s, block_tokens, clock
        self._rooms: dict[str, Room] = {}
        self._seen: set[str] = set()
        self._early: dict[str, None] = {}
        """Rooms in which somebody waits before the request that computes is here."""
        self.claimed = self.stranded = 0

    def enter(self, key: str, said: Mapping[str, Any], tokens: int) -> Room:
        """The request that computes is here; raises KvError for a room that was there before."""
        if key in self._seen:
            raise KvError(f"the room {key} was used before")
        self._seen.add(key)
        room = self._rooms[key] = Room(dict(said), tokens, joined=key in self._early)
        return room

    def computed(self, key: str) -> None:
        """Its prompt is."""
        room = self._rooms[key]
        room.computed, room.expires = True, self._clock() + self._lease_s

    def leave(self, key: str) -> None:
        """The request that computes has ended without blocks."""
        room = self._rooms.get(key)
        if room is not None and not room.computed:
            del self._rooms[key]

    def meet(self, key: str, said: Mapping[str, Any], tokens: int) -> str:
        """Who answers asks for the blocks. Raises KvError."""
        self.expire()
        room = self._rooms.get(key)
        if room is None:
            if key in self._seen and key not in self._early:
                raise KvError(f"the room {key} is over")
            self._early[key] = None
            return PENDING
        if dict(said) != room.said:
            raise KvError(f"in the room {key} one was told {room.said}, the other {dict(said)}")
        if tokens != room.tokens:
            raise KvError(f"in the room {key} one prompt has {room.tokens} tokens, the other {tokens}")
        self._early[key] = None
        room.joined = True
        if not room.computed:
            return PENDING
        del self._rooms[key]
        self.claimed += 1
        return TAKEN

    def expire(self) -> None:
        """Free the blocks whose lease ran out."""
        now = self._clock()
        for key in [key for key, room in self._rooms.items() if room.computed and room.expires <= now]:
            self.stranded += self._blocks(self._rooms.pop(key))

    def _blocks(self, room: Room) -> int:
        return -(-room.tokens // self._block_tokens)

    @property
    def held(self) -> int:
        """Blocks pinned now."""
        self.expire()
        return sum(self._blocks(room) for room in self._rooms.values() if room.computed)
