"""What the load asks of the routers: chat requests whose prompts are not all the same.

Each has a system prompt, which others share, and a question of its own: so a policy that goes by prefixes has something
to decide. All proxies get the same ones in the same order, all bodies of a kind have the same length, and a prompt is
as long as the one of ``router_backend.BODY``.
"""

from __future__ import annotations

import functools
import json
import random
from typing import Any, Final

SEED: Final = 7
SHARED: Final = 16
QUESTIONS: Final = 64
"""So many under each of so many system prompts."""
SHARED_CHARS: Final = 300
QUESTION_CHARS: Final = 200
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz" + 6 * " "
"""No quotes, escapes or line ends: the text is the same in JSON and in a script for wrk."""


@functools.cache
def bodies(*, stream: bool = False) -> tuple[bytes, ...]:
    """All requests in the order in which they are sent, again and again."""
    rng = random.Random(SEED)
    more: dict[str, Any] = {"stream": True} if stream else {"max_tokens": 16, "temperature": 0}
    found = []
    for _ in range(SHARED):
        system = {"role": "system", "content": _text(rng, SHARED_CHARS)}
        for _ in range(QUESTIONS):
            user = {"role": "user", "content": _text(rng, QUESTION_CHARS)}
            found.append(json.dumps({"model": "m", "messages": [system, user], **more}).encode())
    rng.shuffle(found)
    return tuple(found)


def _text(rng: random.Random, chars: int) -> str:
    return "".join(rng.choices(_LETTERS, k=chars))
