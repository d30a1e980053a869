"""Debts: fragments known to be missing where the map says they are, and why.

Written inside transactions by the block index (slots that a put left out) and by whoever finds a
fragment gone or wrong: a read, a scrub, the verifier.  Read and repaid by repair, which makes the
fragment again where it belongs (`docs/design/013-healing.md`).  Functions over a connection; no
clock, no event loop, no Ray.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select, text

from cluster.block_sql import LIVE, Debt
from cluster.schema import debts
from protocol.ids import BlockHash, VolumeId

_ROWS_PER_STATEMENT: Final = 500

_RECORD: Final = text(
    "INSERT INTO debts (volume_id, slot, hash, since, reason) "
    "SELECT b.volume_id, :slot, b.hash, :since, :reason FROM blocks AS b "
    f"WHERE b.hash = :hash AND b.volume_id = :volume AND b.state = {LIVE} "
    "ON CONFLICT (volume_id, slot, hash) DO UPDATE SET reason = excluded.reason "
    "WHERE excluded.reason = 'lying'"
)
"""A lie outlives what was known before: only a decode tells it from a good fragment, so repair
must not believe the node's own verification."""

_REPAY: Final = text(
    "DELETE FROM debts WHERE volume_id = :volume AND slot = :slot AND hash = :hash "
    "AND EXISTS (SELECT 1 FROM volumes AS v WHERE v.volume_id = :volume AND v.epoch = :epoch)"
)


class DebtReason(enum.StrEnum):
    """How a fragment came to be owed.  The values are stored: append-only."""

    NOT_WRITTEN = "not written"
    """The put was acknowledged without it."""
    MISSING = "missing"
    """Its node looked and does not hold it."""
    CORRUPT = "corrupt"
    """It fails a checksum, or is not the fragment of its key."""
    UNREADABLE = "unreadable"
    """The disk cannot read it: says nothing about whether it is there."""
    LYING = "lying"
    """Its checksums are right and the block's SHA-256 proves it wrong."""


class OwedFragment(NamedTuple):
    """A row of the table."""

    volume: VolumeId
    slot: int
    hash: BlockHash
    since: float
    """Wall-clock seconds at which it was first known."""
    reason: DebtReason


class VolumeDebts(NamedTuple):
    """What one volume owes in one slot."""

    volume: VolumeId
    slot: int
    blocks: int
    since: float
    """Of the oldest."""


def record_debts(
    connection: Connection, rows: Sequence[Debt], since: float, reason: DebtReason
) -> None:
    """Write debts of live blocks down; one that exists keeps its age.

    A block that has left the index, or lies in another volume now, owes nothing.
    """
    for start in range(0, len(rows), _ROWS_PER_STATEMENT):
        part = rows[start : start + _ROWS_PER_STATEMENT]
        connection.execute(
            _RECORD,
            [
                {
                    "volume": int(row.volume),
                    "slot": row.slot,
                    "hash": bytes(row.hash),
                    "since": since,
                    "reason": reason.value,
                }
                for row in part
            ],
        )


def repay_debts(
    connection: Connection, rows: Iterable[Debt], epochs: Mapping[VolumeId, int]
) -> int:
    """Strike out debts whose fragment was verified where the map of those epochs says it belongs;
    returns how many there were.

    The debts of a volume that has moved on to another epoch stay: the slot may have another node
    now.
    """
    parameters = [
        {
            "volume": int(row.volume),
            "slot": row.slot,
            "hash": bytes(row.hash),
            "epoch": epochs[row.volume],
        }
        for row in rows
    ]
    return connection.execute(_REPAY, parameters).rowcount if parameters else 0


def read_debts(connection: Connection, volume: VolumeId, limit: int) -> list[OwedFragment]:
    """Debts of one volume in (slot, hash) order, at most `limit`."""
    query = (
        select(debts)
        .where(debts.c.volume_id == int(volume))
        .order_by(debts.c.slot, debts.c.hash)
        .limit(limit)
    )
    return [_owed(row) for row in connection.execute(query)]


def read_volume_debts(connection: Connection) -> list[VolumeDebts]:
    """Debts counted by volume and slot, in that order."""
    query = (
        select(
            debts.c.volume_id,
            debts.c.slot,
            func.count().label("blocks"),
            func.min(debts.c.since).label("since"),
        )
        .group_by(debts.c.volume_id, debts.c.slot)
        .order_by(debts.c.volume_id, debts.c.slot)
    )
    return [
        VolumeDebts(VolumeId(row.volume_id), row.slot, row.blocks, row.since)
        for row in connection.execute(query)
    ]


def oldest_debt(connection: Connection) -> float | None:
    """Since when the oldest debt is known, wall-clock seconds; None without any."""
    since: float | None = connection.execute(select(func.min(debts.c.since))).scalar_one()
    return since


def _owed(row: Any) -> OwedFragment:
    return OwedFragment(
        VolumeId(row.volume_id),
        row.slot,
        BlockHash(row.hash),
        row.since,
        DebtReason(row.reason),
    )
