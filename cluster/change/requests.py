"""What an operator can ask for, checked and written down; nothing is carried out here.

Called by the gateway (`api.change_routes`).  A request becomes a row of `jobs`, which `runner`
takes up within about a second, or a plan for people (`--dry-run`), for which nothing is written:
`preview` only ever reads.  May not import the placement service, node ports or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select

from cluster import map_rows, members
from cluster.cell import set_scheme
from cluster.change.jobs import (
    UNFINISHED,
    Job,
    JobEvent,
    JobId,
    JobKind,
    change_job,
    create_job,
    read_jobs,
)
from cluster.change.plans import (
    TOLERANCE,
    Plan,
    plan_drain,
    plan_rebalance,
    plan_replace,
    plan_transcode,
)
from cluster.schema import slot_moves
from cluster.topology import CellView, NodeState
from erasure.scheme import Scheme
from protocol.errors import InvalidRequest, SchemeUnsupported, WrongState
from protocol.ids import NodeId, VolumeId

CELL_SUBJECT: Final = "cell"

NODE_KINDS: Final = frozenset({JobKind.DRAIN, JobKind.DECOMMISSION, JobKind.REPLACE})
"""Jobs about one node, which is draining while they last."""


@dataclass(frozen=True, slots=True)
class ChangeRequest:
    """What is asked for; fields that the kind does not use are None."""

    kind: JobKind
    node: NodeId | None = None
    target: NodeId | None = None
    """Of a replacement."""
    source_scheme: Scheme | None = None
    target_scheme: Scheme | None = None
    for_new: bool = False
    """Of a transcode: new blocks get the target scheme from now on, too."""
    tolerance: float = TOLERANCE

    @property
    def subject(self) -> str:
        """What the job is about, for people and to keep two of them apart."""
        if self.kind in NODE_KINDS:
            return str(self.node)
        if self.kind is JobKind.TRANSCODE:
            return f"{self.source_scheme} -> {self.target_scheme}"
        return CELL_SUBJECT

    def arguments(self) -> dict[str, Any]:
        """As JSON, for the job's row."""
        match self.kind:
            case JobKind.DRAIN | JobKind.DECOMMISSION:
                return {"node": str(self.node)}
            case JobKind.REPLACE:
                return {"node": str(self.node), "target": str(self.target)}
            case JobKind.REBALANCE:
                return {"tolerance": self.tolerance}
            case JobKind.TRANSCODE:
                return {
                    "from": str(self.source_scheme),
                    "to": str(self.target_scheme),
                    "for_new": self.for_new,
                }


def parse_request(kind: str, fields: Mapping[str, Any]) -> ChangeRequest:
    """Read what came over HTTP, or a job's row.  Raises `InvalidRequest`, `MalformedId`."""
    try:
        job_kind = JobKind(kind)
    except ValueError as error:
        known = ", ".join(JobKind)
        raise InvalidRequest(f"there is no change called {kind!r}: use {known}") from error
    if job_kind in NODE_KINDS:
        node = NodeId.parse(_wanted(fields, "node", job_kind))
        target = None
        if job_kind is JobKind.REPLACE:
            target = NodeId.parse(_wanted(fields, "target", job_kind))
            if target == node:
                raise InvalidRequest(f"{node} cannot be replaced by itself")
        return ChangeRequest(job_kind, node=node, target=target)
    if job_kind is JobKind.TRANSCODE:
        return _parse_transcode(fields)
    return ChangeRequest(job_kind, tolerance=float(fields.get("tolerance") or TOLERANCE))


def _parse_transcode(fields: Mapping[str, Any]) -> ChangeRequest:
    try:
        source = Scheme.parse(_wanted(fields, "from", JobKind.TRANSCODE))
        target = Scheme.parse(_wanted(fields, "to", JobKind.TRANSCODE))
    except SchemeUnsupported as error:
        raise InvalidRequest(error.message) from error
    if source == target:
        raise InvalidRequest(f"blocks of {source} are in {target} already")
    return ChangeRequest(
        JobKind.TRANSCODE,
        source_scheme=source,
        target_scheme=target,
        for_new=bool(fields.get("for_new")),
    )


def _wanted(fields: Mapping[str, Any], name: str, kind: JobKind) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"a {kind} needs {name!r}")
    return value


# -- functions over a connection -------------------------------------------------------------------


def read_cell(connection: Connection) -> tuple[CellView, frozenset[VolumeId]]:
    """All nodes and volumes, and the volumes of which a slot is being moved."""
    view = CellView(
        tuple(map_rows.read_nodes(connection)), tuple(map_rows.read_all_volumes(connection))
    )
    moving = connection.execute(select(slot_moves.c.volume_id).distinct()).scalars()
    return view, frozenset(VolumeId(number) for number in moving)


def preview(connection: Connection, request: ChangeRequest) -> Plan:
    """What would be done if it were asked for now.  Reads, and nothing else.

    Raises what `submit` would raise for the state that the cell is in.
    """
    check_request(connection, request)
    view, busy = read_cell(connection)
    return plan_request(view, request, busy)


def plan_request(
    view: CellView, request: ChangeRequest, busy: frozenset[VolumeId] = frozenset()
) -> Plan:
    """The plan for a request."""
    match request.kind:
        case JobKind.DRAIN | JobKind.DECOMMISSION:
            assert request.node is not None
            return plan_drain(view, request.node, busy)
        case JobKind.REPLACE:
            assert request.node is not None
            assert request.target is not None
            return plan_replace(view, request.node, request.target, busy)
        case JobKind.REBALANCE:
            return plan_rebalance(view, request.tolerance, busy)
        case JobKind.TRANSCODE:
            assert request.source_scheme is not None
            assert request.target_scheme is not None
            return plan_transcode(view, request.source_scheme, request.target_scheme)


def submit(connection: Connection, request: ChangeRequest, now: float) -> Job:
    """Write a job down, and what must hold from this moment: a node to be emptied takes no new
    volumes.  Raises `NodeNotFound`, `WrongState`."""
    check_request(connection, request)
    job = create_job(connection, now, request.kind, request.subject, request.arguments())
    if request.for_new:
        assert request.target_scheme is not None
        set_scheme(connection, request.target_scheme)
    enter(connection, request, now, job.name)
    return job


def enter(connection: Connection, request: ChangeRequest, now: float, why: str) -> None:
    """Bring the node of a request into the state that its job needs; again after it came back."""
    if request.kind not in NODE_KINDS:
        return
    assert request.node is not None
    node = members.get_node(connection, request.node)
    if request.kind is JobKind.REPLACE and node.state in (NodeState.DOWN, NodeState.GONE):
        return
    if node.state is not NodeState.GONE:
        members.begin_drain(connection, request.node, now, f"{request.kind}, {why}")


def check_request(connection: Connection, request: ChangeRequest) -> None:
    """Whether the cell is in a state for this.  Raises `NodeNotFound`, `WrongState`."""
    if request.kind in NODE_KINDS:
        assert request.node is not None
        node = members.get_node(connection, request.node)
        dead = (NodeState.DOWN,) if request.kind is JobKind.REPLACE else ()
        allowed = (NodeState.UP, NodeState.SUSPECT, NodeState.DRAINING, NodeState.DRAINED, *dead)
        if node.state not in allowed:
            hint = (
                "replace it, or let repair rebuild what it held"
                if node.state is (NodeState.DOWN)
                else "there is nothing to move"
            )
            raise WrongState(
                f"{node.node_id} is {node.state}: {hint}",
                {"node": str(node.node_id), "state": str(node.state)},
            )
    if request.target is not None:
        target = members.get_node(connection, request.target)
        if target.state not in (NodeState.JOINING, NodeState.UP):
            raise WrongState(
                f"{target.node_id} is {target.state}: a replacement must be up",
                {"node": str(target.node_id), "state": str(target.state)},
            )


def act(connection: Connection, job_id: JobId, event: JobEvent, now: float) -> Job:
    """Pause, resume or cancel a job.  After a cancellation its node takes new volumes again.

    Raises `JobNotFound`, `WrongState`.
    """
    job = change_job(connection, job_id, event, now)
    if event is JobEvent.CANCEL and job.kind in NODE_KINDS:
        node = NodeId.parse(job.arguments["node"])
        members.cancel_drain(connection, node, now, f"{job.name} was cancelled")
    return job


def undrain(connection: Connection, node_id: NodeId, now: float) -> None:
    """A node takes new volumes again: ends its job, if one is not finished.

    Raises `NodeNotFound`, and `WrongState` for a node that is neither draining nor drained.
    """
    view = members.get_node(connection, node_id)
    for job in read_jobs(connection, UNFINISHED):
        if job.kind in NODE_KINDS and job.subject == str(node_id):
            act(connection, job.job_id, JobEvent.CANCEL, now)
            return
    if view.state not in (NodeState.DRAINING, NodeState.DRAINED):
        raise WrongState(f"{node_id} is {view.state}, not draining", {"node": str(node_id)})
    members.cancel_drain(connection, node_id, now, "by an operator")


def request_of(job: Job) -> ChangeRequest:
    """What a job was asked for."""
    return parse_request(job.kind.value, job.arguments)
