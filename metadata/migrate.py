"""Brings `metadata.db` to this version's tables.

Called at start by the process that owns the data directory, before anything serves, and by tests.
Apart from the rest so that a gateway does not load Alembic.
"""

from __future__ import annotations

from metadata.schema import MIGRATIONS
from sql.database import Database
from sql.migrations import upgrade


def prepare_schema(database: Database) -> None:
    """Run the migrations that `database` does not have yet, in one transaction."""
    upgrade(database, MIGRATIONS)
