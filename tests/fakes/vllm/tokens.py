"""Tokens: bytes for what comes in, words for what goes out. Everything follows from the prompt.

Ids 3..258 are the bytes 0..255; ids from 259 are the words, each with a space before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

BYTE0: Final = 3
WORD0: Final = BYTE0 + 256
_WORDS = """
a able air all and ask at away back be big blue book both boy by call can city cold day deep do door dry each ear
east eat end eye face far few find fire fly food for full give go gold good hand hear high home hot ice in island
it keep kind know lake last leaf light long map moon new no
"""
WORDS: Final = _WORDS.split()
VOCABULARY: Final = WORD0 + len(WORDS)
STOP_ONE_IN: Final = 40
"""On average one token in so many ends the answer, unless ``ignore_eos``."""


def encode(text: str) -> list[int]:
    """Token ids of a text: one for each byte of its UTF-8."""
    return [BYTE0 + byte for byte in text.encode()]


def decode(ids: Iterable[int]) -> str:
    """Text of token ids; ids of no token are left out."""
    out = bytearray()
    for token in ids:
        if BYTE0 <= token < WORD0:
            out.append(token - BYTE0)
        elif WORD0 <= token < VOCABULARY:
            out += b" " + WORDS[token - WORD0].encode()
    return out.decode(errors="replace")


class Answer:
    """The tokens that follow a prompt; every choice (``n``) has its own."""

    def __init__(self, prompt: Iterable[int], choice: int) -> None:
        self._seed = hashlib.sha256(b",".join(b"%d" % token for token in prompt) + b"/%d" % choice).digest()

    def token(self, position: int) -> tuple[int, bool]:
        """The token at a position, counted from 0, and whether the answer would end after it."""
        number = int.from_bytes(hashlib.sha256(self._seed + b"%d" % position).digest()[:8], "big")
        return WORD0 + number % len(WORDS), number // len(WORDS) % STOP_ONE_IN == 0


def vector(prompt: Iterable[int], size: int = 8) -> list[float]:
    """An embedding of length 1 that follows from the prompt."""
    seed = b",".join(b"%d" % token for token in prompt)
    digest = hashlib.sha256(seed).digest()
    raw = [byte / 127.5 - 1.0 for byte in digest[:size]]
    norm = sum(x * x for x in raw) ** 0.5
    return [x / norm for x in raw]


def similarity(left: list[float], right: list[float]) -> float:
    """Cosine of two vectors of length 1."""
    return sum(a * b for a, b in zip(left, right, strict=True))
