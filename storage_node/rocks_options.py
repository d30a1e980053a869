"""How a node's RocksDB is set up, and why; one place, no logic.

Called by `rocks_store` at open.  A laptop runs nine of these, so every buffer is small; a node
serves a few hundred requests a second of 700 KB each, so nothing here is tuned for tiny values.
Measured in `docs/design/005-fragment-store.md`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rocksdict import (
    BlockBasedOptions,
    Cache,
    ChecksumType,
    DBCompressionType,
    DBRecoveryMode,
    IngestExternalFileOptions,
    Options,
    WriteOptions,
)

from protocol.limits import GIB, KIB, MIB
from storage_node.space import SpaceShares

INDEX_FAMILY: Final = "index"
EXTENTS_FAMILY: Final = "extents"
SMALL_FAMILY: Final = "small"

EXTENT_FILE_BYTES: Final = 256 * MIB
"""What merging aims at: 4,000 files a terabyte."""

_EXTENT_BLOCK_BYTES: Final = 64
"""Every record is a block of its own, and so are the two short marks around a group.  Ingestion
reads the first and the last block of a file back from the disk; this way they are short."""

_OPEN_FILES_MAX: Final = 512
_LOG_BYTES_MAX: Final = 1 * MIB
_WAL_BYTES_MAX: Final = 32 * MIB


def free_disk_bytes(directory: Path) -> int:
    """Bytes that an unprivileged process may still write to the file system of `directory`."""
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What an operator or a test may change about one store."""

    reserve_bytes: int = 1 * GIB
    """Puts are refused while less than this is free: deletes and merges need space themselves."""
    free_bytes: Callable[[Path], int] = free_disk_bytes
    capacity_bytes: int | None = None
    """What the records of this store may take; as much as the disk has, if None."""
    ballast_bytes: int = 32 * MIB
    """Held back for deletes on a disk that others filled (`storage_node.ballast`)."""
    shares: SpaceShares = field(default_factory=SpaceShares)
    large_record_bytes: int = 32 * KIB
    """Records from this size on may go into extents."""
    ingest_bytes: int = 256 * KIB
    """Large records of a group go into an extent when together they reach this; below it one
    synced batch is cheaper."""
    block_cache_bytes: int = 8 * MIB
    """For index and small records; extents are left to the page cache."""
    small_buffer_bytes: int = 8 * MIB
    index_buffer_bytes: int = 4 * MIB


@dataclass(frozen=True, slots=True)
class FamilyOptions:
    """RocksDB options of the database and of each column family."""

    database: Options
    index: Options
    extents: Options
    small: Options

    @property
    def families(self) -> dict[str, Options]:
        return {
            INDEX_FAMILY: self.index,
            EXTENTS_FAMILY: self.extents,
            SMALL_FAMILY: self.small,
        }


def family_options(options: StoreOptions, *, create: bool) -> FamilyOptions:
    """Fresh option objects: RocksDB keeps references to them for the life of the database."""
    cache = Cache(options.block_cache_bytes)
    database = _tables(cache, bloom=False)
    database.create_if_missing(create)
    database.create_missing_column_families(create)
    database.set_write_buffer_size(options.index_buffer_bytes)
    # All families reach the disk together: were the WAL lost, what is left is one earlier moment.
    database.set_atomic_flush(True)
    database.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    database.set_max_total_wal_size(_WAL_BYTES_MAX)
    database.set_max_open_files(_OPEN_FILES_MAX)
    database.set_max_background_jobs(2)
    database.set_skip_stats_update_on_db_open(True)
    database.set_keep_log_file_num(2)
    database.set_max_log_file_size(_LOG_BYTES_MAX)
    database.set_stats_dump_period_sec(0)
    database.set_stats_persist_period_sec(0)
    index = _tables(cache, bloom=True)
    index.set_write_buffer_size(options.index_buffer_bytes)
    small = _tables(cache, bloom=False)
    small.set_write_buffer_size(options.small_buffer_bytes)
    small.set_target_file_size_base(EXTENT_FILE_BYTES)
    return FamilyOptions(database, index, _extents(), small)


def move_into_place() -> IngestExternalFileOptions:
    """Link a finished file into the store instead of copying it."""
    options = IngestExternalFileOptions()
    options.set_move_files(True)
    return options


def synced() -> WriteOptions:
    """The WAL is on the disk when the write returns."""
    options = WriteOptions()
    options.sync = True
    return options


def _tables(cache: Cache, *, bloom: bool) -> Options:
    table = BlockBasedOptions()
    table.set_checksum_type(ChecksumType.xxh3())
    table.set_block_cache(cache)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    if bloom:
        table.set_bloom_filter(10, False)
    options = Options(raw_mode=True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.none())
    return options


def _extents() -> Options:
    table = BlockBasedOptions()
    table.set_checksum_type(ChecksumType.xxh3())
    table.set_block_size(_EXTENT_BLOCK_BYTES)
    table.disable_cache()
    options = Options(raw_mode=True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.none())
    options.set_write_buffer_size(1 * MIB)  # only tombstones pass through it
    # A tombstone's file spans every extent between its first and its last key; compacting it
    # would rewrite the disk.  `merge` compacts one bounded range at a time instead.
    options.set_disable_auto_compactions(True)
    options.set_target_file_size_base(EXTENT_FILE_BYTES)
    options.set_max_compaction_bytes(4 * EXTENT_FILE_BYTES)
    return options
