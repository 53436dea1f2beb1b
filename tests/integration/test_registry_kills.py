"""A few kills under mixed load; `make soak` does a hundred of them (tests/support/kill_run.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kill_run import site
from tests.support.postgres import why_no_postgres


@pytest.mark.parametrize(("engine", "kills"), [("sqlite", 5), ("postgres", 3), ("front", 3)])
def test_kills_cost_nothing_that_was_acknowledged(engine: str, kills: int, tmp_path: Path) -> None:
    if engine == "postgres" and (why := why_no_postgres()):
        pytest.skip(why)
    with site(engine, tmp_path, seed=11) as run:
        run.kill_often(kills)
        run.check_all()
        assert run.problems == [], run.summary()
        assert run.journal.acknowledged > 3
