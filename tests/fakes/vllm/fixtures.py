"""Fixtures: fakes in threads, whose journals must hold no violation when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.server import in_thread
from tests.fakes.vllm.settings import Settings


@dataclass
class Allowed:
    """Violations a test provokes on purpose, by a part of their text."""

    parts: list[str] = field(default_factory=list)

    def __call__(self, part: str) -> None:
        self.parts.append(part)


@pytest.fixture
def allowed_violations() -> Allowed:
    return Allowed()


@pytest.fixture
def fake_vllm(allowed_violations: Allowed) -> Iterator[Callable[..., Control]]:
    """``fake_vllm("model", token_s=0.01, …)`` starts a fake (``Settings``) that lives as long as the test."""
    started: list[Control] = []
    with ExitStack() as stack:

        def start(model: str = "tiny", **settings: Any) -> Control:
            control = stack.enter_context(in_thread(Settings(model, **settings)))
            started.append(control)
            return control

        yield start
        found = [v for control in started for v in control.violations()]
    if left := [v for v in found if not any(part in v for part in allowed_violations.parts)]:
        pytest.fail("the fake vLLM was told what it must not be told:\n" + "\n".join(left), pytrace=False)
