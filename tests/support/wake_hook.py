"""The operator's hook, as the router asks it (``router.admission.wake_url``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.service import served


class Hook:
    """Notes what is asked for, and answers what it ``says``."""

    url = ""

    def __init__(self) -> None:
        self.documents: list[dict[str, str]] = []
        self.says: tuple[int, dict[str, str]] = (202, {"progress": "loading weights, 40%"})

    def answer(self, body: bytes) -> tuple[int, Any]:
        self.documents.append(json.loads(body))
        return self.says

    @property
    def asked(self) -> list[str]:
        """The models that were asked for, in order."""
        return [document["model"] for document in self.documents]


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    with served(hook):
        yield hook
