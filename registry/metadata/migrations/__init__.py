"""Alembic's migrations of the metadata: how an older database becomes one that this Helios works with.

Each module in ``versions/`` is one step, named after what it brings, with its predecessor in ``down_revision``. The
name of the last one stands in ``registry/metadata/schema.py`` as ``HEAD``, which is why a database that is up to date
is opened without importing Alembic. There is no way down: a database goes back by restoring a copy.

What changes a table names it in ``registry/metadata`` and in a new step here; tests/unit/registry/test_migrations.py
compares the two on both engines and prints the step that is missing.
"""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

_one_at_a_time = threading.Lock()
"""Alembic's ``op`` and ``context`` are global to the process."""


def config() -> Config:
    """Alembic's configuration, without a file."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    return made


def steps() -> list[str]:
    """Names of all migrations, oldest first."""
    return [step.revision for step in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


def upgrade(connection: Connection, to: str = "head") -> None:
    """Bring the database that the connection's transaction is in to a step; the caller commits."""
    settings = config()
    settings.attributes["connection"] = connection
    with _one_at_a_time:
        command.upgrade(settings, to)
