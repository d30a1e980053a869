"""Bring a database to the newest schema with Alembic.

Called once at start by the process that owns the data directory, before anything serves.  Each
package with tables has a `migrations/` folder whose `env.py` is two lines that call `run_env`.

Alembic is imported when it is used: a gateway or an actor imports this module and never migrates,
and Alembic is a quarter of a second and eight megabytes.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, MetaData

from sql.database import Database


def upgrade(database: Database, script_location: Path) -> None:
    """Run every migration that `database` does not have yet, in one transaction."""
    from alembic import command
    from alembic.config import Config

    def work(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(script_location).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    database.transact(work)


def run_env(metadata: MetaData) -> None:
    """Body of a package's `migrations/env.py`."""
    from alembic import context

    connection = context.config.attributes["connection"]
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    context.run_migrations()
