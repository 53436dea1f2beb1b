"""Which pairs of a prefill and a decode worker have exchanged blocks before, without I/O.

The first exchange of a pair begins with a handshake of 0.3 to 5 s (NIXL's agents learn of each other's memory), which
no client is to wait for. So a pair gets requests once it is warm; a worker that was started anew is another one
(``Worker.home``), and its pairs are cold again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from router.worker import Worker
from router.workers import Workers

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
"""Between tries to warm a pair, in seconds: twice as long each time."""

Key = tuple[str, int, str, int]


@dataclass(slots=True)
class _Pair:
    warm: bool = False
    asking: bool = False
    due_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S


class Pairs:
    """Of one process. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pairs: dict[Key, _Pair] = {}
        self.count = 0
        """Pairs that were warm, with both workers up, at the last look."""

    def warm(self, prefill: Worker, decode: Worker) -> bool:
        """Whether the pair may have requests."""
        pair = self._pairs.get(_key(prefill, decode))
        return pair is not None and pair.warm

    def due(self, workers: Workers) -> list[tuple[Worker, Worker, str]]:
        """The pairs that are to be warmed now, with a model that both serve; each ends with ``done`` or ``failed``."""
        now, found, known = self._clock(), [], dict[Key, _Pair]()
        for model in workers.models:
            able = workers.prefillers(model)
            for decode in workers.candidates(model, ()) if able else ():
                if decode.role != "decode" or not decode.up:
                    continue
                for prefill in able:
                    key = _key(prefill, decode)
                    if prefill.revision != decode.revision or key in known:
                        continue
                    pair = known[key] = self._pairs.get(key) or _Pair()
                    if not (pair.warm or pair.asking) and pair.due_at <= now:
                        pair.asking = True
                        found.append((prefill, decode, model))
        self.count = sum(pair.warm for pair in known.values())
        if len(known) < len(self._pairs):  # one that can't be seen now may only be cordoned, or down for a moment
            there = {(worker.url, worker.home) for worker in workers.all}
            for key, pair in self._pairs.items():
                if key not in known and (pair.asking or (key[:2] in there and key[2:] in there)):
                    known[key] = pair
        self._pairs = known
        return found

    def done(self, prefill: Worker, decode: Worker) -> None:
        """They have exchanged blocks."""
        self._pairs[_key(prefill, decode)] = _Pair(warm=True)

    def failed(self, prefill: Worker, decode: Worker) -> None:
        """They have not."""
        pair = self._pairs.setdefault(_key(prefill, decode), _Pair())
        pair.asking, pair.due_at = False, self._clock() + pair.pause_s
        pair.pause_s = min(2 * pair.pause_s, LONGEST_PAUSE_S)

    def cools(self, prefill: Worker) -> None:
        """The worker is not who it was: its pairs are to be warmed anew."""
        for key, pair in self._pairs.items():
            if key[0] == prefill.url:
                pair.warm = False


def _key(prefill: Worker, decode: Worker) -> Key:
    return prefill.url, prefill.home, decode.url, decode.home
