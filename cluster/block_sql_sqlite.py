"""The block index on SQLite: one statement per batch, at most one row back.

See `block_sql` for why, and for what each method must do.  Needs SQLite 3.38 (`->>`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson
from sqlalchemy import Connection

from cluster.block_sql import LIVE, BlockValues, Debt, Fence, FoundRows, Growth
from protocol.ids import BLOCK_HASH_BYTES, BlockHash, NodeId, VolumeId

_AT_KEY = f"substr(:hashes, j.key * {BLOCK_HASH_BYTES} + 1, {BLOCK_HASH_BYTES})"
_BLOCKS_AT_KEYS = (
    f"json_each(:keys) AS j CROSS JOIN blocks AS b ON b.hash = {_AT_KEY} AND b.state = {LIVE}"
)
_HAS_CLAIM = (
    "(b.owner = :owner AND b.created > :created_after OR EXISTS (SELECT 1 FROM claims AS c "
    "WHERE c.owner = :owner AND c.hash = b.hash AND c.expires > :expires_after))"
)
_LOOKUP = (
    "SELECT group_concat(j.key), group_concat(b.volume_id), group_concat(b.stored_bytes), "
    f"group_concat(b.plain_bytes) FROM {_BLOCKS_AT_KEYS}"
)
_CLAIM_LIFE = f"SELECT group_concat(j.key * 2 + {_HAS_CLAIM}) FROM {_BLOCKS_AT_KEYS}"
_WRITE_CLAIMS = (
    "INSERT INTO claims (owner, hash, expires) SELECT j.value, b.hash, :expires "
    f"FROM {_BLOCKS_AT_KEYS} WHERE NOT (b.owner = j.value AND b.created > :created_after) "
    "ON CONFLICT (owner, hash) DO UPDATE SET expires = excluded.expires "
    "WHERE claims.expires <= :renew_before"
)
_COMPARE = (
    f"SELECT (SELECT group_concat(j.key) FROM {_BLOCKS_AT_KEYS}), "
    "(SELECT group_concat(v.volume_id || ',' || v.epoch || ',' || s.slot || ',' "
    "|| ifnull(n.incarnation, -1) || ',' || ifnull(s.node_id, '')) FROM json_each(:volumes) AS j "
    "CROSS JOIN volumes AS v ON v.volume_id = j.value "
    "CROSS JOIN volume_slots AS s ON s.volume_id = v.volume_id "
    "LEFT JOIN nodes AS n ON n.node_id = s.node_id)"
)
_INSERT_BLOCKS = (
    "INSERT INTO blocks (hash, volume_id, stored_bytes, plain_bytes, owner, state, created) "
    f"SELECT {_AT_KEY}, j.value ->> 0, j.value ->> 1, j.value ->> 2, j.value ->> 3, {LIVE}, "
    ":created FROM json_each(:rows) AS j WHERE true ON CONFLICT DO NOTHING"
)
_GROW = (
    "UPDATE volumes SET blocks = blocks + (j.value ->> 1), "
    "stored_bytes = stored_bytes + (j.value ->> 2), plain_bytes = plain_bytes + (j.value ->> 3) "
    "FROM json_each(:rows) AS j WHERE volume_id = (j.value ->> 0)"
)
_INSERT_DEBTS = (
    "INSERT INTO debts (volume_id, slot, hash, since) "
    f"SELECT j.value ->> 0, j.value ->> 1, {_AT_KEY}, :since FROM json_each(:rows) AS j "
    "WHERE true ON CONFLICT DO NOTHING"
)
_FENCE_FIELDS: Final = 5


def _json(rows: Sequence[Any]) -> str:
    return orjson.dumps(rows).decode()


def _keys(count: int) -> str:
    """A JSON array whose keys are 0..count-1."""
    return f"[{'0,' * (count - 1)}0]"


def _numbers(text: str | None) -> list[int]:
    """Read back what group_concat made of integers."""
    numbers: list[int] = orjson.loads(f"[{text or ''}]")
    return numbers


class SqliteBlockSql:
    """`BlockSql` by folding batches into single parameters and single rows."""

    def lookup(self, connection: Connection, hashes: Sequence[BlockHash]) -> FoundRows:
        if not hashes:
            return FoundRows([], [], [], [])
        parameters = {"hashes": b"".join(hashes), "keys": _keys(len(hashes))}
        columns = connection.exec_driver_sql(_LOOKUP, parameters).one()
        return FoundRows(*map(_numbers, columns))

    def claim_life(
        self,
        connection: Connection,
        owner: int,
        hashes: Sequence[BlockHash],
        created_after: float,
        expires_after: float,
    ) -> tuple[list[int], list[int]]:
        if not hashes:
            return [], []
        parameters = {
            "hashes": b"".join(hashes),
            "keys": _keys(len(hashes)),
            "owner": owner,
            "created_after": created_after,
            "expires_after": expires_after,
        }
        folded = connection.exec_driver_sql(_CLAIM_LIFE, parameters).scalar_one()
        numbers = _numbers(folded)
        claimed = [number >> 1 for number in numbers if number & 1]
        return claimed, [number >> 1 for number in numbers if not number & 1]

    def write_claims(
        self,
        connection: Connection,
        rows: Sequence[tuple[int, BlockHash]],
        created_after: float,
        renew_before: float,
        expires: float,
    ) -> None:
        if not rows:
            return
        parameters = {
            "hashes": b"".join([block for _, block in rows]),
            "keys": _json([owner for owner, _ in rows]),
            "created_after": created_after,
            "renew_before": renew_before,
            "expires": expires,
        }
        connection.exec_driver_sql(_WRITE_CLAIMS, parameters)

    def compare(
        self, connection: Connection, hashes: Sequence[BlockHash], volume_ids: Sequence[VolumeId]
    ) -> tuple[set[int], dict[VolumeId, Fence]]:
        parameters = {
            "hashes": b"".join(hashes),
            "keys": _keys(len(hashes)),
            "volumes": _json(volume_ids),
        }
        existing, folded = connection.exec_driver_sql(_COMPARE, parameters).one()
        return set(_numbers(existing)), _unfold_fences(folded or "")

    def insert_blocks(
        self, connection: Connection, rows: Sequence[BlockValues], created: float
    ) -> set[BlockHash]:
        if not rows:
            return set()
        parameters = {
            "hashes": b"".join([row.hash for row in rows]),
            "rows": _json([row[1:] for row in rows]),
            "created": created,
        }
        inserted = connection.exec_driver_sql(_INSERT_BLOCKS, parameters).rowcount
        # One writer at a time: nothing can have come between `compare` and here.
        assert inserted == len(rows), f"{inserted} of {len(rows)} new blocks inserted"
        return {row.hash for row in rows}

    def grow(self, connection: Connection, growths: Sequence[Growth]) -> None:
        if growths:
            rows = _json([tuple(growth) for growth in growths])
            connection.exec_driver_sql(_GROW, {"rows": rows})

    def insert_debts(self, connection: Connection, rows: Sequence[Debt], since: float) -> None:
        if not rows:
            return
        parameters = {
            "hashes": b"".join([row.hash for row in rows]),
            "rows": _json([row[:2] for row in rows]),
            "since": since,
        }
        connection.exec_driver_sql(_INSERT_DEBTS, parameters)


def _unfold_fences(folded: str) -> dict[VolumeId, Fence]:
    """Read back the text of `_COMPARE`: no id contains a comma."""
    fields = folded.split(",") if folded else []
    epochs: dict[VolumeId, int] = {}
    slots: dict[VolumeId, list[tuple[int, NodeId | None, int]]] = {}
    for start in range(0, len(fields), _FENCE_FIELDS):
        volume_text, epoch, slot, incarnation, node_id = fields[start : start + _FENCE_FIELDS]
        volume = VolumeId(volume_text)
        epochs[volume] = int(epoch)
        slots.setdefault(volume, []).append(
            (int(slot), NodeId(node_id) if node_id else None, int(incarnation))
        )
    return {volume: Fence(epochs[volume], tuple(sorted(slots[volume]))) for volume in epochs}
