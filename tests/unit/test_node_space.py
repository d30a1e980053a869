"""Thresholds of a filling disk, and which extents are rewritten for their dead records."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from node_parts import HandClock, fragment_record, node_on

from protocol.errors import NodeFull
from protocol.limits import GIB, MIB
from protocol.messages import ItemStatus, PutPurpose
from storage_node.extents import Family, record_key
from storage_node.interface import FragmentKey
from storage_node.memory_store import Disk, MemoryStore
from storage_node.merge_plan import ExtentFile
from storage_node.node import StorageNode
from storage_node.reclaim import DEAD_SHARE_MIN, dead_records, plan_reclaim
from storage_node.space import SpaceShares, space_of

SHARES = SpaceShares()


def test_clients_stop_at_90_repair_at_95_placement_at_85_percent() -> None:
    def free(used: int) -> tuple[int, int, int]:
        space = space_of(used, 1000 - used, None, 0, SHARES)
        return space.placement_free_bytes, space.client_free_bytes, space.repair_free_bytes

    assert free(0) == (850, 900, 950)
    assert free(850) == (0, 50, 100)
    assert free(900) == (0, 0, 50)
    assert free(950) == (0, 0, 0)


def test_a_reserve_holds_whatever_the_shares_say() -> None:
    space = space_of(0, 10 * GIB, None, 8 * GIB, SHARES)
    assert space.client_free_bytes == space.repair_free_bytes == 2 * GIB


def test_a_limit_is_the_capacity_unless_the_disk_has_less() -> None:
    assert space_of(0, 1000, 500, 0, SHARES).client_free_bytes == 450
    assert space_of(100, 200, 500, 0, SHARES).capacity_bytes == 300


@given(
    used=st.integers(0, 1 << 50),
    left=st.integers(0, 1 << 50),
    limit=st.none() | st.integers(1, 1 << 50),
    reserve=st.integers(0, 1 << 40),
)
def test_repair_always_has_what_clients_have_and_nobody_more_than_the_disk(
    used: int, left: int, limit: int | None, reserve: int
) -> None:
    space = space_of(used, left, limit, reserve, SHARES)
    free = [space.placement_free_bytes, space.client_free_bytes, space.repair_free_bytes]
    assert 0 <= free[0] <= free[1] <= free[2] <= left
    assert space.is_short == (free[0] == 0)


async def fill(node: StorageNode, first: int, purpose: PutPurpose) -> list[FragmentKey]:
    """Put until the node refuses; what it took."""
    stored = []
    for number in itertools.count(first):
        key, record = fragment_record(number, 10_000)
        try:
            await node.put(1, [record], purpose=purpose)
        except NodeFull:
            return stored
        stored.append(key)
    raise AssertionError("unreachable")


async def test_repair_puts_go_on_where_client_puts_are_refused_and_deletes_always() -> None:
    disk = Disk(capacity_bytes=1 * MIB)
    node = node_on(MemoryStore(disk), HandClock())
    await node.lease(1, 1e9)
    stored = await fill(node, 0, PutPurpose.CLIENT)
    assert 0.88 * MIB < disk.used_bytes <= 0.9 * MIB
    assert await fill(node, 1000, PutPurpose.REPAIR)
    assert 0.93 * MIB < disk.used_bytes <= 0.95 * MIB
    space = (await node.summary()).space
    assert (space.client_free_bytes, (await node.summary()).disk_free_bytes) == (0, 0)
    assert await node.delete(1, stored[:20]) == [ItemStatus.OK] * 20
    assert (await node.put(1, [fragment_record(3000, 10_000)[1]])).statuses == [ItemStatus.OK]


def file(number: int, size: int, family: Family = Family.EXTENTS) -> ExtentFile:
    first, last = number * 10, number * 10 + 9
    return ExtentFile(
        family,
        record_key(family, first, bytes(41)),
        record_key(family, last, bytes(41)),
        size,
        f"{number}",
    )


def test_dead_bytes_are_those_between_a_files_first_and_last_key() -> None:
    files = [file(1, 100), file(2, 100), file(9, 100, Family.SMALL)]
    marks = [
        (record_key(Family.EXTENTS, sequence, bytes(41)), length)
        for sequence, length in ((3, 1), (10, 2), (19, 4), (20, 8), (40, 16))
    ] + [(record_key(Family.SMALL, 95, bytes(41)), 32)]
    assert dead_records(files, marks) == (
        {"1": 6, "2": 8, "9": 32},
        [record_key(Family.EXTENTS, sequence, bytes(41)) for sequence in (3, 40)],
    )


def plan(files: list[ExtentFile], dead: dict[str, int], **options: int) -> list[str]:
    found = plan_reclaim(
        files,
        dead,
        options.get("budget", 256 * MIB),
        room_bytes=options.get("room", GIB),
        share_min=DEAD_SHARE_MIN,
        skip=set(),
    )
    return [] if found is None else [file.name for file in found.files]


def test_the_deadest_run_is_rewritten_and_a_lively_file_is_not() -> None:
    files = [file(n, 100 * MIB) for n in range(5)]
    assert plan(files, {"0": 30 * MIB, "2": 60 * MIB, "3": 90 * MIB}) == ["2", "3"]
    assert plan(files, {"1": 10 * MIB}) == []


def test_a_rewrite_fits_its_budget_and_the_room_that_is_left() -> None:
    files = [file(n, 200 * MIB) for n in range(3)]
    assert plan(files, {"0": 100 * MIB, "1": 120 * MIB}) == ["1"]
    assert plan(files, {"0": 200 * MIB, "1": 120 * MIB}, room=1 * MIB) == ["0"]
    assert plan(files, {"1": 120 * MIB}, room=1 * MIB) == []
