"""The block index: fenced puts, first wins, claims, debts and counters, in both ways of its SQL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from cell_rows import (
    RS,
    SMALL,
    HandClock,
    Rows,
    block_named,
    empty_database,
    new_block,
    new_cell,
    node_ids,
    registration,
)
from sqlalchemy import Connection, select

from cluster import map_rows
from cluster.block_index import BlockIndex, BlockRow, NewBlock, Receipt, RecordOutcome, Totals
from cluster.block_sql import BlockSql
from cluster.block_sql_portable import PortableBlockSql
from cluster.block_sql_sqlite import SqliteBlockSql
from cluster.schema import claims, debts
from cluster.topology import VolumeState
from protocol.errors import DatabaseBusy, Overloaded
from protocol.ids import NodeId, VolumeId
from protocol.limits import CLAIM_SECONDS
from sql.database import Database

NEW, EXISTS, FENCED = RecordOutcome.NEW, RecordOutcome.EXISTS, RecordOutcome.FENCED
ALICE, BOB = 1, 2


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def db(tmp_path: Path, clock: HandClock) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, clock)
    yield database
    database.close()


@pytest.fixture
def rows(db: Database) -> Rows:
    rows = Rows(db)
    rows.register_all()
    return rows


@pytest.fixture(params=[SqliteBlockSql, PortableBlockSql])
def sql(request: pytest.FixtureRequest) -> BlockSql:
    made: BlockSql = request.param()
    return made


@pytest.fixture
def index(db: Database, clock: HandClock, sql: BlockSql) -> BlockIndex:
    return BlockIndex(db, clock, sql)


def claim_rows(db: Database) -> list[tuple[int, bytes]]:
    def work(connection: Connection) -> list[tuple[int, bytes]]:
        query = select(claims.c.owner, claims.c.hash).order_by(claims.c.owner, claims.c.hash)
        return [(owner, block) for owner, block in connection.execute(query)]

    return db.read_now(work)


def debt_rows(db: Database) -> list[tuple[int, int, bytes]]:
    def work(connection: Connection) -> list[tuple[int, int, bytes]]:
        query = select(debts.c.volume_id, debts.c.slot, debts.c.hash)
        return [tuple(row) for row in connection.execute(query)]

    return db.read_now(work)


async def test_a_recorded_block_is_found_with_its_volume_and_sizes(
    index: BlockIndex, rows: Rows
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    assert await index.record_puts([new_block("a", volume)]) == [NEW]
    found = await index.lookup([block_named("a"), block_named("b")])
    assert found == {block_named("a"): BlockRow(block_named("a"), volume.volume_id, 5_000, 4_000)}
    assert isinstance(found[block_named("a")].volume, VolumeId)
    assert await index.totals() == Totals(blocks=1, plain_bytes=4_000, stored_bytes=5_000)


async def test_the_first_put_of_a_hash_wins_and_the_second_learns_that_it_exists(
    index: BlockIndex, rows: Rows, db: Database
) -> None:
    first, second = rows.open_volume(SMALL, node_ids(4)), rows.open_volume(SMALL, node_ids(4, 5))
    assert await index.record_puts([new_block("a", first)]) == [NEW]
    assert await index.record_puts([new_block("a", second, owner=BOB)]) == [EXISTS]
    row = (await index.lookup([block_named("a")]))[block_named("a")]
    assert row.volume == first.volume_id
    assert (await index.totals()).blocks == 1, "a loser counts nowhere"
    assert await index.claimed(BOB, [block_named("a")]) == {block_named("a")}
    assert rows.volume(second.volume_id).blocks == 0


async def test_one_hash_twice_in_a_batch_is_new_once(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    twice = [new_block("a", volume), new_block("b", volume), new_block("a", volume, owner=BOB)]
    assert await index.record_puts(twice) == [NEW, NEW, EXISTS]
    assert (await index.totals()).blocks == 2
    assert await index.claimed(BOB, [block_named("a"), block_named("b")]) == {block_named("a")}


async def test_an_empty_batch_has_no_outcomes(index: BlockIndex) -> None:
    assert await index.record_puts([]) == []
    assert await index.lookup([]) == {}
    assert await index.claim(ALICE, []) == set()
    assert await index.claimed(ALICE, []) == set()


# -- fencing -------------------------------------------------------------------------------------


async def test_a_receipt_of_an_earlier_incarnation_is_fenced(
    index: BlockIndex, rows: Rows, db: Database
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    acknowledged = new_block("a", volume)
    rows.register(3)  # the node restarted between its acknowledgement and the transaction
    assert await index.record_puts([acknowledged]) == [FENCED]
    assert await index.lookup([block_named("a")]) == {}
    assert await index.claimed(ALICE, [block_named("a")]) == set()
    assert (await index.totals()).blocks == 0
    assert debt_rows(db) == []


async def test_a_receipt_of_a_later_incarnation_than_the_table_is_fenced(
    index: BlockIndex, rows: Rows
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    assert await index.record_puts([new_block("a", volume, incarnation=2)]) == [FENCED]


async def test_another_epoch_of_the_volume_is_fenced(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    for epoch in (0, 2):
        assert await index.record_puts([new_block("a", volume)._replace(epoch=epoch)]) == [FENCED]


async def test_a_receipt_from_a_node_that_does_not_hold_the_slot_is_fenced(
    index: BlockIndex, rows: Rows
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    block = new_block("a", volume)
    stranger = (*block.receipts[:3], Receipt(3, NodeId.numbered(9), 1))
    assert await index.record_puts([block._replace(receipts=stranger)]) == [FENCED]
    swapped = (
        *block.receipts[:2],
        Receipt(2, NodeId.numbered(4), 1),
        Receipt(3, NodeId.numbered(3), 1),
    )
    assert await index.record_puts([block._replace(receipts=swapped)]) == [FENCED]


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (1, ()),  # a slot that nobody speaks of
        (0, (3,)),  # a slot both acknowledged and missing
        (1, (3, 4)),  # a slot the scheme does not have
        (1, (2,)),  # the wrong one
    ],
)
async def test_receipts_that_do_not_name_every_slot_once_are_fenced(
    index: BlockIndex, rows: Rows, drop: int, missing: tuple[int, ...]
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    block = new_block("a", volume)
    short = block._replace(receipts=block.receipts[: 4 - drop], missing_slots=missing)
    assert await index.record_puts([short]) == [FENCED]


async def test_a_slot_acknowledged_twice_is_fenced(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    block = new_block("a", volume)
    doubled = block._replace(receipts=(*block.receipts[:3], block.receipts[0]))
    assert await index.record_puts([doubled]) == [FENCED]


async def test_receipts_in_any_order_are_as_good(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    block = new_block("a", volume)
    assert await index.record_puts([block._replace(receipts=block.receipts[::-1])]) == [NEW]


async def test_an_unknown_volume_is_fenced(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    gone = new_block("a", volume)._replace(volume=VolumeId(99))
    assert await index.record_puts([gone]) == [FENCED]


async def test_a_put_that_raced_with_sealing_is_recorded(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    assert await index.record_puts([new_block("a", volume)]) == [NEW]
    rows.seal(volume.volume_id)
    assert rows.volume(volume.volume_id).state is VolumeState.SEALED
    assert await index.record_puts([new_block("b", volume)]) == [NEW]
    assert rows.volume(volume.volume_id).blocks == 2


async def test_a_put_into_a_volume_that_was_removed_empty_is_fenced(
    index: BlockIndex, rows: Rows
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    late = new_block("a", volume)
    rows.seal(volume.volume_id)
    again = rows.open_volume(SMALL, node_ids(4))
    assert again.volume_id > volume.volume_id, "a number is never given out twice"
    assert await index.record_puts([late]) == [FENCED]


async def test_one_fenced_block_does_not_spoil_its_batch(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    batch = [
        new_block("a", volume),
        new_block("b", volume, incarnation=7),
        new_block("c", volume),
        new_block("b", volume, owner=BOB),
    ]
    assert await index.record_puts(batch) == [NEW, FENCED, NEW, NEW]
    assert (await index.totals()).blocks == 3
    assert await index.claimed(ALICE, [block_named("b")]) == set()


async def test_a_block_that_exists_is_not_fenced_by_its_own_receipts(
    index: BlockIndex, rows: Rows
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    assert await index.record_puts([new_block("a", volume)]) == [NEW]
    rows.register(1)
    stale = new_block("a", volume, owner=BOB)
    assert await index.record_puts([stale]) == [EXISTS], "the bytes are durable: as good as a hit"


# -- debts ---------------------------------------------------------------------------------------


async def test_missing_slots_become_debts_in_the_same_transaction(
    index: BlockIndex, rows: Rows, db: Database
) -> None:
    volume = rows.open_volume(RS, node_ids(9))
    assert await index.record_puts([new_block("a", volume, missing=(2, 8))]) == [NEW]
    assert debt_rows(db) == [
        (volume.volume_id, 2, block_named("a")),
        (volume.volume_id, 8, block_named("a")),
    ]
    assert await index.debts() == 2


async def test_vacant_slots_are_missing_slots(index: BlockIndex, rows: Rows, db: Database) -> None:
    volume = rows.open_volume(RS, (*node_ids(8), None))
    assert await index.record_puts([new_block("a", volume)]) == [FENCED], "slot 8 is not accounted"
    assert await index.record_puts([new_block("a", volume, missing=(8,))]) == [NEW]
    assert debt_rows(db) == [(volume.volume_id, 8, block_named("a"))]


async def test_a_loser_leaves_no_debt(index: BlockIndex, rows: Rows, db: Database) -> None:
    volume = rows.open_volume(RS, node_ids(9))
    assert await index.record_puts([new_block("a", volume)]) == [NEW]
    assert await index.record_puts([new_block("a", volume, missing=(2,))]) == [EXISTS]
    assert debt_rows(db) == []


# -- claims --------------------------------------------------------------------------------------


async def test_a_put_claims_for_its_owner_without_a_claim_row(
    index: BlockIndex, rows: Rows, db: Database, clock: HandClock
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await index.record_puts([new_block("a", volume)])
    assert await index.claimed(ALICE, [block_named("a"), block_named("b")]) == {block_named("a")}
    assert await index.claimed(BOB, [block_named("a")]) == set()
    assert claim_rows(db) == []
    clock.now += CLAIM_SECONDS + 1
    assert await index.claimed(ALICE, [block_named("a")]) == set()


async def test_a_claim_lasts_at_least_half_of_its_life_and_then_ends(
    index: BlockIndex, rows: Rows, clock: HandClock
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await index.record_puts([new_block("a", volume)])
    assert await index.claim(BOB, [block_named("a"), block_named("b")]) == {block_named("a")}
    clock.now += CLAIM_SECONDS - 1
    assert await index.claimed(BOB, [block_named("a")]) == {block_named("a")}
    clock.now += 2
    assert await index.claimed(BOB, [block_named("a")]) == set()


async def test_a_young_claim_is_not_written_again_and_an_old_one_is(
    index: BlockIndex, rows: Rows, db: Database, clock: HandClock
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await index.record_puts([new_block("a", volume)])
    await index.claim(BOB, [block_named("a")])
    written = db.stats().transactions
    clock.now += CLAIM_SECONDS / 2 - 1
    assert await index.claim(BOB, [block_named("a")]) == {block_named("a")}
    assert await index.claim(ALICE, [block_named("a")]) == {block_named("a")}
    assert db.stats().transactions == written
    clock.now += 2
    assert await index.claim(BOB, [block_named("a")]) == {block_named("a")}
    assert await index.claim(ALICE, [block_named("a")]) == {block_named("a")}
    assert db.stats().transactions == written + 2
    clock.now += CLAIM_SECONDS / 2 + 10
    both = await index.claimed(ALICE, [block_named("a")]) | await index.claimed(
        BOB, [block_named("a")]
    )
    assert both == {block_named("a")}
    assert claim_rows(db) == [(ALICE, block_named("a")), (BOB, block_named("a"))]


async def test_a_second_put_renews_the_owners_claim_only_when_it_is_old(
    index: BlockIndex, rows: Rows, db: Database, clock: HandClock
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await index.record_puts([new_block("a", volume)])
    assert await index.record_puts([new_block("a", volume)]) == [EXISTS]
    assert claim_rows(db) == []
    clock.now += CLAIM_SECONDS - 10
    assert await index.record_puts([new_block("a", volume)]) == [EXISTS]
    assert claim_rows(db) == [(ALICE, block_named("a"))]
    clock.now += CLAIM_SECONDS / 2
    assert await index.claimed(ALICE, [block_named("a")]) == {block_named("a")}


async def test_a_claim_to_a_block_that_does_not_exist_is_not_given(
    index: BlockIndex, db: Database, rows: Rows
) -> None:
    assert await index.claim(ALICE, [block_named("never")]) == set()
    assert claim_rows(db) == []


# -- many ----------------------------------------------------------------------------------------


async def test_a_batch_of_thousands_is_found_claimed_and_counted(
    index: BlockIndex, rows: Rows
) -> None:
    volumes = [rows.open_volume(SMALL, node_ids(4, first)) for first in (1, 3, 5)]
    entries = [new_block(number, volumes[number % 3]) for number in range(2_000)]
    assert set(await index.record_puts(entries)) == {NEW}
    names = [entry.hash for entry in entries]
    found = await index.lookup([*names, *(block_named(f"absent {n}") for n in range(100))])
    assert {row.hash: row.volume for row in found.values()} == {
        entry.hash: entry.volume for entry in entries
    }
    assert await index.claim(BOB, names) == set(names)
    assert await index.claimed(BOB, names) == set(names)
    assert await index.totals() == Totals(2_000, 2_000 * 4_000, 2_000 * 5_000)
    assert sum(rows.volume(volume.volume_id).blocks for volume in volumes) == 2_000


async def test_repeated_hashes_in_a_lookup_are_answered_once(index: BlockIndex, rows: Rows) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await index.record_puts([new_block("a", volume)])
    assert set(await index.lookup([block_named("a")] * 40)) == {block_named("a")}
    assert await index.claim(BOB, [block_named("a")] * 40) == {block_named("a")}


# -- sharing transactions, with the real writer thread --------------------------------------------


@pytest.fixture
def threaded(tmp_path: Path, clock: HandClock) -> Iterator[Database]:
    directory = tmp_path / "threaded"
    directory.mkdir()
    database = empty_database(directory, inline=False)
    new_cell(database, clock)
    Rows(database).register_all()
    yield database
    database.close()


async def test_concurrent_puts_share_transactions(threaded: Database, clock: HandClock) -> None:
    volume = Rows(threaded).open_volume(SMALL, node_ids(4))
    index = BlockIndex(threaded, clock)
    before = threaded.stats()
    outcomes = await asyncio.gather(
        *(index.record_puts([new_block(number % 90, volume)]) for number in range(100))
    )
    assert sum(outcome == [NEW] for outcome in outcomes) == 90
    assert sum(outcome == [EXISTS] for outcome in outcomes) == 10
    assert threaded.stats().transactions - before.transactions <= 3
    assert (await index.totals()).blocks == 90


async def test_a_caller_that_is_cancelled_takes_nobody_down(
    threaded: Database, clock: HandClock
) -> None:
    volume = Rows(threaded).open_volume(SMALL, node_ids(4))
    index = BlockIndex(threaded, clock)
    calls = [
        asyncio.create_task(index.record_puts([new_block(number, volume)])) for number in range(9)
    ]
    await asyncio.sleep(0)
    calls[4].cancel()
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(done[4], asyncio.CancelledError)
    assert [outcome for outcome in done if outcome == [NEW]] == [[NEW]] * 8
    assert (await index.totals()).blocks == 9, "a put that is cancelled may still be done"


async def test_a_registration_between_two_batches_fences_the_second(
    threaded: Database, clock: HandClock
) -> None:
    """The order of commits decides, not the order of calls: fenced means after the registration."""
    rows = Rows(threaded)
    volume = rows.open_volume(SMALL, node_ids(4))
    index = BlockIndex(threaded, clock)

    def register(connection: Connection) -> None:
        version = map_rows.next_version(connection)
        map_rows.begin_incarnation(connection, registration(2), version)

    async def puts(start: int) -> list[RecordOutcome]:
        outcomes = []
        for number in range(start, start + 20):
            outcomes += await index.record_puts([new_block(number, volume)])
        return outcomes

    many = [asyncio.create_task(puts(100 * number)) for number in range(8)]
    await many[0]
    await threaded.write(register)
    after = await index.record_puts([new_block("late", volume)])
    results = await asyncio.gather(*many)
    assert after == [FENCED]
    for outcomes in results:
        fenced_from = outcomes.index(FENCED) if FENCED in outcomes else len(outcomes)
        assert set(outcomes[:fenced_from]) <= {NEW}
        assert set(outcomes[fenced_from:]) <= {FENCED}
    recorded = sum(outcome is NEW for outcomes in results for outcome in outcomes)
    assert (await index.totals()).blocks == recorded


async def test_a_database_that_is_locked_fails_every_put_of_the_batch_and_records_none(
    threaded: Database, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = Rows(threaded).open_volume(SMALL, node_ids(4))
    index = BlockIndex(threaded, clock)

    async def busy(work: object) -> None:
        raise DatabaseBusy("locked by the test")

    monkeypatch.setattr(threaded, "write", busy)
    calls = (index.record_puts([new_block(number, volume)]) for number in range(5))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DatabaseBusy] * 5
    monkeypatch.undo()
    assert (await index.totals()).blocks == 0
    assert await index.record_puts([new_block(1, volume)]) == [NEW]


async def test_a_put_beyond_the_waiting_limit_is_told_to_come_later(
    threaded: Database, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = Rows(threaded).open_volume(SMALL, node_ids(4))
    monkeypatch.setattr("cluster.block_index.WAITING_BLOCKS_MAX", 4)
    index = BlockIndex(threaded, clock)

    def batch(start: int) -> list[NewBlock]:
        return [new_block(number, volume) for number in range(start, start + 3)]

    calls = [asyncio.create_task(index.record_puts(batch(10 * number))) for number in range(3)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert outcomes[0] == [NEW] * 3
    assert [type(outcome) for outcome in outcomes[1:]] == [Overloaded] * 2
    assert (await index.totals()).blocks == 3
