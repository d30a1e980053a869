"""`GET` and `POST /v1/admin/scrub`: how far each node has read its own fragments; orders to it.

For operators.  The nodes do the work; the gateway asks them over their data ports.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.answers import Answer, json_answer
from api.call import Access, Call
from api.routing import Route
from cluster.scrub_desk import ScrubDesk
from protocol.errors import InvalidRequest
from protocol.messages import ScrubAction


class ScrubStatus(BaseModel):
    """One node's scrub; times are seconds since 1970, 0 for never."""

    pass_number: int
    started: float
    running: bool
    paused: bool
    asked_for: bool
    bytes_per_s: int
    fragments_done: int
    bytes_done: int
    fragments_total: int
    bytes_total: int
    findings: int
    findings_of_pass: int
    ended: float
    index_damaged: bool


class NodeScrub(BaseModel):
    """A node's answer; `scrub` is null and `error` says why, if it gave none."""

    node: str
    error: str
    scrub: ScrubStatus | None


class ScrubAnswer(BaseModel):
    """In id order."""

    nodes: list[NodeScrub]


class ScrubBody(BaseModel):
    """An order."""

    model_config = ConfigDict(extra="forbid", strict=True)

    action: Literal["start", "pause", "resume"]
    nodes: list[str] = Field(default_factory=list, max_length=10_000)
    """All, if none is named."""
    bytes_per_s: int = Field(default=0, ge=0, le=1 << 40)
    """Of each node, for `start`; zero is as fast as the disk goes."""


class ScrubRoutes:
    """Endpoints of the scrubbers."""

    def __init__(self, scrubs: ScrubDesk) -> None:
        self._scrubs = scrubs

    def routes(self) -> list[Route]:
        """What this class serves."""
        path = "/v1/admin/scrub"
        return [
            Route(
                "GET",
                path,
                self.progress,
                access=Access.ADMIN,
                responses={200: {"model": ScrubAnswer, "description": "Where each node stands."}},
                problems=("forbidden",),
            ),
            Route(
                "POST",
                path,
                self.order,
                access=Access.ADMIN,
                responses={200: {"model": ScrubAnswer, "description": "What each answered."}},
                problems=("forbidden", "invalid_request", "node_not_found"),
            ),
        ]

    async def progress(self, call: Call) -> Answer:
        """How far each node has read its own fragments, and how many it has set aside."""
        del call
        return json_answer({"nodes": await self._scrubs.read()})

    async def order(self, call: Call, body: ScrubBody) -> Answer:
        """Begin a pass now, pause, or resume, on the nodes named or on all."""
        del call
        if body.bytes_per_s and body.action != "start":
            raise InvalidRequest("bytes_per_s is for start")
        action = ScrubAction[body.action.upper()]
        answers = await self._scrubs.order(action, body.nodes, body.bytes_per_s)
        return json_answer({"nodes": answers})
