"""The cell as first written."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table; they are empty until `cell.create_cell`."""
    _create_cell()
    _create_nodes()
    _create_volumes()
    _create_blocks()


def _create_cell() -> None:
    op.create_table(
        "cell",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("cluster_id", sa.String, nullable=False),
        sa.Column("scheme", sa.String, nullable=False),
        sa.Column("format", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "map_version",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("next_volume", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "leaders",
        sa.Column("role", sa.String, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )


def _create_nodes() -> None:
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.String, primary_key=True),
        sa.Column("store_id", sa.String, nullable=False),
        sa.Column("directory", sa.String, nullable=False),
        sa.Column("host", sa.String, nullable=False),
        sa.Column("rack", sa.String, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("state_since", sa.Float, nullable=False),
        sa.Column("incarnation", sa.BigInteger, nullable=False),
        sa.Column("endpoint", sa.String, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("capacity_bytes", sa.BigInteger, nullable=False),
        sa.Column("free_bytes", sa.BigInteger, nullable=False),
        sa.Column("used_bytes", sa.BigInteger, nullable=False),
        sa.Column("fragments", sa.BigInteger, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )


def _create_volumes() -> None:
    op.create_table(
        "volumes",
        sa.Column("volume_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("scheme", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger, nullable=False),
        sa.Column("plain_bytes", sa.BigInteger, nullable=False),
        sa.Column("blocks", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    is_open = sa.text("state = 'open'")
    op.create_index(
        "volumes_open", "volumes", ["volume_id"], sqlite_where=is_open, postgresql_where=is_open
    )
    op.create_index("volumes_changed", "volumes", ["changed"])
    op.create_table(
        "volume_slots",
        sa.Column("volume_id", sa.BigInteger, sa.ForeignKey("volumes.volume_id"), primary_key=True),
        sa.Column("slot", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("node_id", sa.String, sa.ForeignKey("nodes.node_id"), nullable=True),
        sqlite_with_rowid=False,
    )
    op.create_index("volume_slots_node", "volume_slots", ["node_id"])


def _create_blocks() -> None:
    op.create_table(
        "blocks",
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("volume_id", sa.BigInteger, nullable=False),
        sa.Column("stored_bytes", sa.Integer, nullable=False),
        sa.Column("plain_bytes", sa.Integer, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("owner", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "claims",
        sa.Column("owner", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("expires", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "debts",
        sa.Column("volume_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("slot", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("since", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
