"""Gets: the exact bytes from any k good slots, soon; or an error that says why; never others."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from block_cell import OWNER, BlockCell, data_of, simulate

from cluster.block_client_settings import ProblemKind
from cluster.node_pool import HEDGE_COLD_S, Direction
from cluster.topology import NodeState
from erasure.codec import Codec
from erasure.envelope import seal
from erasure.fragment import FRAGMENT_HEADER_BYTES, pack_header, parse
from erasure.scheme import Scheme
from erasure.stripe import make_stripe
from protocol.errors import BlockNotFound, BlockUnreadable, DatabaseBusy, Overloaded
from protocol.hashing import hash_block
from protocol.ids import NodeId
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey

RS = Scheme.parse("rs-6-3")
REPLICA = RS.small_twin()


async def slots_of(cell: BlockCell, data: bytes) -> tuple[NodeId, ...]:
    """The nodes of a block's volume, by slot."""
    row = (await cell.index.lookup([hash_block(data)]))[hash_block(data)]
    await cell.map.refresh()
    volume = await cell.map.volume(row.volume)
    assert all(volume.slots)
    return tuple(node_id for node_id in volume.slots if node_id is not None)


# -- healthy -----------------------------------------------------------------------------------


def test_a_healthy_get_asks_the_data_slots_and_nobody_else() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(1)
        await cell.put(data)
        slots = await slots_of(cell, data)
        cell.calls.clear()
        assert await cell.get(data) == data
        assert sorted(cell.calls) == sorted(f"get {node}" for node in slots[:6])

    simulate(main)


def test_a_block_that_does_not_exist_is_not_found() -> None:
    async def main(cell: BlockCell) -> None:
        with pytest.raises(BlockNotFound):
            await cell.get(b"never stored")
        assert cell.calls == []

    simulate(main)


def test_reads_of_replicas_spread_over_all_copies() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(2, 1_000)
        await cell.put(data)
        cell.calls.clear()
        for _ in range(400):
            assert await cell.get(data) == data
        counts = Counter(cell.calls)
        assert len(counts) == REPLICA.n
        assert min(counts.values()) > 60

    simulate(main)


def test_the_index_is_asked_once_for_a_block_that_is_read_often() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(3))
        pool, client = cell.new_client(5)
        asked: list[Any] = []
        lookup = client._index.lookup

        async def counting(hashes: Any) -> Any:
            asked.extend(hashes)
            return await lookup(hashes)

        client._index.lookup = counting  # type: ignore[method-assign]
        for _ in range(5):
            assert await client.get(hash_block(data_of(3))) == data_of(3)
        assert asked == [hash_block(data_of(3))]
        await pool.aclose()

    simulate(main)


# -- lost nodes --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 200_000])
def test_one_node_too_many_is_unreadable_with_a_reason_for_each_slot(size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(4, size)
        await cell.put(data)
        slots = await slots_of(cell, data)
        scheme = RS if len(slots) == 9 else REPLICA
        cell.kill(*slots[: scheme.m + 1])
        with pytest.raises(BlockUnreadable) as caught:
            await cell.get(data)
        details = caught.value.details
        assert details["needed"] == scheme.k
        assert details["good"] == scheme.k - 1
        assert [item["slot"] for item in details["slots"]] == list(range(scheme.m + 1))
        assert {item["kind"] for item in details["slots"]} == {"node_unavailable"}
        cell.heal()
        assert await cell.get(data) == data, "suspected nodes are tried last, not never"

    simulate(main)


def test_a_read_waits_a_moment_for_nodes_that_are_coming_back() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(5)
        await cell.put(data)
        cell.kill(*(await slots_of(cell, data))[:4])
        task = asyncio.ensure_future(cell.get(data))
        await asyncio.sleep(0.02)
        cell.heal()
        assert await task == data

    simulate(main)


def test_nodes_that_all_restarted_elsewhere_are_found_through_the_map() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(6)
        await cell.put(data)
        await cell.get(data)
        for node_id in cell.node_ids:
            await cell.start_node(node_id)
        assert await timed(cell, data) == 0.0, "the map is asked at once, without a pause"

    simulate(main)


def test_nodes_that_the_map_calls_down_are_not_asked_while_others_suffice() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(7)
        await cell.put(data)
        down = (await slots_of(cell, data))[0]
        cell.set_state(down, NodeState.DOWN)
        await asyncio.sleep(2 * cell.settings.map_age_s)
        cell.calls.clear()
        assert await cell.get(data) == data
        assert f"get {down}" not in cell.calls

    simulate(main)


def test_a_get_goes_on_while_the_database_is_away() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(8)
        await cell.put(data)
        await cell.get(data)
        await asyncio.sleep(10)

        async def busy(*_: Any) -> Any:
            raise DatabaseBusy("locked")

        cell.db.read = busy  # type: ignore[method-assign]
        cell.kill(cell.node_ids[1])
        assert await cell.get(data) == data

    simulate(main)


def test_a_volume_that_moved_is_followed() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(9)
        cell.open_volume(RS, cell.node_ids[:9])
        await cell.put(data)
        assert await cell.get(data) == data
        await cell.move_slots(hash_block(data), dict(zip((0, 3), cell.node_ids[9:], strict=False)))
        assert await cell.get(data) == data
        await cell.move_slots(hash_block(data), dict(enumerate(cell.node_ids[11:], start=4)))
        assert await cell.get(data) == data
        assert cell.problems == [], "our map was old; nothing is wrong with the fragments"

    simulate(main, nodes=16, volumes=0)


def test_a_block_that_left_the_index_is_not_found_although_its_row_was_cached() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(10)
        await cell.put(data)
        assert await cell.get(data) == data
        cell.remove_block(hash_block(data))
        with pytest.raises(BlockNotFound):
            await cell.get(data)

    simulate(main)


# -- bad fragments -----------------------------------------------------------------------------


def flip(position: float) -> Callable[[bytes], bytes]:
    def tamper(record: bytes) -> bytes:
        index = min(int(len(record) * position), len(record) - 1)
        return record[:index] + bytes([record[index] ^ 1]) + record[index + 1 :]

    return tamper


TAMPERS = {
    "first byte": flip(0.0),
    "header": flip(0.0001),
    "middle": flip(0.5),
    "last byte": flip(1.0),
    "truncated by one": lambda record: record[:-1],
    "empty": lambda record: b"",
    "one more byte": lambda record: record + b"\0",
    "zeros": lambda record: bytes(len(record)),
    "header only": lambda record: record[:FRAGMENT_HEADER_BYTES],
}


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize("name", TAMPERS)
def test_a_damaged_fragment_is_replaced_and_reported(name: str, size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(11, size)
        await cell.put(data)
        slots = await slots_of(cell, data)
        for node_id in slots[: len(slots) // 3]:
            cell.faults[node_id].tamper = TAMPERS[name]
        for _ in range(12):
            assert await cell.get(data) == data
        assert {problem.kind for problem in cell.problems} == {ProblemKind.CORRUPT}
        assert {problem.node_id for problem in cell.problems} == set(slots[: len(slots) // 3])

    simulate(main)


def test_fragments_of_another_block_or_slot_are_refused() -> None:
    async def main(cell: BlockCell) -> None:
        data, other = data_of(12), data_of(13)
        volume = cell.open_volume(RS, cell.node_ids)
        await cell.put(data)
        await cell.put(other)
        keys = [FragmentKey(volume, hash_block(block), 2) for block in (data, other)]
        cell.exchange(cell.node_ids[2], keys[0], keys[1])
        elsewhere = FragmentKey(volume, hash_block(data), 5)
        (foreign,) = cell.stores[cell.node_ids[5]].get_many([elsewhere])
        assert foreign.record is not None
        own = FragmentKey(volume, hash_block(data), 4)
        cell.stores[cell.node_ids[4]].put_group([(own, foreign.record)])
        assert await cell.get(data) == data
        found = [(problem.kind, problem.slot) for problem in cell.problems]
        assert sorted(found) == [(ProblemKind.CORRUPT, 2), (ProblemKind.CORRUPT, 4)]

    simulate(main, volumes=0)


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (ItemStatus.NOT_FOUND, ProblemKind.MISSING),
        (ItemStatus.CORRUPT, ProblemKind.CORRUPT),
        (ItemStatus.IO_ERROR, ProblemKind.IO_ERROR),
    ],
)
def test_what_a_node_says_about_a_fragment_reaches_repair(
    status: ItemStatus, kind: ProblemKind, size: int
) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(14, size)
        await cell.put(data)
        bad = (await slots_of(cell, data))[0]
        cell.faults[bad].get_status = status
        for _ in range(20):
            assert await cell.get(data) == data
        assert {(problem.kind, problem.node_id) for problem in cell.problems} == {(kind, bad)}
        assert cell.pool.suspected(Direction.READ) == ()

    simulate(main)


def lie(record: bytes) -> bytes:
    """Other bytes with checksums, identity and stripe tag that are all in order."""
    fragment = parse(record)
    payload = bytes(byte ^ 0x55 for byte in fragment.payload)
    header = bytearray(record[:FRAGMENT_HEADER_BYTES])
    made = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        fragment.epoch,
        fragment.stored_length,
        payload,
        *tuple(fragment)[7:],
    )
    assert len(made) == len(header)
    return made + payload


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize("liars", [1, 2])
def test_a_node_that_lies_consistently_is_found_out_and_named(liars: int, size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(15, size)
        await cell.put(data)
        slots = await slots_of(cell, data)
        for node_id in slots[:liars]:
            cell.faults[node_id].tamper = lie
        for _ in range(10):
            assert await cell.get(data) == data
        assert {problem.kind for problem in cell.problems} == {ProblemKind.LIAR}
        assert {problem.node_id for problem in cell.problems} == set(slots[:liars])

    simulate(main)


def forge(record: bytes) -> bytes:
    """A perfect record of other bytes of the same length, sealed by the book."""
    fragment = parse(record)
    stored = seal((bytes(fragment.stored_length - 64),), 936, keyring=None, compress=False)
    return b"".join(
        make_stripe(
            Codec(), fragment.scheme, fragment.block, fragment.volume, fragment.epoch, stored
        )[fragment.slot]
    )


def test_a_perfect_forgery_of_a_small_block_fails_its_hash() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(26, 936)
        await cell.put(data)
        slots = await slots_of(cell, data)
        for node_id in slots[:3]:
            cell.faults[node_id].tamper = forge
        for _ in range(10):
            assert await cell.get(data) == data
            assert await get_all(cell, [data]) == [data]
        assert {problem.node_id for problem in cell.problems} == set(slots[:3])
        cell.faults[slots[3]].tamper = forge
        with pytest.raises(BlockUnreadable):
            await cell.get(data)

    simulate(main)


def test_when_every_node_lies_nothing_is_served() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(16)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.tamper = lie
        with pytest.raises(BlockUnreadable):
            await cell.get(data)

    simulate(main)


def test_a_lie_and_a_lost_node_together_are_survived() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(17)
        await cell.put(data)
        slots = await slots_of(cell, data)
        cell.kill(slots[0])
        cell.faults[slots[1]].tamper = lie
        assert await cell.get(data) == data
        assert [problem.slot for problem in cell.problems] == [1]

    simulate(main)


# -- slow nodes --------------------------------------------------------------------------------


async def timed(cell: BlockCell, data: bytes) -> float:
    started = cell.clock.monotonic()
    assert await cell.get(data) == data
    return cell.clock.monotonic() - started


def test_a_slow_slot_is_hedged_at_the_p95_of_its_node() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(18)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: cell.rng.uniform(0.02, 0.03)
        for _ in range(100):
            await cell.get(data)
        slow = (await slots_of(cell, data))[3]
        cell.faults[slow].delay_s = lambda: 3.0
        cell.calls.clear()
        assert await timed(cell, data) < 0.08
        assert len(cell.calls) <= 8

    simulate(main)


def test_a_cold_client_hedges_too() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(19)
        await cell.put(data)
        cell.faults[(await slots_of(cell, data))[0]].is_stopped = True
        assert await timed(cell, data) < 2 * HEDGE_COLD_S

    simulate(main)


def test_as_many_slow_slots_as_there_is_parity_are_hedged() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(20)
        await cell.put(data)
        for node_id in (await slots_of(cell, data))[:3]:
            cell.faults[node_id].delay_s = lambda: 4.0
        assert await timed(cell, data) < 2 * HEDGE_COLD_S

    simulate(main)


def test_a_stopped_node_is_left_alone_after_a_few_hedges() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(21)
        await cell.put(data)
        stopped = (await slots_of(cell, data))[2]
        cell.faults[stopped].is_stopped = True
        for _ in range(10):
            await cell.get(data)
            await asyncio.sleep(0.2)
        assert cell.pool.is_suspected(stopped, Direction.READ)
        cell.calls.clear()
        for _ in range(20):
            assert await timed(cell, data) < 0.01
        assert f"get {stopped}" not in cell.calls

    simulate(main)


def test_slow_everywhere_is_no_reason_to_give_up() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(22)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: 2.0
        assert await timed(cell, data) < 3.0

    simulate(main)


def test_all_stopped_ends_at_the_deadline() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(23)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.is_stopped = True
        started = cell.clock.monotonic()
        with pytest.raises(BlockUnreadable):
            await cell.get(data)
        assert cell.clock.monotonic() - started <= cell.settings.get_s + 0.1

    simulate(main)


def test_a_mistake_of_ours_in_one_slot_is_raised_and_leaves_nothing_behind() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(27)
        await cell.put(data)
        cell.faults[(await slots_of(cell, data))[3]].refuses = ZeroDivisionError("a mistake")
        with pytest.raises(ZeroDivisionError):
            await cell.get(data)
        with pytest.raises(ZeroDivisionError):
            await cell.client.get_many([hash_block(data)])

    simulate(main)


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.2, 0.3, 0.6])
def test_a_cancelled_get_leaves_nothing_running(after_s: float) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(24)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: cell.rng.uniform(0.1, 1.0)
        task = asyncio.ensure_future(cell.get(data))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert cell.client._get_budget.free == cell.settings.get_bytes_max

    simulate(main)


def test_gets_beyond_the_memory_budget_wait_their_turn_or_are_refused() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(25)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: 0.2
        results = await asyncio.gather(*(cell.get(data) for _ in range(10)), return_exceptions=True)
        assert Counter(type(result) for result in results) == {bytes: 4, Overloaded: 6}

    simulate(main, get_bytes_max=800_512, queue_s=0.3)


# -- many at once ------------------------------------------------------------------------------


async def put_all(cell: BlockCell, blocks: list[bytes]) -> None:
    await cell.client.put_many(OWNER, [(hash_block(block), block) for block in blocks])
    cell.calls.clear()


async def get_all(cell: BlockCell, blocks: list[bytes]) -> list[Any]:
    found = await cell.client.get_many([hash_block(block) for block in blocks])
    return [item if isinstance(item, Exception) else bytes(item) for item in found]


def test_many_blocks_are_one_frame_from_each_node() -> None:
    async def main(cell: BlockCell) -> None:
        small = [data_of(number, 1_000) for number in range(200)]
        large = [data_of(number, 140_000) for number in range(10)]
        await put_all(cell, small + large)
        assert await get_all(cell, large + small) == large + small
        assert len(cell.calls) == len(set(cell.calls)) <= 9

    simulate(main, volumes=1)


def test_repeated_and_unknown_blocks_of_a_batch_each_get_their_answer() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000) for number in range(3)]
        await put_all(cell, blocks)
        answers = await get_all(cell, [blocks[2], b"unknown", blocks[0], blocks[2]])
        assert [answers[0], answers[2], answers[3]] == [blocks[2], blocks[0], blocks[2]]
        assert isinstance(answers[1], BlockNotFound)

    simulate(main)


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_a_batch_survives_dead_nodes(dead: int) -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 900 if number % 10 else 150_000) for number in range(100)]
        await put_all(cell, blocks)
        cell.kill(*cell.rng.sample(cell.node_ids, dead))
        assert await get_all(cell, blocks) == blocks

    simulate(main)


def test_a_batch_gives_what_it_can_and_an_error_for_the_rest() -> None:
    async def main(cell: BlockCell) -> None:
        cell.open_volume(REPLICA, cell.node_ids[:4])
        lost = [data_of(number, 1_000) for number in range(5)]
        await put_all(cell, lost)
        cell.seal_volume(cell.volumes_opened[-1])
        cell.open_volume(REPLICA, cell.node_ids[4:8])
        await asyncio.sleep(2 * cell.settings.map_age_s)
        good = [data_of(number, 1_000) for number in range(5, 10)]
        await put_all(cell, good)
        cell.kill(*cell.node_ids[:4])
        answers = await get_all(cell, lost + good)
        assert answers[5:] == good
        assert [type(answer) for answer in answers[:5]] == [BlockUnreadable] * 5

    simulate(main, nodes=8, volumes=0)


@pytest.mark.parametrize("tamper", [lie, flip(0.5)], ids=["lie", "flip"])
def test_a_batch_with_bad_fragments_is_read_around_them_and_reports_them(
    tamper: Callable[[bytes], bytes],
) -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 900 if number % 4 else 150_000) for number in range(40)]
        await put_all(cell, blocks)
        bad = cell.node_ids[0]
        cell.faults[bad].tamper = tamper
        for _ in range(3):
            assert await get_all(cell, blocks) == blocks
        assert {problem.node_id for problem in cell.problems} == {bad}

    simulate(main)


def test_a_slow_node_does_not_hold_a_batch_up() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 900 if number % 10 else 150_000) for number in range(100)]
        await put_all(cell, blocks)
        cell.faults[cell.node_ids[5]].delay_s = lambda: 4.0
        started = cell.clock.monotonic()
        assert await get_all(cell, blocks) == blocks
        assert cell.clock.monotonic() - started < 1.5

    simulate(main)


def test_lengths_of_known_blocks_without_reading_them() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000 + number) for number in range(3)]
        await put_all(cell, blocks)
        hashes = [hash_block(block) for block in blocks]
        lengths = await cell.client.lengths([*hashes, hash_block(b"unknown")])
        assert lengths == dict(zip(hashes, (1_000, 1_001, 1_002), strict=True))
        assert cell.calls == []

    simulate(main)


def test_one_seed_gives_one_history() -> None:
    def history() -> list[str]:
        calls: list[str] = []

        async def main(cell: BlockCell) -> None:
            for faults in cell.faults.values():
                faults.delay_s = lambda: cell.rng.expovariate(20)
            blocks = [data_of(number, 900 if number % 2 else 150_000) for number in range(12)]
            await asyncio.gather(*(cell.put(block) for block in blocks))
            cell.kill(cell.node_ids[1])
            await asyncio.gather(*(cell.get(block) for block in blocks))
            await cell.client.get_many([hash_block(block) for block in blocks])
            calls.extend(
                f"{at:.9f} {call}" for at, call in zip(cell.call_times, cell.calls, strict=True)
            )

        simulate(main, seed=random.Random(3).randrange(1000))
        return calls

    assert history() == history()
