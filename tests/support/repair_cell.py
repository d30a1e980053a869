"""Repair over the cell of `block_cell`: its service, and what the disks hold afterwards."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import random
from collections.abc import Sequence
from typing import Any

from block_cell import BlockCell, run_inline
from sqlalchemy import Connection, select, update

from cluster import map_rows
from cluster.block_index import BlockRow
from cluster.block_sql import Debt
from cluster.debts import DebtReason, record_debts
from cluster.move_rows import MoveRow, read_moves
from cluster.repair.service import RepairService
from cluster.repair.settings import RepairSettings
from cluster.schema import nodes, unrepairable
from cluster.topology import NodeState, VolumeView
from erasure.fragment import parse_expected
from erasure.stripe import recover
from protocol.errors import HaversackError
from protocol.ids import BlockHash, NodeId
from storage_node.interface import FragmentKey

PASSES_MAX = 60


class OtherProcess:
    """A port whose node does not share the caller's fate: what was sent is carried out, whoever is
    killed meanwhile."""

    def __init__(self, port: Any) -> None:
        self._port = port

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if not inspect.iscoroutinefunction(method):
            return method

        async def call(*arguments: Any, **named: Any) -> Any:
            work = method(*arguments, **named)
            task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            # Whoever asked may be dead by then: the answer is looked at all the same.
            task.add_done_callback(
                lambda done: done.cancelled() or done.exception(), context=contextvars.Context()
            )
            return await asyncio.shield(task)

        return call


def new_repair(cell: BlockCell, seed: int = 5, **settings: Any) -> RepairService:
    """A service of its own; `start` it."""
    values: dict[str, Any] = {"out_after_s": 60.0, "batch_blocks": 4, **settings}
    return RepairService(
        cell.db,
        cell.clock,
        random.Random(seed),
        lambda view: OtherProcess(cell._connect(view)),  # type: ignore[arg-type, return-value]
        cell.codec,
        cell.keyring,
        run_inline,
        RepairSettings(**values),
    )


async def repair_until_idle(cell: BlockCell, service: RepairService) -> None:
    """Passes until one finds nothing to do."""
    for _ in range(PASSES_MAX):
        if not await service.step() and not service.counters.left_volumes:
            return
        await cell.clock.sleep(1.0)
    raise AssertionError(f"not idle after {PASSES_MAX} passes: {service.counters}")


def lose(cell: BlockCell, *node_ids: NodeId, since: float = -1e6) -> None:
    """These nodes are gone with their disks, and the map has known it for long."""
    for node_id in node_ids:
        cell.kill(node_id)
        cell.set_state(node_id, NodeState.DOWN)
        set_since(cell, node_id, cell.clock.wall() + since)


def set_since(cell: BlockCell, node_id: NodeId, since: float) -> None:
    """When a node entered its state, wall clock."""

    def work(connection: Connection) -> None:
        version = map_rows.next_version(connection)
        row = update(nodes).where(nodes.c.node_id == str(node_id))
        connection.execute(row.values(state_since=since, changed=version))

    cell.db.transact(work)


def owe(cell: BlockCell, debt: Debt, reason: DebtReason) -> None:
    """Somebody found a fragment gone or wrong."""
    cell.db.transact(lambda c: record_debts(c, [debt], cell.clock.wall(), reason))


def volumes_of(cell: BlockCell, rows: Sequence[BlockRow]) -> dict[int, VolumeView]:
    """The volumes of these blocks, as SQL has them."""
    ids = {row.volume for row in rows}
    return {
        view.volume_id: view for view in cell.db.read_now(lambda c: map_rows.read_volumes(c, ids))
    }


def moves(cell: BlockCell) -> list[MoveRow]:
    """Moves under way."""
    return cell.db.read_now(read_moves)


def listed(cell: BlockCell) -> set[BlockHash]:
    """Blocks that repair gave up on."""

    def work(connection: Connection) -> set[BlockHash]:
        return {
            BlockHash(name) for name in connection.execute(select(unrepairable.c.hash)).scalars()
        }

    return cell.db.read_now(work)


def good_slots(cell: BlockCell, row: BlockRow) -> set[int]:
    """Slots whose fragment lies on the disk of the node that the map names, is intact, and is of
    the block: proven by SHA-256."""
    volume = volumes_of(cell, [row])[row.volume]
    found = {}
    for slot, node_id in enumerate(volume.slots):
        if node_id is None:
            continue
        (answer,) = cell.stores[node_id].get_many([FragmentKey(row.volume, row.hash, slot)])
        if answer.record is None:
            continue
        try:
            found[slot] = parse_expected(answer.record, row.volume, row.hash, slot)
        except HaversackError:
            continue
    if len(found) < volume.scheme.k:
        return set()
    proven = recover(cell.codec, cell.keyring, row.hash, found)
    return found.keys() - set(proven.liars)


def assert_whole(cell: BlockCell) -> None:
    """Every block has all of its fragments where the map says, and nothing is owed."""
    for row in cell.all_rows():
        n = volumes_of(cell, [row])[row.volume].scheme.n
        assert good_slots(cell, row) == set(range(n)), f"block {row.hash} of {row.volume}"
    assert cell.all_debts() == set()
    assert moves(cell) == []
