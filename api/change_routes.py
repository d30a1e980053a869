"""`/v1/admin/nodes` and `/v1/admin/jobs`: add and weigh nodes; drain, rebalance, transcode.

For operators.  A change is asked for here and carried out elsewhere: the answer to a POST is the
job, whose progress is read again and again.  With `dry_run` it is the plan, and nothing is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from api.answers import Answer, json_answer
from api.call import Access, Call
from api.routing import Route
from cluster.change.desk import ChangeDesk
from cluster.change.jobs import JobEvent
from cluster.change.plans import TOLERANCE
from cluster.change.requests import parse_request
from protocol.errors import InvalidRequest, JobNotFound
from protocol.ids import NodeId

_STRICT: Final = ConfigDict(extra="forbid", strict=True)
_LABEL: Final = r"^[A-Za-z0-9._-]*$"

JOBS_PAGE_MAX: Final = 1_000


class NewNodeBody(BaseModel):
    """A disk to add."""

    model_config = _STRICT

    directory: str = Field(min_length=1, description="Absolute; empty or absent.")
    host: str = Field(default="", max_length=63, pattern=_LABEL)
    rack: str = Field(default="", max_length=63, pattern=_LABEL)
    weight: float = Field(default=1.0, ge=0, le=1000, allow_inf_nan=False)


class NodeBody(BaseModel):
    """What to change about a node; exactly one of these."""

    model_config = _STRICT

    weight: float | None = Field(default=None, ge=0, le=1000, allow_inf_nan=False)
    drain: Literal[False] | None = Field(default=None, description="false: take slots again.")


class NodeAnswer(BaseModel):
    """One node."""

    id: str
    state: str
    since: float
    directory: str
    host: str
    rack: str
    weight: float
    slots: int
    bytes: int
    fragments: int
    capacity_bytes: int
    free_bytes: int
    detail: str


class NodesAnswer(BaseModel):
    """All nodes, the gone ones too."""

    nodes: list[NodeAnswer]


class JobBody(BaseModel):
    """What to do; which fields are needed depends on the kind."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    kind: Literal["drain", "decommission", "replace", "rebalance", "transcode"]
    node: str | None = None
    target: str | None = Field(default=None, description="Node that replaces `node`.")
    tolerance: float = Field(default=TOLERANCE, gt=0, le=1, allow_inf_nan=False)
    source: str | None = Field(default=None, alias="from", description="Scheme.")
    to: str | None = Field(default=None, description="Scheme.")
    for_new: bool = False
    dry_run: bool = False


class JobActionBody(BaseModel):
    """What to do with a job."""

    model_config = _STRICT

    action: Literal["pause", "resume", "cancel"]


class JobsQuery(BaseModel):
    """How many jobs, newest first."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=JOBS_PAGE_MAX)


class BlockerAnswer(BaseModel):
    """A volume that gets no further, and why."""

    volume: str
    reason: str
    blocks: list[str] = []


class JobAnswer(BaseModel):
    """One job.  `eta_s` is null while it is not known."""

    id: int
    kind: str
    subject: str
    arguments: dict[str, Any]
    state: Literal["planned", "running", "paused", "done", "cancelled", "failed"]
    created: float
    changed: float
    done_units: int
    total_units: int
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    eta_s: float | None
    detail: str
    blockers: list[BlockerAnswer]


class JobsAnswer(BaseModel):
    """Newest first."""

    jobs: list[JobAnswer]


class PlannedMoveAnswer(BaseModel):
    """One slot to move; `source` is null where its fragments have to be rebuilt."""

    volume: str
    slot: int
    source: str | None
    target: str
    bytes: int


class PlanAnswer(BaseModel):
    """What would be done: moves, or volumes to transcode."""

    units: int
    bytes: int
    moves: list[PlannedMoveAnswer] | None = None
    volumes: list[str] | None = None
    blocked: list[BlockerAnswer]
    waiting: list[BlockerAnswer] | None = None


class PreviewAnswer(BaseModel):
    """Answer to a dry run."""

    kind: str
    subject: str
    plan: PlanAnswer


class ChangeRoutes:
    """Endpoints of changes; administrators only."""

    def __init__(self, desk: ChangeDesk) -> None:
        self._desk = desk

    def routes(self) -> list[Route]:
        """What this class serves."""
        node = {"model": NodeAnswer, "description": "The node as it is now."}
        job = {"model": JobAnswer, "description": "The job as it is now."}
        states = ("node_not_found", "wrong_state")
        return [
            _route("GET", "/v1/admin/nodes", self.nodes, {200: _said(NodesAnswer, "All nodes.")}),
            _route(
                "POST",
                "/v1/admin/nodes",
                self.add_node,
                {201: _said(NodeAnswer, "Joining: its process starts within seconds.")},
                ("invalid_request", "body_too_large", "config_invalid", "directory_foreign"),
            ),
            _route(
                "POST",
                "/v1/admin/nodes/{node}",
                self.change_node,
                {200: node},
                ("invalid_request", "malformed_id", *states),
            ),
            _route("GET", "/v1/admin/jobs", self.jobs, {200: _said(JobsAnswer, "Jobs.")}),
            _route(
                "POST",
                "/v1/admin/jobs",
                self.create,
                {
                    201: _said(JobAnswer, "A new job."),
                    200: _said(PreviewAnswer, "With dry_run: the plan; nothing was written."),
                },
                ("invalid_request", "malformed_id", *states),
            ),
            _route("GET", "/v1/admin/jobs/{job}", self.job, {200: job}, ("job_not_found",)),
            _route(
                "POST",
                "/v1/admin/jobs/{job}",
                self.act,
                {200: job},
                ("invalid_request", "job_not_found", "wrong_state"),
            ),
        ]

    async def nodes(self, call: Call) -> Answer:
        """All nodes, with how many slots each holds."""
        del call
        return json_answer({"nodes": await self._desk.nodes()})

    async def add_node(self, call: Call, body: NewNodeBody) -> Answer:
        """Make an empty directory of the cell's machine a node."""
        del call
        directory = Path(body.directory)
        if not directory.is_absolute() or ".." in directory.parts:
            raise InvalidRequest(f"{body.directory!r} is not an absolute path")
        node = await self._desk.add_node(directory, body.host, body.rack, body.weight)
        return json_answer(node, 201)

    async def change_node(self, call: Call, body: NodeBody) -> Answer:
        """Give a node another weight, or end its drain."""
        node_id = NodeId.parse(call.argument)
        if (body.weight is None) == (body.drain is None):
            raise InvalidRequest("give either a weight or drain=false")
        if body.weight is not None:
            return json_answer(await self._desk.set_weight(node_id, body.weight))
        return json_answer(await self._desk.undrain(node_id))

    async def jobs(self, call: Call, query: Annotated[JobsQuery, Query()]) -> Answer:
        """The last jobs."""
        del call
        return json_answer({"jobs": await self._desk.jobs(query.limit)})

    async def create(self, call: Call, body: JobBody) -> Answer:
        """Ask for a change, or for its plan."""
        del call
        request = parse_request(body.kind, body.model_dump(by_alias=True))
        if body.dry_run:
            return json_answer(await self._desk.preview(request))
        return json_answer(await self._desk.submit(request), 201)

    async def job(self, call: Call) -> Answer:
        """One job with its progress and what blocks it."""
        return json_answer(await self._desk.job(_job_id(call)))

    async def act(self, call: Call, body: JobActionBody) -> Answer:
        """Pause, resume or cancel a job."""
        return json_answer(await self._desk.act(_job_id(call), JobEvent(body.action)))


def _route(
    method: str,
    path: str,
    endpoint: Any,
    responses: dict[int, dict[str, Any]],
    problems: tuple[str, ...] = (),
) -> Route:
    return Route(
        method,
        path,
        endpoint,
        access=Access.ADMIN,
        responses=responses,
        problems=("forbidden", *problems),
    )


def _said(model: type[BaseModel], description: str) -> dict[str, Any]:
    return {"model": model, "description": description}


def _job_id(call: Call) -> int:
    text = call.argument
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise JobNotFound(f"{text[:20]!r} is not the number of a job", {"job": text[:20]})
    return int(text)
