"""How deep a stateful test looks: a little in ``make test``, as deep as one likes in ``scripts/soak.py --models``."""

from __future__ import annotations

import os

from hypothesis import settings


def depth(examples: int, steps: int) -> settings:
    """So many sequences of at most so many steps, unless HELIOS_MODEL_EXAMPLES and HELIOS_MODEL_STEPS say others."""
    return settings(
        max_examples=int(os.environ.get("HELIOS_MODEL_EXAMPLES") or examples),
        stateful_step_count=int(os.environ.get("HELIOS_MODEL_STEPS") or steps),
        deadline=None,
        print_blob=True,
    )
