"""The accounts and the file tree as first written."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NUMBER = sa.Integer().with_variant(sa.BigInteger, "postgresql")
_KEY = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_LIVE = sa.text("deleted IS NULL")


def upgrade() -> None:
    """Create every table; they are empty until `Accounts.create_account`."""
    _create_accounts()
    _create_entries()
    _create_versions()
    _create_journal()


def _create_accounts() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("name_key", _KEY, nullable=False, unique=True),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("namespace_id", sa.Integer, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    )
    op.create_index("ix_tokens_account_id", "tokens", ["account_id"])


def _create_entries() -> None:
    op.create_table(
        "namespaces",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("journal_position", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "entries",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=False),
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), nullable=False),
        sa.Column("parent_id", _NUMBER),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("name_key", _KEY, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("rev", _NUMBER, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("deleted", sa.Float),
    )
    op.create_index(
        "entries_live",
        "entries",
        ["parent_id", "name_key"],
        unique=True,
        sqlite_where=_LIVE,
        postgresql_where=_LIVE,
    )


def _create_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=False),
        sa.Column("entry_id", _NUMBER, sa.ForeignKey("entries.id"), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("mtime", sa.Float, nullable=False),
        sa.Column("executable", sa.Boolean, nullable=False),
        sa.Column("block_list", sa.LargeBinary),
        sa.Column("content", sa.LargeBinary),
        sa.Column("symlink", sa.Text),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("ix_versions_entry_id", "versions", ["entry_id"])
    op.create_table(
        "namespace_blocks",
        sa.Column("namespace_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary, primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )


def _create_journal() -> None:
    op.create_table(
        "journal",
        sa.Column("namespace_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("entry_id", _NUMBER, nullable=False),
        sa.Column("change", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
