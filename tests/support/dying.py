"""``helios`` that is killed at a step of its own: ``python -m tests.support.dying STEP registry --port 0 …``.

Steps are what makes something last, seen by others, or gone: syncs, renames, links and removals of files, and commits
of transactions, each of these before and after it. At step number STEP, counted from the start (0: never), the process
ends by SIGKILL, as if by chance just there. What C code does inside one of them is one step.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

FILES: Final = ("fsync", "fdatasync", "rename", "replace", "link", "unlink")


def die_at(step: int) -> None:
    """Have this process end at its step number ``step``."""
    numbers = itertools.count(1)  # one call of it is atomic

    def passed() -> None:
        if next(numbers) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **options: Any) -> Any:
            passed()
            result = call(*args, **options)
            passed()
            return result

        return stepping

    for name in FILES:
        setattr(os, name, around(getattr(os, name)))
    from sqlalchemy.engine.default import DefaultDialect

    setattr(DefaultDialect, "do_commit", around(DefaultDialect.do_commit))  # noqa: B010 - a method


def main() -> int:
    step = int(sys.argv.pop(1))
    if step:
        die_at(step)
    from helios.cli.main import main as helios

    return helios()


if __name__ == "__main__":
    sys.exit(main())
