"""A `cell.db` with nodes and volumes, without any node behind it: for tests of the SQL half."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sqlalchemy import Connection

from chaos.sim.database import copy_databases
from cluster import map_rows
from cluster.block_index import NewBlock, Receipt
from cluster.cell import Cell, NodeSpec, create_cell
from cluster.topology import NodeState, NodeView, VolumeView
from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import NodeRegistration

START = 1_795_305_600.0
CLUSTER_ID = "c" * 32
RS = Scheme.rs(6, 3)
SMALL = Scheme.replica(4)


class HandClock:
    """A clock that moves when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - START

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def empty_database(directory: Path, *, inline: bool = True) -> Database:
    """Migrated, but without a cell."""
    copy_databases(directory)
    return Database(sqlite_url(directory / "cell.db"), inline=inline)


def node_spec(number: int, rack: str = "rack", host: str = "host", weight: float = 1.0) -> NodeSpec:
    node_id = NodeId.numbered(number)
    return NodeSpec(node_id, f"store-{number}", f"/disks/{node_id}", host, rack, weight)


def registration(number: int, *, endpoint: str = "", store_id: str = "") -> NodeRegistration:
    return NodeRegistration(
        NodeId.numbered(number),
        store_id or f"store-{number}",
        endpoint or f"127.0.0.1:{7000 + number}",
        1000 + number,
        f"/disks/{NodeId.numbered(number)}",
        1 << 40,
    )


def new_cell(db: Database, clock: HandClock, nodes: int = 9, scheme: Scheme = RS) -> Cell:
    """A cell whose nodes have not registered yet."""
    specs = [node_spec(number + 1) for number in range(nodes)]
    return create_cell(db, clock, CLUSTER_ID, scheme, specs)


class Rows:
    """Plays the placement service: registers nodes, opens and seals volumes."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def register(self, number: int) -> int:
        """A new incarnation of a node, which is up at once; returns it."""

        def work(connection: Connection) -> int:
            version = map_rows.next_version(connection)
            map_rows.begin_incarnation(connection, registration(number), version)
            self._set_up(connection, NodeId.numbered(number), version)
            view = map_rows.read_node(connection, NodeId.numbered(number))
            assert view is not None
            return view.incarnation

        return self.db.transact(work)

    def register_all(self) -> None:
        for number, _ in enumerate(self.nodes(), start=1):
            self.register(number)

    def open_volume(self, scheme: Scheme, slots: tuple[NodeId | None, ...]) -> VolumeView:
        def work(connection: Connection) -> VolumeView:
            version = map_rows.next_version(connection)
            ids = map_rows.insert_volumes(connection, [(scheme, slots)], START, version)
            return map_rows.read_volumes(connection, ids)[0]

        return self.db.transact(work)

    def seal(self, volume_id: VolumeId) -> None:
        self.db.transact(
            lambda connection: map_rows.seal_volume(
                connection, volume_id, map_rows.next_version(connection)
            )
        )

    def set_state(self, number: int, state: NodeState) -> None:
        def work(connection: Connection) -> None:
            version = map_rows.next_version(connection)
            node_id = NodeId.numbered(number)
            map_rows.set_node_state(connection, node_id, state, START, "by the test", version)

        self.db.transact(work)

    def nodes(self) -> list[NodeView]:
        return self.db.read_now(map_rows.read_nodes)

    def node(self, number: int) -> NodeView:
        return self.nodes()[number - 1]

    def volume(self, volume_id: VolumeId) -> VolumeView:
        return self.db.read_now(lambda c: map_rows.read_volumes(c, [volume_id]))[0]

    def _set_up(self, connection: Connection, node_id: NodeId, version: int) -> None:
        map_rows.set_node_state(connection, node_id, NodeState.UP, START, "", version)


def node_ids(count: int, first: int = 1) -> tuple[NodeId, ...]:
    return tuple(NodeId.numbered(number) for number in range(first, first + count))


def block_named(text: object) -> BlockHash:
    """A hash for tests that need no bytes."""
    return BlockHash(hashlib.sha256(str(text).encode()).digest())


def new_block(
    name: object,
    volume: VolumeView,
    *,
    owner: int = 1,
    incarnation: int = 1,
    missing: tuple[int, ...] = (),
) -> NewBlock:
    """A block acknowledged by every node of its volume, except for the missing slots."""
    receipts = tuple(
        Receipt(slot, node_id, incarnation)
        for slot, node_id in enumerate(volume.slots)
        if node_id is not None and slot not in missing
    )
    return NewBlock(
        block_named(name),
        owner,
        volume.volume_id,
        volume.epoch,
        stored_bytes=5_000,
        plain_bytes=4_000,
        receipts=receipts,
        missing_slots=missing,
    )
