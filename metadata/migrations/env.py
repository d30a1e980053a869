"""Alembic's entry for `metadata.db`; run by `sql.migrations.upgrade`."""

from metadata.schema import metadata
from sql.migrations import run_env

run_env(metadata)
