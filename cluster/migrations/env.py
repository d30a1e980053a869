"""Alembic's entry for `cell.db`; run by `sql.migrations.upgrade`."""

from cluster.schema import metadata
from sql.migrations import run_env

run_env(metadata)
