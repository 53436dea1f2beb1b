"""Where workers publish KV events: what is said of them, read and checked without I/O.

A place is ``tcp://HOST:PORT``, a port alone, which is one of the worker's own host, or ``none``. What nobody says of a
worker is as ``router.kv_events`` has it. Each data-parallel rank publishes at a port of its own: the given one and its
rank, as in vLLM, for the events and for asking again alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from helios.config import KvEventsSettings
from helios.errors import UsageError

NONE: Final = "none"
PORT_MAX: Final = 65535
RANKS_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Publisher:
    """Where one rank of a worker publishes: ``tcp://HOST:PORT``; each data-parallel rank has a port of its own.

    ``worker`` is the worker's URL; ``replay`` is vLLM's ``replay_endpoint``, None where it has none.
    """

    worker: str
    endpoint: str
    replay: str | None = None
    topic: str = ""


class Said(NamedTuple):
    """What the sources say of one worker: the places of its events and of their replay, and its ranks; 0: nothing."""

    events: str = ""
    replay: str = ""
    ranks: int = 0

    def publishes(self, settings: KvEventsSettings) -> bool:
        return self.events != NONE and bool(self.events or settings.port)


UNSAID: Final = Said()


def wrong_with(said: Said) -> str:
    """Why there can be no such publisher, in words; empty: there can."""
    for name, place in (("kv_events", said.events), ("kv_replay", said.replay)):
        try:
            if place not in ("", NONE):
                _split("localhost", place)
        except UsageError as error:
            return f"its {name} is wrong: {error.message}"
    if not 0 <= said.ranks <= RANKS_MAX:
        return f"its kv_ranks is {said.ranks}: it must be from 0 to {RANKS_MAX}"
    return ""


def check_settings(settings: KvEventsSettings) -> None:
    """Raise UsageError for settings that can't work."""
    for name, most in (("port", PORT_MAX), ("replay_port", PORT_MAX), ("ranks", RANKS_MAX)):
        value = getattr(settings, name)
        if not (name == "ranks") <= value <= most:
            raise UsageError(f"router.kv_events.{name} must be from {int(name == 'ranks')} to {most}, not {value}")
    for name in ("max_blocks", "max_blocks_per_rank", "tokens_mib", "wait_s"):
        if getattr(settings, name) <= 0:
            raise UsageError(f"router.kv_events.{name} must be more than 0, not {getattr(settings, name)}")
    if settings.replay_port and not settings.port:
        raise UsageError("router.kv_events.replay_port is set, and port is not: nothing would be followed there")


@lru_cache(maxsize=1 << 15)
def publishers_of(url: str, said: Said, settings: KvEventsSettings) -> Sequence[Publisher]:
    """The publishers of a worker, one a rank; none where it doesn't publish. ``said`` has nothing wrong with it."""
    host = urlsplit(url).hostname or ""
    if not said.publishes(settings) or "*" in host:  # no worker can be reached there
        return ()
    events = _split(host, said.events or str(settings.port))
    again = said.replay or str(settings.replay_port)
    replay = None if again in (NONE, "0") else _split(host, again)
    found = []
    for rank in range(said.ranks or settings.ranks):
        if max(events[1], replay[1] if replay else 0) + rank > PORT_MAX:
            break
        asked = None if replay is None else _endpoint(replay, rank)
        found.append(Publisher(url, _endpoint(events, rank), asked, settings.topic))
    return found


def apart(publishers: Iterable[Publisher]) -> tuple[list[Publisher], dict[str, tuple[str, str]]]:
    """Those whose place is theirs alone; and places that are said of two workers, with both: whose events would those
    be?"""
    owner: dict[str, Publisher] = {}
    shared: dict[str, tuple[str, str]] = {}
    for one in publishers:
        other = owner.setdefault(one.endpoint, one)
        if other.worker != one.worker:
            shared.setdefault(one.endpoint, (other.worker, one.worker))
    return [one for endpoint, one in owner.items() if endpoint not in shared], shared


def check_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; raises UsageError for anything else."""
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = None
    host = parts.hostname
    if parts.scheme != "tcp" or not host or "*" in host or not port or f"tcp://{parts.netloc}" != text:
        raise UsageError(
            f"{text!r} is not an endpoint of KV events",
            hint="Write tcp://HOST:PORT, with the host at which the worker can be reached.",
        )
    return host, port


def _split(host: str, place: str) -> tuple[str, int]:
    if not (place.isascii() and place.isdigit()):
        return check_endpoint(place)
    if not 0 < int(place) <= PORT_MAX:
        raise UsageError(f"{place!r} is not a port")
    return host, int(place)


def _endpoint(place: tuple[str, int], rank: int) -> str:
    host, port = place
    return f"tcp://[{host}]:{port + rank}" if ":" in host else f"tcp://{host}:{port + rank}"
