"""Creating and opening `cell.db`: who this cell is, and which nodes belong to it.

First step of `haversack up`, called by the supervisor before any node starts.  May not import the
placement service, node ports or Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, insert, select, update

from cluster import map_rows
from cluster.events import EventKind, record_event
from cluster.schema import cell, map_version
from cluster.topology import NodeEvent, NodeState, NodeView, may_happen, transition
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import ConfigInvalid, FormatUnsupported
from protocol.ids import NodeId
from protocol.limits import BLOCK_BYTES_MAX
from sql.database import Database
from sql.migrations import upgrade

MIGRATIONS: Final = Path(__file__).parent / "migrations"

CELL_FORMAT: Final = 1
"""Raised when an older version must not open the cell any more.  History: 1, first."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to be added: its name, the identity of its store, and where it stands."""

    node_id: NodeId
    store_id: str
    directory: str
    host: str
    rack: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell is for life, except that `scheme` is only what new large blocks get."""

    cluster_id: str
    scheme: Scheme
    created: float
    nodes: tuple[NodeView, ...]
    created_scheme: Scheme
    """What it was created with: `--scheme` may go on naming it after a change of scheme."""

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Schemes that need open volumes: for large blocks and for small ones, each once."""
        return tuple(dict.fromkeys((self.scheme, self.scheme.small_twin())))


def prepare_schema(db: Database) -> None:
    """Bring the tables to this version.  Once, by the process that owns the data directory."""
    upgrade(db, MIGRATIONS)


def create_cell(
    db: Database, clock: Clock, cluster_id: str, scheme: Scheme, specs: Sequence[NodeSpec]
) -> Cell:
    """Write the identity of a new cell and its first nodes in one transaction.

    `cluster_id` is random and never changes.  Raises `ConfigInvalid` if a cell is there already,
    or for two specs with one name or one store.
    """
    assert cluster_id, "a cell needs an identity"
    now = clock.wall()

    def work(connection: Connection) -> None:
        if connection.execute(select(cell.c.id)).one_or_none() is not None:
            raise ConfigInvalid("this data directory holds a cell already: open it instead")
        connection.execute(
            insert(cell).values(
                id=1,
                cluster_id=cluster_id,
                scheme=scheme.name,
                created_scheme=scheme.name,
                format=CELL_FORMAT,
                fingerprint=fingerprint(cluster_id, scheme),
                created=now,
            )
        )
        connection.execute(insert(map_version).values(id=1, version=0, next_volume=1))
        _add_nodes(connection, specs, now)

    db.transact(work)
    created = open_cell(db)
    assert created is not None
    return created


def open_cell(db: Database, scheme: Scheme | None = None) -> Cell | None:
    """The cell of a prepared database, or None if none was created yet.

    Raises `FormatUnsupported` for a cell of a newer version, and `ConfigInvalid` if `scheme` is
    given and is neither the cell's nor the one it was created with, or if the row contradicts its
    fingerprint.
    """

    def work(connection: Connection) -> Cell | None:
        row = connection.execute(select(cell)).one_or_none()
        if row is None:
            return None
        if row.format > CELL_FORMAT:
            raise FormatUnsupported(
                f"this cell has format {row.format}, this version reads up to {CELL_FORMAT}: "
                "start the newer version",
                {"format": row.format},
            )
        stored = Scheme.parse(row.scheme)
        if row.fingerprint != fingerprint(row.cluster_id, stored):
            raise ConfigInvalid(
                "cell.db was made with other limits than this version has, or its cell row was "
                "edited: start the version that made it",
                {"fingerprint": row.fingerprint},
            )
        first = Scheme.parse(row.created_scheme or row.scheme)
        if scheme is not None and scheme not in (stored, first):
            raise ConfigInvalid(
                f"this cell was created with {first}, not {scheme}: start it without a scheme, use "
                "another data directory, or change it with haversack transcode",
                {"cell": stored.name, "given": scheme.name},
            )
        nodes = tuple(map_rows.read_nodes(connection))
        return Cell(row.cluster_id, stored, row.created, nodes, first)

    return db.read_now(work)


def set_scheme(connection: Connection, scheme: Scheme) -> None:
    """What new large blocks get from now on; blocks that are there stay in the scheme they have.

    The fingerprint is over the scheme, so it changes too.  Gateways and the placement service
    find out by the map version.
    """
    cluster_id = connection.execute(select(cell.c.cluster_id)).scalar_one()
    connection.execute(
        update(cell).values(scheme=scheme.name, fingerprint=fingerprint(cluster_id, scheme))
    )
    map_rows.next_version(connection)


def add_nodes(db: Database, clock: Clock, specs: Sequence[NodeSpec]) -> None:
    """Add nodes to a cell, in state joining.

    Raises `ConfigInvalid` for a name or a store that the cell has already.
    """
    now = clock.wall()
    db.transact(lambda connection: _add_nodes(connection, specs, now))


def mark_stopped(db: Database, clock: Clock) -> None:
    """Note that no process of any node runs: called before a cold start of all of them.

    Without it, gateways would take the nodes of the last life for those of this one until the
    placement service has missed them for long enough.
    """
    now = clock.wall()

    def work(connection: Connection) -> None:
        members = [view for view in map_rows.read_nodes(connection) if view.endpoint]
        if not members:
            return
        version = map_rows.next_version(connection)
        for view in members:
            map_rows.forget_endpoint(connection, view.node_id, version)
            if may_happen(view.state, NodeEvent.MISSED):
                state = transition(view.state, NodeEvent.MISSED)
                map_rows.set_node_state(connection, view.node_id, state, now, "starting", version)

    db.transact(work)


def fingerprint(cluster_id: str, scheme: Scheme) -> str:
    """Hash over everything that must be equal at every start: a mistake in a configuration, or a
    build with other limits, is found before it writes."""
    text = "\n".join(
        (f"haversack cell {CELL_FORMAT}", cluster_id, scheme.name, f"{BLOCK_BYTES_MAX}")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _add_nodes(connection: Connection, specs: Sequence[NodeSpec], now: float) -> None:
    known = map_rows.read_nodes(connection)
    names = {view.node_id for view in known}
    stores = {view.store_id for view in known}
    for spec in specs:
        if spec.node_id in names or spec.store_id in stores:
            raise ConfigInvalid(
                f"{spec.node_id} or its store is a member of this cell already",
                {"node": str(spec.node_id), "store": spec.store_id},
            )
        names.add(spec.node_id)
        stores.add(spec.store_id)
    version = map_rows.next_version(connection)
    map_rows.insert_nodes(connection, [_joining(spec, now) for spec in specs], version)
    for spec in specs:
        where = f"rack {spec.rack}, host {spec.host}, weight {spec.weight:g}"
        record_event(connection, now, EventKind.NODE_ADDED, spec.node_id, where)


def _joining(spec: NodeSpec, now: float) -> NodeView:
    return NodeView(
        node_id=spec.node_id,
        store_id=spec.store_id,
        directory=spec.directory,
        host=spec.host,
        rack=spec.rack,
        weight=spec.weight,
        state=NodeState.JOINING,
        state_since=now,
        incarnation=0,
        endpoint="",
        pid=0,
        capacity_bytes=0,
        free_bytes=0,
        used_bytes=0,
        fragments=0,
        detail="",
    )
