"""What healing remembers: moves, what cannot be repaired, strays, passes, jobs, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """New tables are empty; debts of before were all left by puts."""
    op.add_column(
        "nodes",
        sa.Column("disk_failed", sa.Boolean, nullable=False, server_default=sa.text("false")),
    )
    op.add_column(
        "nodes",
        sa.Column(
            "placement_free_bytes", sa.BigInteger, nullable=False, server_default=sa.text("-1")
        ),
    )
    op.add_column(
        "debts",
        sa.Column("reason", sa.String, nullable=False, server_default=sa.text("'not written'")),
    )
    op.add_column("cell", sa.Column("created_scheme", sa.String, nullable=True))
    _create_repair()
    _create_verification()
    _create_operations()


def _create_repair() -> None:
    op.create_table(
        "slot_moves",
        sa.Column("volume_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("slot", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("job_id", sa.BigInteger, nullable=True),
        sa.Column("begun", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("slot_moves_target", "slot_moves", ["target"])
    op.create_table(
        "unrepairable",
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("volume_id", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("tried", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("unrepairable_volume", "unrepairable", ["volume_id"])


def _create_verification() -> None:
    op.create_table(
        "stray",
        sa.Column("node_id", sa.String, primary_key=True),
        sa.Column("volume_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("slot", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("length", sa.Integer, nullable=False),
        sa.Column("first_seen", sa.Float, nullable=False),
        sa.Column("pass_number", sa.BigInteger, nullable=False),
        sa.Column("removing", sa.Float, nullable=True),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "passes",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("subject", sa.String, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("begun", sa.Float, nullable=False),
        sa.Column("ended", sa.Float, nullable=True),
        sa.Column("body", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "watched",
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("acknowledged", sa.Float, nullable=False),
        sa.Column("step", sa.SmallInteger, nullable=False),
        sa.Column("due", sa.Float, nullable=False),
        sa.Column("tries", sa.SmallInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("watched_due", "watched", ["due"])


def _create_operations() -> None:
    op.create_table(
        "sightings",
        sa.Column("gateway", sa.String, primary_key=True),
        sa.Column("node_id", sa.String, primary_key=True),
        sa.Column("incarnation", sa.BigInteger, nullable=False),
        sa.Column("reachable", sa.Boolean, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("reached", sa.Integer, nullable=False),
        sa.Column("missed", sa.Integer, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("written", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "disk_reports",
        sa.Column("node_id", sa.String, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("space", sa.Text, nullable=False),
        sa.Column("scrub", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("changed", sa.Float, nullable=False),
        sa.Column("done_units", sa.BigInteger, nullable=False),
        sa.Column("total_units", sa.BigInteger, nullable=False),
        sa.Column("done_bytes", sa.BigInteger, nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("bytes_per_s", sa.Float, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("blockers", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("event_id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
    )
    op.create_index("events_subject", "events", ["subject", "event_id"])
