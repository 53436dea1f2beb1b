"""A registry of which a model's choices decide all that it does, for Hypothesis to run it again.

A failure that is found is looked at by doing the same again, and again with less. Where names that are drawn by chance,
the time that passes or the room on a disk have a say, the same fails elsewhere, or not at all, and Hypothesis says only
that the test's data are inconsistent ("FlakyStrategyDefinition"), whatever had gone wrong.
"""

from __future__ import annotations

import contextlib
import math
import random
import secrets
from collections.abc import Iterator

import pytest

from registry import burial
from registry.ingest import staged


@contextlib.contextmanager
def determined() -> Iterator[random.Random]:
    """While it lasts, names are drawn by the ``Random`` that this gives (objects are deleted in the order of theirs),
    a deletion takes no time, who would wait for one gives up at once, and the disk has room."""
    chance = random.Random("names")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda nbytes=32: chance.randbytes(nbytes).hex())
        patch.setattr(burial, "TURN_S", math.inf)
        patch.setattr(burial, "WAIT_S", -1.0)
        patch.setattr(staged, "check_space", lambda _directory, _size: None)
        yield chance
