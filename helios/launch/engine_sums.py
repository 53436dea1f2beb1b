"""What a vLLM counts, out of its metrics, without parsing the rest of them. No I/O."""

from __future__ import annotations

import re


class Sums:
    """Sums of some of vLLM's metrics, over all of their series."""

    def __init__(self, *names: str) -> None:
        """``names`` are without their ``vllm:``."""
        alternatives = "|".join(map(re.escape, names))
        self._samples = re.compile(rf"^vllm:({alternatives})(?:\{{[^\n]*\}})?[ \t]+(\S+)".encode(), re.MULTILINE)

    def of(self, exposition: bytes) -> dict[str, float]:
        """By name; those that are not there are missing. Raises ValueError for a sample that is no number."""
        sums: dict[str, float] = {}
        for name, value in self._samples.findall(exposition):
            sums[name.decode()] = sums.get(name.decode(), 0.0) + float(value)
        return sums
