"""Tables of `metadata.db`: who may come in, what each namespace holds, and what changed.

Read and written by the other modules of this package, which hold all of the SQL on them.  Imports
SQLAlchemy only.  Changes go through `metadata/migrations` (`docs/design/010-metadata.md`).

| table            | one row per                                        | written by              |
|------------------|----------------------------------------------------|-------------------------|
| accounts         | person or program that may come in                 | `accounts`              |
| tokens           | bearer token, as its SHA-256                       | `accounts`              |
| namespaces       | tree with a journal of its own                     | `namespaces`            |
| entries          | file, symlink, folder or root, live or in trash    | `batch`, `tree`, ...    |
| versions         | content a file or symlink has or had               | `batch`                 |
| namespace_blocks | (namespace, block) that a kept version lists       | `references`            |
| journal          | change of a namespace                              | `namespaces`            |

The first two are about accounts and may live in another database than the rest, which is sharded
by namespace later: no foreign key crosses that line.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

MIGRATIONS = Path(__file__).parent / "migrations"
"""For `sql.migrations.upgrade`."""

# SQLite makes only an INTEGER key its row id; PostgreSQL needs BIGINT for 63 bits.
_Number = Integer().with_variant(BigInteger, "postgresql")

# Keys are compared by code point, which is SQLite's own order and PostgreSQL's "C".
_Key = Text().with_variant(Text(collation="C"), "postgresql")

metadata = MetaData()

accounts = Table(
    "accounts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("name_key", _Key, nullable=False, unique=True),
    Column("is_admin", Boolean, nullable=False),
    Column("namespace_id", Integer, nullable=False),
    Column("created", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("account_id", Integer, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("label", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)

namespaces = Table(
    "namespaces",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("journal_position", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
)

entries = Table(
    "entries",
    metadata,
    Column("id", _Number, primary_key=True, autoincrement=False),
    Column("namespace_id", Integer, ForeignKey("namespaces.id"), nullable=False),
    # NULL for the root folder, whose name is empty.
    Column("parent_id", _Number),
    Column("name", Text, nullable=False),
    Column("name_key", _Key, nullable=False),
    Column("kind", Text, nullable=False),
    # Number of the current version, of a folder: of the change that made it.
    Column("rev", _Number, nullable=False),
    Column("created", Float, nullable=False),
    # When it went to the trash, taking all below along: what is below keeps NULL here.
    Column("deleted", Float),
)

Index(
    "entries_live",
    entries.c.parent_id,
    entries.c.name_key,
    unique=True,
    sqlite_where=text("deleted IS NULL"),
    postgresql_where=text("deleted IS NULL"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", _Number, primary_key=True, autoincrement=False),
    Column("entry_id", _Number, ForeignKey("entries.id"), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
    Column("mtime", Float, nullable=False),
    Column("executable", Boolean, nullable=False),
    # Exactly one of the three: SHA-256s end to end, the bytes themselves, or a link's target.
    Column("block_list", LargeBinary),
    Column("content", LargeBinary),
    Column("symlink", Text),
    Column("created", Float, nullable=False),
)

namespace_blocks = Table(
    "namespace_blocks",
    metadata,
    Column("namespace_id", Integer, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, primary_key=True),
    Column("count", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

journal = Table(
    "journal",
    metadata,
    Column("namespace_id", Integer, primary_key=True, autoincrement=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("entry_id", _Number, nullable=False),
    Column("change", Text, nullable=False),
    Column("created", Float, nullable=False),
    sqlite_with_rowid=False,
)
