"""What vLLM is doing while it starts, read from its log lines. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

STEPS: Final = (
    # Lines of vLLM 0.20 to 0.32; an unknown line changes nothing, so another release only shows less.
    (r"non-default args", "reading the model's configuration"),
    (r"Resolved architecture", "starting the engine's process"),
    (r"Initializing a V1 LLM engine", "starting the worker"),
    (r"Starting to load model", "loading weights"),
    (r"Loading .*checkpoint shards: .*\| (\d+)/(\d+)", "loading weights: shard {0} of {1}"),
    (r"Loading weights took|Model loading took", "preparing memory"),
    (r"[Cc]ompil(?:ing|ation) (?:a|the) graph|Dynamo bytecode transform", "compiling"),
    (r"KV cache size", "warming up"),
    (r"[Cc]apturing CUDA graphs", "capturing CUDA graphs"),
    (r"[Ww]arming up", "warming up"),
    (r"init engine .* took", "starting the API server"),
    (r"Starting vLLM (?:API )?server", "starting the API server"),
)
FIRST: Final = "importing torch and vLLM"
_LINE_LIMIT: Final = 4096


@dataclass(slots=True)
class Phases:
    """Feed it the log as it grows; ``current`` is what vLLM is doing, for people."""

    current: str = FIRST
    _rest: str = field(default="", repr=False)
    _steps: list[tuple[re.Pattern[str], str]] = field(
        default_factory=lambda: [(re.compile(pattern), text) for pattern, text in STEPS], repr=False
    )

    def feed(self, text: str) -> list[str]:
        """Take more of the log; returns the phases it entered. A progress bar's carriage returns end lines too."""
        *lines, rest = re.split(r"[\r\n]", self._rest + text)
        self._rest = rest[-_LINE_LIMIT:]
        entered = []
        for line in lines:
            for pattern, name in self._steps:
                if (match := pattern.search(line)) and name.format(*match.groups()) != self.current:
                    self.current = name.format(*match.groups())
                    entered.append(self.current)
        return entered
