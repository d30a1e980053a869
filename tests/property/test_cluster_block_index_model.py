"""The block index against a model of a few dictionaries, in both ways of its SQL.

A random history of puts (good, stale, misdirected, doubled), claims, time passing, nodes that
restart and volumes that are sealed: every outcome and every answer must be the model's.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cell_rows import RS, SMALL, HandClock, Rows, block_named, empty_database, new_cell, node_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos.sim.database import memory_directory
from cluster.block_index import BlockIndex, NewBlock, Receipt, RecordOutcome, Totals
from cluster.block_sql_portable import PortableBlockSql
from cluster.block_sql_sqlite import SqliteBlockSql
from cluster.topology import VolumeView
from protocol.ids import BlockHash, NodeId
from protocol.limits import CLAIM_SECONDS

NODES = 9
NAMES = [block_named(number) for number in range(6)]
OWNERS = (1, 2)


@dataclass
class Model:
    """What must be so after a history of calls."""

    incarnations: dict[NodeId, int]
    rows: dict[BlockHash, NewBlock] = field(default_factory=dict)
    claims: dict[tuple[int, BlockHash], float] = field(default_factory=dict)
    """When each ends."""

    def record(self, entries: Sequence[NewBlock], volumes: Any, now: float) -> list[RecordOutcome]:
        return [self._record_one(entry, volumes, now) for entry in entries]

    def _record_one(self, entry: NewBlock, volumes: Any, now: float) -> RecordOutcome:
        if entry.hash not in self.rows:
            volume: VolumeView | None = volumes.get(entry.volume)
            if volume is None or not self._holds(entry, volume):
                return RecordOutcome.FENCED
            self.rows[entry.hash] = entry
            self.claims[entry.owner, entry.hash] = now + CLAIM_SECONDS
            return RecordOutcome.NEW
        self.claim(entry.owner, [entry.hash], now)
        return RecordOutcome.EXISTS

    def _holds(self, entry: NewBlock, volume: VolumeView) -> bool:
        expected = sorted(
            (slot, node_id, self.incarnations[node_id])
            for slot, node_id in enumerate(volume.slots)
            if node_id is not None and slot not in entry.missing_slots
        )
        accounted = [slot for slot, *_ in expected] + list(entry.missing_slots)
        return (
            entry.epoch == volume.epoch
            and sorted(tuple(receipt) for receipt in entry.receipts) == expected
            and sorted(accounted) == list(range(len(volume.slots)))
        )

    def claim(self, owner: int, hashes: Sequence[BlockHash], now: float) -> set[BlockHash]:
        alive = {block for block in hashes if block in self.rows}
        for block in alive:
            if self.claims.get((owner, block), 0.0) <= now + CLAIM_SECONDS / 2:
                self.claims[owner, block] = now + CLAIM_SECONDS
        return alive

    def claimed(self, owner: int, now: float) -> set[BlockHash]:
        return {block for (who, block), ends in self.claims.items() if who == owner and ends > now}


put = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "owner": st.sampled_from(OWNERS),
        "volume": st.integers(0, 3),
        "size": st.integers(0, 1000),
        "missing": st.sets(st.integers(0, 9), max_size=2),
        "reverse": st.booleans(),
        "fault": st.sampled_from(
            [None] * 6 + ["epoch", "life", "node", "drop", "double", "volume"]
        ),
    }
)
step = st.one_of(
    st.tuples(st.just("puts"), st.lists(put, min_size=1, max_size=5)),
    st.tuples(
        st.just("claim"), st.tuples(st.sampled_from(OWNERS), st.lists(st.sampled_from(NAMES)))
    ),
    st.tuples(st.just("restart"), st.integers(1, NODES)),
    st.tuples(st.just("seal"), st.integers(0, 3)),
    st.tuples(st.just("pass"), st.sampled_from([1.0, CLAIM_SECONDS / 2, CLAIM_SECONDS - 1])),
)


class History:
    """Plays steps on a real index and on the model."""

    def __init__(self, directory: Path, way: type[SqliteBlockSql] | type[PortableBlockSql]) -> None:
        self.clock = HandClock()
        self.db = empty_database(directory)
        new_cell(self.db, self.clock, NODES)
        self.rows = Rows(self.db)
        self.rows.register_all()
        self.index = BlockIndex(self.db, self.clock, way())
        self.volumes = [
            self.rows.open_volume(SMALL, node_ids(4)),
            self.rows.open_volume(SMALL, node_ids(4, 5)),
            self.rows.open_volume(RS, node_ids(9)),
            self.rows.open_volume(RS, (*node_ids(8), None)),
        ]
        self.model = Model(dict.fromkeys(node_ids(NODES), 1))
        self.removed: set[int] = set()

    async def play(self, what: str, argument: Any) -> None:
        now = self.clock.wall()
        match what:
            case "puts":
                entries = [self._entry(**values) for values in argument]
                known = {
                    volume.volume_id: volume
                    for number, volume in enumerate(self.volumes)
                    if number not in self.removed
                }
                outcomes = await self.index.record_puts(entries)
                assert outcomes == self.model.record(entries, known, now)
            case "claim":
                owner, names = argument
                claimed = await self.index.claim(owner, names)
                assert claimed == self.model.claim(owner, names, now)
            case "restart":
                self.model.incarnations[NodeId.numbered(argument)] = self.rows.register(argument)
            case "seal":
                volume = self.volumes[argument]
                if not any(row.volume == volume.volume_id for row in self.model.rows.values()):
                    self.removed.add(argument)
                self.rows.seal(volume.volume_id)
            case "pass":
                self.clock.now += argument
        await self.compare()

    def _entry(
        self,
        name: BlockHash,
        owner: int,
        volume: int,
        size: int,
        missing: set[int],
        reverse: bool,
        fault: str | None,
    ) -> NewBlock:
        view = self.volumes[volume]
        absent = {slot for slot in missing if slot < len(view.slots)}
        absent |= set(view.vacant_slots)
        receipts = [
            Receipt(slot, node_id, self.model.incarnations[node_id])
            for slot, node_id in enumerate(view.slots)
            if node_id is not None and slot not in absent
        ]
        match fault:
            case "life":
                receipts[0] = receipts[0]._replace(incarnation=receipts[0].incarnation - 1)
            case "node":
                other = NodeId.numbered(10 - int(receipts[-1].node_id[-2:]))
                receipts[-1] = receipts[-1]._replace(node_id=other)
            case "drop":
                receipts.pop()
            case "double":
                receipts.append(receipts[0])
        return NewBlock(
            name,
            owner,
            view.volume_id if fault != "volume" else type(view.volume_id)(77),
            view.epoch + (fault == "epoch"),
            size + 64,
            size,
            tuple(reversed(receipts) if reverse else receipts),
            tuple(sorted(absent)),
        )

    async def compare(self) -> None:
        """Everything that can be asked, asked."""
        found = await self.index.lookup(NAMES)
        assert {(row.hash, row.volume, row.stored_bytes) for row in found.values()} == {
            (row.hash, row.volume, row.stored_bytes) for row in self.model.rows.values()
        }
        for owner in OWNERS:
            claimed = await self.index.claimed(owner, NAMES)
            assert claimed == self.model.claimed(owner, self.clock.wall())
        kept = self.model.rows.values()
        assert await self.index.totals() == Totals(
            len(self.model.rows),
            sum(row.plain_bytes for row in kept),
            sum(row.stored_bytes for row in kept),
        )
        assert await self.index.debts() == sum(len(row.missing_slots) for row in kept)


def play_all(
    steps: list[tuple[str, Any]], way: type[SqliteBlockSql] | type[PortableBlockSql]
) -> None:
    async def main(history: History) -> None:
        for what, argument in steps:
            await history.play(what, argument)

    with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
        history = History(Path(directory), way)
        try:
            asyncio.run(main(history))
        finally:
            history.db.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=14))
def test_every_history_ends_as_the_model_says_on_sqlite(steps: list[tuple[str, Any]]) -> None:
    play_all(steps, SqliteBlockSql)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=14))
def test_every_history_ends_as_the_model_says_in_portable_sql(
    steps: list[tuple[str, Any]],
) -> None:
    play_all(steps, PortableBlockSql)
