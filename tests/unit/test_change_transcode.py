"""Blocks written anew in another scheme: identical, whole, and readable all the while."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from block_cell import BlockCell, data_of, run_inline, simulate
from repair_cell import assert_whole, new_repair, volumes_of
from sqlalchemy import select

from cluster import map_rows
from cluster.change import requests
from cluster.change.jobs import Job, JobState, read_job
from cluster.change.requests import parse_request
from cluster.change.runner import JobRunner
from cluster.change.transcode import TranscodeParts
from cluster.schema import volumes
from erasure.scheme import Scheme
from protocol.errors import HaversackError
from protocol.hashing import hash_block
from protocol.ids import VolumeId
from storage_node.interface import FragmentKey

NEW = Scheme.rs(4, 2)


async def fill(cell: BlockCell, blocks: int = 14) -> list[bytes]:
    """Large blocks in sealed volumes of the old scheme; open volumes of the new one."""
    data = [data_of(seed, 150_000) for seed in range(blocks)]
    for item in data:
        await cell.put(item)
    for volume in cell.volumes_opened:
        cell.seal_volume(volume)
    cell.open_volume(NEW)
    cell.open_volume(NEW)
    return data


@contextlib.asynccontextmanager
async def running(cell: BlockCell) -> AsyncIterator[None]:
    service = new_repair(cell)
    await service.start()
    parts = TranscodeParts(
        cell.db,
        cell.clock,
        random.Random(3),
        cell._connect,
        cell.codec,
        cell.keyring,
        run_inline,
        cell.settings,
    )
    runner = JobRunner(cell.db, cell.clock, service.lead, service.executor, run_inline, parts.work)
    task = asyncio.get_running_loop().create_task(runner.run())
    try:
        yield
    finally:
        runner.stop()
        await task
        await parts.aclose()
        await service._pool.aclose()


def submit(cell: BlockCell, **fields: Any) -> Job:
    request = parse_request("transcode", {"from": cell.scheme.name, "to": NEW.name, **fields})
    return cell.db.transact(lambda c: requests.submit(c, request, cell.clock.wall()))


def now(cell: BlockCell, job: Job) -> Job:
    return cell.db.read_now(lambda c: read_job(c, job.job_id))


async def ended(cell: BlockCell, job: Job, seconds: float = 300.0) -> Job:
    deadline = cell.clock.monotonic() + seconds
    while now(cell, job).state in (JobState.PLANNED, JobState.RUNNING):
        assert cell.clock.monotonic() < deadline, f"not done in time: {now(cell, job)}"
        await cell.clock.sleep(0.2)
    return now(cell, job)


def schemes(cell: BlockCell) -> set[Scheme]:
    return {volume.scheme for volume in volumes_of(cell, cell.all_rows()).values()}


def assert_counters_are_right(cell: BlockCell) -> None:
    """Every volume's counters are the sums over its rows."""
    sums: dict[int, list[int]] = {}
    for row in cell.all_rows():
        total = sums.setdefault(row.volume, [0, 0, 0])
        total[0] += 1
        total[1] += row.stored_bytes
        total[2] += row.plain_bytes
    query = select(
        volumes.c.volume_id, volumes.c.blocks, volumes.c.stored_bytes, volumes.c.plain_bytes
    )
    for volume, *found in cell.db.read_now(lambda c: c.execute(query).all()):
        assert found == sums.get(volume, [0, 0, 0]), f"counters of v{volume}"


def test_every_block_is_whole_in_the_new_scheme_and_old_volumes_are_gone() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        old = {row.volume for row in cell.all_rows()}
        assert schemes(cell) == {cell.scheme}
        async with running(cell):
            job = await ended(cell, submit(cell))
        assert job.state is JobState.DONE
        assert job.progress.done_units == job.progress.total_units == len(old)
        assert schemes(cell) == {NEW}
        assert_whole(cell)
        assert_counters_are_right(cell)
        assert cell.db.read_now(lambda c: map_rows.read_volumes(c, old)) == []
        for item in data:
            assert await cell.get(item) == item

    simulate(main, nodes=12)


def test_a_gateway_with_old_rows_reads_on_while_and_after_even_without_old_fragments() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        pool, stale = cell.new_client(seed=9)
        before = cell.all_rows()
        for item in data:
            assert await stale.get(hash_block(item)) == item  # rows and volumes are cached now
        reads = 0

        async def read_on() -> None:
            nonlocal reads
            while True:
                item = data[reads % len(data)]
                assert await stale.get(hash_block(item)) == item
                reads += 1
                await cell.clock.sleep(0.01)

        async with running(cell):
            reading = asyncio.get_running_loop().create_task(read_on())
            job = await ended(cell, submit(cell))
            assert job.state is JobState.DONE
            assert not reading.done()
            reading.cancel()
            await asyncio.wait([reading])
        assert reads > 10
        for row in before:
            for store in cell.stores.values():
                store.delete_group([FragmentKey(row.volume, row.hash, slot) for slot in range(9)])
        for item in data:
            assert await stale.get(hash_block(item)) == item
        fresh_pool, fresh = cell.new_client(seed=10)
        found = await fresh.get_many([hash_block(item) for item in data])
        assert [bytes(each) for each in found if not isinstance(each, HaversackError)] == data
        await pool.aclose()
        await fresh_pool.aclose()

    simulate(main, nodes=12)


def test_a_row_whose_volume_is_not_known_any_more_is_looked_up_again() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell, 4)
        pool, stale = cell.new_client(seed=9)
        for item in data:
            await stale.lengths([hash_block(item)])  # rows are cached, volumes are not
        async with running(cell):
            await ended(cell, submit(cell))
        for item in data:
            assert await stale.get(hash_block(item)) == item
        found = await stale.get_many([hash_block(item) for item in data])
        assert not any(isinstance(each, HaversackError) for each in found)
        await pool.aclose()

    simulate(main, nodes=12)


def test_a_block_that_is_deleted_meanwhile_stays_deleted_and_others_move() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = hash_block(data[5])
        for faults in cell.faults.values():
            faults.delay_s = lambda: 0.3
        async with running(cell):
            job = submit(cell)
            await cell.clock.sleep(2.0)
            row = (await cell.index.lookup([victim])).get(victim)
            assert row is not None
            cell.db.transact(
                lambda c: c.exec_driver_sql(
                    "UPDATE volumes SET blocks = blocks - 1, stored_bytes = stored_bytes - ?, "
                    "plain_bytes = plain_bytes - ? WHERE volume_id = ?",
                    (row.stored_bytes, row.plain_bytes, int(row.volume)),
                )
            )
            cell.remove_block(victim)
            assert (await ended(cell, job)).state is JobState.DONE
        assert victim not in {row.hash for row in cell.all_rows()}
        assert schemes(cell) == {NEW}
        assert_whole(cell)
        assert_counters_are_right(cell)

    simulate(main, nodes=12)


def test_a_block_put_again_meanwhile_has_one_row_and_reads_back() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        async with running(cell):
            job = submit(cell)
            while now(cell, job).state is not JobState.DONE:
                results = [await cell.put(item, owner=8) for item in data]
                assert not any(result.new for result in results)
                await cell.clock.sleep(0.05)
        assert len(cell.all_rows()) == len(data)
        assert_whole(cell)
        assert_counters_are_right(cell)

    simulate(main, nodes=12)


def test_nothing_moves_while_the_new_scheme_has_no_whole_volume() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell, 4)
        before = cell.all_rows()
        for volume in cell.volumes_opened[-2:]:
            cell.seal_volume(volume)
        async with running(cell):
            job = submit(cell)
            await cell.clock.sleep(100.0)
            waiting = now(cell, job)
            assert waiting.state is JobState.RUNNING
            assert "no open rs-4-2 volume" in waiting.progress.blockers[0].reason
            assert waiting.progress.blockers[0].blocks
            assert cell.all_rows() == before
            cell.open_volume(NEW)
            assert (await ended(cell, job)).state is JobState.DONE
        assert_whole(cell)
        for item in data:
            assert await cell.get(item) == item

    simulate(main, nodes=12)


def test_with_for_new_gateways_write_the_new_scheme_and_no_old_volume_is_left() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        left: VolumeId = cell.open_volume(cell.scheme)
        cell.open_volume(NEW.small_twin())
        old = data_of(500, 150_000)
        await cell.put(old)
        async with running(cell):
            job = submit(cell, for_new=True)
            await cell.clock.sleep(2.0)
            new = data_of(501, 150_000)
            await cell.put(new)
            row = await cell.row_of(new)
            assert row is not None
            assert volumes_of(cell, [row])[row.volume].scheme == NEW
            assert now(cell, job).state is JobState.RUNNING
            await cell.clock.sleep(20.0)
            assert [blocker.volume for blocker in now(cell, job).progress.blockers] == [str(left)]
            cell.seal_volume(left)  # as placement does with the volumes of a retired scheme
            assert (await ended(cell, job)).state is JobState.DONE
        assert schemes(cell) == {NEW}
        assert_whole(cell)
        assert await cell.get(old) == old

    simulate(main, nodes=12)
