"""What clients ask, seeded: arrivals, prompts that share their beginnings or don't, conversations.

Lengths are tokens; a prompt's text has four characters for each, as the router estimates it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from benchmarks.simulator.engine import Segment

CHARS: Final = 4
_WORDS: Final = "the quick brown fox jumps over the lazy dog and runs on "


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. ``at`` in seconds; ``texts`` are the messages, first the system's; ``session`` names a user."""

    at: float
    segments: tuple[Segment, ...]
    prompt: int
    output: int
    texts: tuple[tuple[int, int], ...]
    """Each message as a number that makes its text, and its length in tokens."""
    session: str

    def body(self) -> bytes:
        """The request as a client sends it."""
        roles = itertools.chain(["system"], itertools.cycle(["user", "assistant"]))
        messages = [
            {"role": role, "content": _text(number, length)}
            for role, (number, length) in zip(roles, self.texts, strict=False)
        ]
        asked = {"model": "m", "stream": True, "max_tokens": 1024, "user": self.session, "messages": messages}
        return json.dumps(asked).encode()


def _text(number: int, length: int) -> str:
    begin = f"[{number}] "
    return (begin + _WORDS * (length * CHARS // len(_WORDS) + 1))[: length * CHARS]


def _output(rng: random.Random) -> int:
    """Tokens of an answer: most are short, some long; 150 on average."""
    return max(4, min(1024, int(rng.lognormvariate(4.7, 0.8))))


def shared(rate: float, seconds: float, seed: int, *, tenants: int = 150, prefix: int = 6000) -> Iterator[Arrival]:
    """Tenants with long system prompts of their own, and short questions: the llm-d project's shared-prefix workload
    (150 tenants x 6,000 tokens)."""
    rng, numbers = random.Random(seed), itertools.count(1_000_000)
    at = 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        tenant, own, question, output = rng.randrange(tenants), next(numbers), 1200, _output(rng)
        yield Arrival(
            at, ((tenant, prefix), (own, question + output)), prefix + question, output,
            ((tenant, prefix), (own, question)), f"u{own}",
        )  # fmt: skip


def distinct(rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    """Prompts that share nothing."""
    rng, numbers = random.Random(seed), itertools.count(1_000_000)
    at = 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        own, output = next(numbers), _output(rng)
        prompt = max(64, min(8000, int(rng.lognormvariate(7.0, 0.7))))
        yield Arrival(
            at, ((own, prompt + output),), prompt, output, ((own, prompt // 2), (own, prompt - prompt // 2)), f"u{own}"
        )


def conversations(rate: float, seconds: float, seed: int, *, turns: int = 8, think_s: float = 15.0) -> list[Arrival]:
    """Users who talk: each turn's prompt is all that was said before. ``rate`` is that of requests, not of users. One
    system prompt for all of an application, of which there are four."""
    rng, numbers = random.Random(seed), itertools.count(1_000_000)
    found, at, system = [], -turns * think_s, 800
    while (at := at + rng.expovariate(rate / turns)) < seconds:
        when, application, own, said = at, rng.randrange(4), next(numbers), 0
        texts = [(application, system)]
        for _ in range(turns):
            question, output = rng.randrange(100, 500), _output(rng)
            said += question
            texts.append((own, question))
            if when >= 0:
                segments = ((application, system), (own, said + output))
                found.append(Arrival(when, segments, system + said, output, tuple(texts), f"u{own}"))
            said += output
            texts.append((own, output))
            when += rng.expovariate(1 / think_s) + output * 0.02
    return sorted((one for one in found if one.at < seconds), key=lambda one: one.at)
