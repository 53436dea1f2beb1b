"""One vLLM engine in virtual time: continuous batching, chunked prefill, a paged KV cache with prefix caching.

What it does is vLLM's V1 scheduler (vllm/v1/core/sched/scheduler.py and kv_cache_manager.py) without its details: in
each step every running sequence gets one token, or as much of its prompt as the step's budget of tokens allows; who
waits is let in, in order, while there is budget, a place and room for its prompt. Full blocks are cached under what
they hold, with all before it; a block that nobody uses stays until it is the one used longest ago. When a sequence
needs a block and there is none, the youngest one is preempted: it gives its blocks back and waits again, in front.

Simplified: room for a whole prompt is taken when its sequence is let in, and a step's time is linear in what it does.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

BLOCK: Final = 16
"""Tokens of a block."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A worker. Times are seconds. The defaults are about those of an 8B model on one data-centre GPU."""

    step_s: float = 0.008
    """A step, whatever it does: reading the weights, launching kernels."""
    prefill_token_s: float = 1 / 12_000
    decode_token_s: float = 0.00008
    context_token_s: float = 1e-7
    """For each token of context of each sequence that decodes: reading the KV cache."""
    step_tokens: int = 2048
    """Most tokens of a step (``--max-num-batched-tokens``)."""
    sequences: int = 256
    """Most sequences at a time (``--max-num-seqs``)."""
    cache_tokens: int = 320_000
    """Room of the KV cache."""


Segment = tuple[int, int]
"""Text: its id, and its length in tokens."""
Block = tuple[int, int]
"""A block's name (``_keys``)."""


@dataclass(eq=False, slots=True)
class Sequence_:
    """A request at an engine. ``segments`` are its prompt and its answer."""

    segments: Sequence[Segment]
    prompt: int
    output: int
    done: int = 0
    """Tokens whose KV is there."""
    made: int = 0
    """Tokens of the answer."""
    cached: int = 0
    """Tokens of the prompt that were there already."""
    loaded: int = 0
    """Tokens of the prompt that another engine has computed, and that are here when it is let in."""
    blocks: list[Block] = field(default_factory=list)


class Engine:
    """``step`` does one step and says how long it takes and what came of it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.waiting: deque[Sequence_] = deque()
        self.running: list[Sequence_] = []
        self.preemptions = 0
        self._room = profile.cache_tokens // BLOCK
        self._used: dict[Block, int] = {}
        """Users of each block that is in use."""
        self._idle: OrderedDict[Block, None] = OrderedDict()
        """Cached blocks without a user, the one used longest ago first."""

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def usage(self) -> float:
        """The part of the KV cache that is in use, 0 to 1."""
        return len(self._used) / self._room

    def submit(self, one: Sequence_) -> None:
        self.waiting.append(one)

    def held(self, segments: Sequence[Segment], prompt: int) -> int:
        """Tokens of a prompt that are in the cache; never the last one, which has to be computed."""
        count = 0
        for key in _keys(segments, (prompt - 1) // BLOCK):
            if key not in self._used and key not in self._idle:
                break
            count += BLOCK
        return count

    def step(self) -> tuple[float, list[Sequence_], list[Sequence_]]:
        """Seconds that the step takes, and the sequences that have their first token and their last one after it."""
        profile, budget = self.profile, self.profile.step_tokens
        prefilled = decoded = context = 0
        first: list[Sequence_] = []
        ended: list[Sequence_] = []
        for one in list(self.running):
            if one not in self.running:  # preempted a moment ago
                continue
            left = one.prompt - one.done
            if left > 0:
                part = min(left, budget)
                prefilled += part
                budget -= part
                one.done += part
                if one.done == one.prompt:
                    self._token(one, first, ended)
            elif budget > 0 and self._grow(one):
                decoded += 1
                context += one.done
                budget -= 1
                one.done += 1
                self._token(one, first, ended)
        while self.waiting and budget > 0 and len(self.running) < profile.sequences and self._let_in():
            one = self.running[-1]
            part = min(one.prompt - one.done, budget)
            prefilled += part
            budget -= part
            one.done += part
            if one.done == one.prompt:
                self._token(one, first, ended)
        for one in ended:
            self.running.remove(one)
            self._give_back(one)
        seconds = (
            profile.step_s + prefilled * profile.prefill_token_s + decoded * profile.decode_token_s
            + context * profile.context_token_s
        )  # fmt: skip
        return seconds, first, ended

    @staticmethod
    def _token(one: Sequence_, first: list[Sequence_], ended: list[Sequence_]) -> None:
        one.made += 1
        if one.made == 1:
            first.append(one)
        if one.made >= one.output:
            ended.append(one)

    def _let_in(self) -> bool:
        """Take the first that waits, if its prompt has room."""
        one = self.waiting[0]
        wanted = list(_keys(one.segments, -(-one.prompt // BLOCK)))
        held = self.held(one.segments, one.prompt) // BLOCK
        fresh = [key for key in wanted[held:] if key not in self._used]
        idle = sum(1 for key in wanted[:held] if key in self._idle)
        if len(self._used) + idle + len(fresh) > self._room:
            return False
        self.waiting.popleft()
        for key in wanted:
            self._take(key)
        one.blocks = wanted
        one.done = held * BLOCK
        if not one.made:
            one.cached = one.done
        one.done = max(one.done, min(one.loaded, one.prompt - 1))
        self.running.append(one)
        return True

    def _grow(self, one: Sequence_) -> bool:
        """Room for one more token; False when it was itself preempted for it."""
        if one.done // BLOCK < len(one.blocks):
            return True
        key = next(_keys(one.segments, one.done // BLOCK + 1, one.done // BLOCK))
        while len(self._used) >= self._room and key not in self._used:
            youngest = self.running.pop()
            self.preemptions += 1
            self._give_back(youngest)
            youngest.done = 0
            self.waiting.appendleft(youngest)
            if youngest is one:
                return False
        self._take(key)
        one.blocks.append(key)
        return True

    def _take(self, key: Block) -> None:
        self._idle.pop(key, None)
        self._used[key] = self._used.get(key, 0) + 1
        while len(self._used) + len(self._idle) > self._room:
            self._idle.popitem(last=False)

    def _give_back(self, one: Sequence_) -> None:
        """The end of a sequence is of less use to others than its beginning, so that goes first."""
        for key in reversed(one.blocks):
            users = self._used[key] - 1
            if users:
                self._used[key] = users
            else:
                del self._used[key]
                self._idle[key] = None
        one.blocks = []


def _keys(segments: Sequence[Segment], count: int, start: int = 0) -> Iterator[Block]:
    """Names of the blocks from ``start`` up to ``count``: the segment that a block ends in, and its number. A segment
    follows always the same ones, so that says all that is before, too. (A last block that is not full passes for full:
    up to 15 tokens too much are taken for cached.)"""
    number, at = start, 0
    for name, length in segments:
        at += length
        while number < count and (number + 1) * BLOCK <= at:
            yield name, number
            number += 1
    for number in range(number, count):  # noqa: B020 - it goes on from there
        yield segments[-1][0], number
