"""Jobs carried out over real nodes, SQL and bytes: to their end, paused, cancelled, restarted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from block_cell import BlockCell, data_of, run_inline, simulate
from repair_cell import assert_whole, moves, new_repair, volumes_of

from cluster.change import requests
from cluster.change.jobs import Job, JobEvent, JobState, job_json, read_job
from cluster.change.requests import parse_request
from cluster.change.runner import JobRunner
from cluster.repair.service import RepairService
from cluster.topology import NodeState
from protocol.ids import NodeId

GONE = NodeId("node-02")


async def fill(cell: BlockCell, blocks: int = 12) -> list[bytes]:
    """Large and small blocks, all in sealed volumes."""
    data = [data_of(seed, 150_000) for seed in range(blocks)]
    data += [data_of(100 + seed, 3_000) for seed in range(blocks)]
    for item in data:
        await cell.put(item)
    for volume in cell.volumes_opened:
        cell.seal_volume(volume)
    return data


def open_on_first_nine(cell: BlockCell, volumes: int) -> None:
    """Volumes of both schemes; the nodes beyond the ninth stay empty."""
    for scheme in (cell.scheme, cell.scheme.small_twin()):
        for _ in range(volumes):
            cell.open_volume(scheme, tuple(cell.rng.sample(cell.node_ids[:9], scheme.n)))


@contextlib.asynccontextmanager
async def running(
    cell: BlockCell, told: list[str] | None = None, **settings: Any
) -> AsyncIterator[JobRunner]:
    """A repair process with its role, and a runner in it."""
    service = new_repair(cell, **settings)
    await service.start()

    async def members_changed() -> None:
        if told is not None:
            told.append("members changed")

    runner = _runner(cell, service, members_changed)
    task = asyncio.get_running_loop().create_task(runner.run())
    try:
        yield runner
    finally:
        runner.stop()
        await task
        await service._pool.aclose()


def _runner(cell: BlockCell, service: RepairService, told: Any) -> JobRunner:
    return JobRunner(
        cell.db, cell.clock, service.lead, service.executor, run_inline, members_changed=told
    )


def submit(cell: BlockCell, kind: str, **fields: Any) -> Job:
    request = parse_request(kind, fields)
    return cell.db.transact(lambda c: requests.submit(c, request, cell.clock.wall()))


def act(cell: BlockCell, job: Job, event: JobEvent) -> None:
    cell.db.transact(lambda c: requests.act(c, job.job_id, event, cell.clock.wall()))


def now(cell: BlockCell, job: Job) -> Job:
    return cell.db.read_now(lambda c: read_job(c, job.job_id))


def slow_down(cell: BlockCell) -> None:
    """Nodes take a while, so that a test can come in between."""
    for faults in cell.faults.values():
        faults.delay_s = lambda: 0.4


async def until(cell: BlockCell, holds: Callable[[], bool], seconds: float = 600.0) -> None:
    """Virtual time passes until `holds()`."""
    deadline = cell.clock.monotonic() + seconds
    while not holds():
        assert cell.clock.monotonic() < deadline, "not within the time that it should take"
        await cell.clock.sleep(0.2)


async def ended(cell: BlockCell, job: Job) -> Job:
    await until(cell, lambda: now(cell, job).state not in (JobState.PLANNED, JobState.RUNNING))
    return now(cell, job)


def holders(cell: BlockCell) -> set[NodeId]:
    found = volumes_of(cell, cell.all_rows()).values()
    return {node_id for volume in found for node_id in volume.slots if node_id is not None}


def state_of(cell: BlockCell, node_id: NodeId) -> NodeState:
    return cell.rows.node(cell._number(node_id)).state


def test_a_drained_node_holds_nothing_and_every_block_is_whole_elsewhere() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        assert GONE in holders(cell)
        async with running(cell):
            job = await ended(cell, submit(cell, "drain", node=str(GONE)))
        assert job.state is JobState.DONE
        assert job.progress.done_units == job.progress.total_units > 0
        assert job.progress.done_bytes == job.progress.total_bytes > 0
        assert state_of(cell, GONE) is NodeState.DRAINED
        assert GONE not in holders(cell)
        assert_whole(cell)
        for item in data:
            assert await cell.get(item) == item

    simulate(main, nodes=12)


def test_a_decommissioned_node_is_gone_and_the_controller_is_told() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        told: list[str] = []
        async with running(cell, told):
            job = await ended(cell, submit(cell, "decommission", node=str(GONE)))
            await until(cell, lambda: len(told) == 2)
        assert job.state is JobState.DONE
        assert "left as it is" in job.progress.detail
        assert state_of(cell, GONE) is NodeState.GONE
        assert_whole(cell)

    simulate(main, nodes=12)


def test_a_dead_disk_is_replaced_by_rebuilding_onto_the_new_one() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        new = NodeId("node-12")
        cell.kill(GONE)
        cell.set_state(GONE, NodeState.DOWN)
        held = [v for v in volumes_of(cell, cell.all_rows()).values() if GONE in v.slots]
        fits = [v for v in held if new not in v.slots]
        async with running(cell):
            job = submit(cell, "replace", node=str(GONE), target=str(new))
            await until(cell, lambda: now(cell, job).progress.done_units == len(fits))
            if len(fits) < len(held):
                blocked = now(cell, job).progress.blockers
                assert {b.volume for b in blocked} == {
                    str(v.volume_id) for v in held if new in v.slots
                }
                assert "hold another slot" in blocked[0].reason
        after = volumes_of(cell, cell.all_rows())
        assert all(new in after[volume.volume_id].slots for volume in held)
        for item in data:
            assert await cell.get(item) == item

    simulate(main, nodes=12)


def test_a_rebalance_fills_new_nodes_and_is_done() -> None:
    async def main(cell: BlockCell) -> None:
        idle = cell.node_ids[9:]
        open_on_first_nine(cell, 12)
        await fill(cell, 24)
        assert not set(idle) & holders(cell)
        async with running(cell):
            job = await ended(cell, submit(cell, "rebalance"))
        assert job.state is JobState.DONE
        assert job.progress.done_units > 0
        assert set(idle) <= holders(cell)
        assert_whole(cell)

    simulate(main, nodes=12, volumes=0)


def test_a_job_without_targets_says_what_blocks_it_and_goes_on_when_a_node_comes() -> None:
    async def main(cell: BlockCell) -> None:
        spare = cell.node_ids[-1]
        open_on_first_nine(cell, 3)
        await fill(cell)
        cell.set_state(spare, NodeState.DOWN)
        async with running(cell):
            job = submit(cell, "drain", node=str(GONE))
            await until(cell, lambda: len(now(cell, job).progress.blockers) > 0)
            await cell.clock.sleep(60)
            blocked = now(cell, job)
            assert blocked.state is JobState.RUNNING
            assert job_json(blocked)["eta_s"] is None
            assert blocked.progress.done_units < blocked.progress.total_units
            assert any("8 hold another slot" in b.reason for b in blocked.progress.blockers)
            cell.set_state(spare, NodeState.UP)
            assert (await ended(cell, job)).state is JobState.DONE
        assert now(cell, job).progress.blockers == ()
        assert_whole(cell)

    simulate(main, nodes=10, volumes=0)


def test_open_volumes_are_waited_for() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        volume = cell.open_volume(cell.scheme, tuple(cell.node_ids[:9]))
        item = data_of(77)
        await cell.put(item)
        async with running(cell):
            job = submit(cell, "drain", node=str(GONE))
            await until(cell, lambda: now(cell, job).progress.detail.startswith("1 volumes wait"))
            waits = now(cell, job)
            assert waits.progress.blockers == ()
            assert job_json(waits)["eta_s"] is None
            cell.seal_volume(volume)  # as placement does: the node takes no writes any more
            assert (await ended(cell, job)).state is JobState.DONE
        assert await cell.get(item) == item
        assert_whole(cell)

    simulate(main, nodes=12)


def test_pause_stops_within_two_seconds_and_resume_goes_on_from_there() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        slow_down(cell)
        async with running(cell):
            job = submit(cell, "drain", node=str(GONE))
            await until(cell, lambda: len(moves(cell)) > 0)
            act(cell, job, JobEvent.PAUSE)
            await cell.clock.sleep(2.0)
            before, calls = moves(cell), len(cell.calls)
            await cell.clock.sleep(60.0)
            assert moves(cell) == before != []
            assert len(cell.calls) == calls, "a paused job spoke to nodes"
            assert state_of(cell, GONE) is NodeState.DRAINING
            act(cell, job, JobEvent.RESUME)
            assert (await ended(cell, job)).state is JobState.DONE
        assert_whole(cell)

    simulate(main, nodes=12)


def test_cancel_forgets_moves_gives_the_node_back_and_loses_nothing() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        slow_down(cell)
        async with running(cell):
            job = submit(cell, "drain", node=str(GONE))
            await until(cell, lambda: len(moves(cell)) > 0)
            act(cell, job, JobEvent.CANCEL)
            await until(cell, lambda: moves(cell) == [], seconds=3.0)
        assert now(cell, job).state is JobState.CANCELLED
        assert state_of(cell, GONE) is NodeState.UP
        cell.heal()
        assert_whole(cell)
        for item in data:
            assert await cell.get(item) == item

    simulate(main, nodes=12)


def test_a_process_that_starts_again_finishes_what_another_began() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        slow_down(cell)
        job = submit(cell, "drain", node=str(GONE))
        for _ in range(3):
            async with running(cell):
                await until(cell, lambda: len(moves(cell)) > 0 or now(cell, job).state == "done")
                await cell.clock.sleep(0.7)
        assert now(cell, job).state is JobState.RUNNING
        begun = {(move.volume, move.slot): move.target for move in moves(cell)}
        async with running(cell):
            assert (await ended(cell, job)).state is JobState.DONE
        found = volumes_of(cell, cell.all_rows())
        kept = [found[volume].slots[slot] == target for (volume, slot), target in begun.items()]
        assert all(kept), "a move that was begun went elsewhere"
        assert_whole(cell)

    simulate(main, nodes=12)


def test_a_runner_that_lost_its_role_stops() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        slow_down(cell)
        old = new_repair(cell)
        await old.start()
        runner = _runner(cell, old, moving_nothing)
        task = asyncio.get_running_loop().create_task(runner.run())
        job = submit(cell, "drain", node=str(GONE))
        await until(cell, lambda: len(moves(cell)) > 0)
        async with running(cell):
            await until(cell, task.done, seconds=30.0)
            assert task.exception() is not None
            assert (await ended(cell, job)).state is JobState.DONE
        await old._pool.aclose()
        assert_whole(cell)

    simulate(main, nodes=12)


async def moving_nothing() -> None:
    """Nobody to tell."""


def test_a_draining_node_that_dies_is_left_to_repair_and_its_job_says_so() -> None:
    async def main(cell: BlockCell) -> None:
        await fill(cell)
        async with running(cell):
            cell.kill(GONE)
            job = submit(cell, "drain", node=str(GONE))
            cell.set_state(GONE, NodeState.DOWN)
            await until(cell, lambda: len(now(cell, job).progress.blockers) > 0)
            assert "is down: waits" in now(cell, job).progress.blockers[0].reason
            cell.heal()
            cell.set_state(GONE, NodeState.UP)
            assert (await ended(cell, job)).state is JobState.DONE
        assert state_of(cell, GONE) is NodeState.DRAINED
        assert_whole(cell)

    simulate(main, nodes=12)
