"""A node's way into a cell and out of it: directory, row, state, and what the controller starts.

Called by `cli.prepare` at every start, by the gateway when an operator adds or changes a node, and
by `cluster.change.runner`.  The directory is formatted first, then its row is written, then the
controller's plan: whoever dies in between is finished by the next call.  May not import the
placement service or Ray.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, func, select, update

from cluster import map_rows
from cluster.cell import NodeSpec, add_nodes, open_cell
from cluster.controller_plan import ControllerPlan, PlannedNode, write_plan
from cluster.events import EventKind, record_event
from cluster.schema import nodes, slot_moves, volume_slots
from cluster.topology import NodeEvent, NodeState, NodeView, may_happen, transition
from protocol.clock import Clock
from protocol.config import Settings
from protocol.errors import ConfigInvalid, DirectoryForeign, NodeNotFound, WrongState
from protocol.ids import NodeId
from sql.database import Database
from storage_node import identity
from storage_node.node_config import NodeUpkeep

RACK: Final = "rack-1"
"""Rack of a node for which nobody named one."""


def upkeep_of(settings: Settings) -> NodeUpkeep:
    """How nodes look after their disks, by the settings of whoever writes the plan."""
    return NodeUpkeep(
        scrub_period_s=settings.scrub_period_s,
        scrub_bytes_per_s_max=settings.scrub_bytes_per_s_max,
        placement_space_share=settings.space_placement_percent / 100,
        client_space_share=settings.space_client_percent / 100,
        repair_space_share=settings.space_repair_percent / 100,
    )


def write_controller_plan(
    db: Database, data: Path, node_capacity_bytes: int | None, upkeep: NodeUpkeep
) -> None:
    """Tell the controller which nodes to run: all members that are not gone.  Blocks."""
    cell = open_cell(db)
    assert cell is not None, "a cell is created before its controller starts"
    members = [node for node in cell.nodes if node.state is not NodeState.GONE]
    planned = tuple(PlannedNode(str(node.node_id), node.directory) for node in members)
    write_plan(data, ControllerPlan(cell.cluster_id, node_capacity_bytes, upkeep, planned))


def format_directory(directory: Path, cluster_id: str, node_id: NodeId) -> str:
    """Make an empty or absent directory a node's; its store id.  Blocks.

    One that was formatted for the same node and never used is taken as it is.  Raises
    `DirectoryForeign` for any other.
    """
    fresh = identity.Identity(cluster_id, node_id, uuid.uuid4().hex)
    try:
        identity.initialise(directory, fresh)
    except DirectoryForeign:
        fresh = _interrupted(directory, cluster_id, node_id)
    return fresh.store_id


def _interrupted(directory: Path, cluster_id: str, node_id: NodeId) -> identity.Identity:
    """A directory that a killed process formatted and that no row names yet: ours, and unused."""
    try:
        found = identity.load(directory)
    except DirectoryForeign:
        found = None
    ours = found is not None and (found.cluster_id, found.node_id) == (cluster_id, node_id)
    if found is None or not ours or not identity.is_fresh(directory):
        raise DirectoryForeign(
            f"{directory} is not empty and not a fresh directory of {node_id}: move it away",
            {"directory": str(directory)},
        )
    return found


def add_node(
    db: Database, clock: Clock, directory: Path, host: str, rack: str, weight: float
) -> NodeView:
    """Make `directory` the disk of a new node, in state joining.  Blocks.

    A directory that is a joining node's already is that node: a retry succeeds.  Empty labels mean
    this host and `RACK`.  Raises `ConfigInvalid` for a directory in or around another node's, and
    `DirectoryForeign` for one that is not empty.
    """
    cell = open_cell(db)
    if cell is None:
        raise ConfigInvalid("this database holds no cell yet: create it first")
    for member in cell.nodes:
        theirs = Path(member.directory)
        if theirs == directory and member.state is NodeState.JOINING:
            return member
        if member.state is not NodeState.GONE and (
            directory.is_relative_to(theirs) or theirs.is_relative_to(directory)
        ):
            raise ConfigInvalid(
                f"{directory} is the directory of {member.node_id}, or lies in or around it: a "
                "node needs a directory of its own, best on a disk of its own",
                {"directory": str(directory), "node": str(member.node_id)},
            )
    node_id = next_node_id(member.node_id for member in cell.nodes)
    try:
        store_id = format_directory(directory, cell.cluster_id, node_id)
    except OSError as error:
        raise ConfigInvalid(
            f"{directory} cannot be made a node's directory: {error.strerror or error}",
            {"directory": str(directory)},
        ) from error
    spec = NodeSpec(
        node_id, store_id, str(directory), host or socket.gethostname(), rack or RACK, weight
    )
    add_nodes(db, clock, [spec])
    view = db.read_now(lambda connection: map_rows.read_node(connection, node_id))
    assert view is not None
    return view


def next_node_id(known: Iterable[NodeId]) -> NodeId:
    """The first number above all that were ever given out: a gone node's name is not used again."""
    number, taken = 1, set(known)
    for node_id in taken:
        digits = node_id.rpartition("-")[2]
        number = max(number, int(digits) + 1 if digits.isdecimal() else number)
    assert NodeId.numbered(number) not in taken
    return NodeId.numbered(number)


# -- states, inside a transaction ------------------------------------------------------------------


def get_node(connection: Connection, node_id: NodeId) -> NodeView:
    """One node.  Raises `NodeNotFound`."""
    view = map_rows.read_node(connection, node_id)
    if view is None:
        raise NodeNotFound(
            f"this cell has no {node_id}: see haversack node list", {"node": str(node_id)}
        )
    return view


def set_weight(connection: Connection, node_id: NodeId, weight: float) -> None:
    """Give a node another share of new volumes; what it holds stays until a rebalance.

    Raises `NodeNotFound`.
    """
    get_node(connection, node_id)
    connection.execute(
        update(nodes)
        .where(nodes.c.node_id == node_id)
        .values(weight=weight, changed=map_rows.next_version(connection))
    )


def begin_drain(connection: Connection, node_id: NodeId, now: float, why: str) -> NodeView:
    """No new volumes for a node from now on; nothing happens to one that drains already.

    Raises `NodeNotFound`, and `WrongState` for a node that cannot drain: one that is down is not
    drained but replaced, or repaired by itself.
    """
    view = get_node(connection, node_id)
    if view.state in (NodeState.DRAINING, NodeState.DRAINED):
        return view
    if not may_happen(view.state, NodeEvent.DRAIN):
        raise WrongState(
            f"{node_id} is {view.state}: only a node that is up can be drained; what was on a dead "
            "one is rebuilt elsewhere by itself",
            {"node": str(node_id), "state": str(view.state)},
        )
    return _take(connection, view, NodeEvent.DRAIN, now, why)


def cancel_drain(connection: Connection, node_id: NodeId, now: float, why: str) -> NodeView:
    """A draining or drained node takes new volumes again; others stay as they are."""
    view = get_node(connection, node_id)
    if not may_happen(view.state, NodeEvent.DRAIN_CANCELLED):
        return view
    return _take(connection, view, NodeEvent.DRAIN_CANCELLED, now, why)


def mark_emptied(connection: Connection, node_id: NodeId, now: float) -> bool:
    """A draining node is drained if no slot and no move refers to it; whether it is."""
    view = get_node(connection, node_id)
    if references(connection, node_id):
        return False
    if view.state is NodeState.DRAINING:
        _take(connection, view, NodeEvent.EMPTIED, now, "no slot refers to it")
        return True
    return view.state is NodeState.DRAINED


def remove_node(connection: Connection, node_id: NodeId, now: float) -> bool:
    """Take a node that nothing refers to out of the cell for good; whether it is out.

    Its directory is left alone.  A node that is up must be drained first.
    """
    view = get_node(connection, node_id)
    if view.state is NodeState.GONE:
        return True
    if references(connection, node_id) or not may_happen(view.state, NodeEvent.REMOVED):
        return False
    _take(connection, view, NodeEvent.REMOVED, now, f"{view.directory} was left as it is")
    map_rows.forget_endpoint(connection, node_id, map_rows.read_version(connection))
    return True


def references(connection: Connection, node_id: NodeId) -> int:
    """Slots that lie on a node, and moves that go there."""
    slots = select(func.count()).where(volume_slots.c.node_id == node_id)
    moves = select(func.count()).where(slot_moves.c.target == str(node_id))
    return int(connection.execute(slots).scalar_one() + connection.execute(moves).scalar_one())


def _take(
    connection: Connection, view: NodeView, event: NodeEvent, now: float, why: str
) -> NodeView:
    state = transition(view.state, event)
    version = map_rows.next_version(connection)
    map_rows.set_node_state(connection, view.node_id, state, now, why, version)
    said = f"{view.state} -> {state}: {why}"
    record_event(connection, now, EventKind.NODE_STATE, view.node_id, said)
    return get_node(connection, view.node_id)
