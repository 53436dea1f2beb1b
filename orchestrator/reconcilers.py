"""The reconcilers that the operator runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helios.config import Config
from orchestrator.actions import Reconciler


def reconcilers(config: Config) -> Sequence[Reconciler[Any]]:
    """One for each kind of Helios' resources."""
    return ()
