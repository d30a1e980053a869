"""`/v1/admin/why/{subject}`, `/v1/admin/what-if`, `/v1/admin/events`, and `/admin`, the page.

For operators.  The page is one static document without data in it: a browser fills it from these
routes with a token that somebody pastes, so the page itself needs none.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from api.answers import NOSNIFF, Answer, json_answer
from api.call import Access, Call
from api.routing import Route
from cluster.explain.domains import Level
from cluster.explain.losses import Losses
from cluster.explain.why import Explainer
from metadata.accounts import Accounts
from metadata.tree import Tree
from protocol.errors import InvalidRequest, MalformedHash, MalformedId
from protocol.ids import BlockHash, NodeId, VolumeId

EVENTS_MAX: Final = 500
LOST_MAX: Final = 100
REFERENCES_SHOWN: Final = 20
ACCOUNTS_ASKED: Final = 10_000
"""Accounts whose claims and references `why` names; a cell with more has other tools."""

PAGE: Final = Path(__file__).parent / "admin.html"


class LossQuery(BaseModel):
    """What would be lost: names after each other with commas, or the worst of a level."""

    model_config = ConfigDict(extra="forbid")

    lose: str | None = Field(default=None, min_length=1, max_length=8_192)
    any_one: Level | None = None


class EventsQuery(BaseModel):
    """Whose events, and how many."""

    model_config = ConfigDict(extra="forbid")

    subject: str | None = Field(default=None, min_length=1, max_length=100)
    limit: int = Field(default=50, ge=1, le=EVENTS_MAX)


class EventAnswer(BaseModel):
    """Something that happened."""

    at: float
    kind: str
    subject: str
    detail: str


class EventsAnswer(BaseModel):
    """Newest first."""

    events: list[EventAnswer]


class WhyAnswer(BaseModel):
    """What is known of a block, a volume or a node: more fields for each kind."""

    model_config = ConfigDict(extra="allow")

    kind: str
    subject: str
    summary: str
    next: list[str]
    events: list[EventAnswer]


class AmountAnswer(BaseModel):
    """How much is in one class."""

    model_config = ConfigDict(extra="allow")

    volumes: int
    blocks: int
    stored_bytes: int


class RebuildingAnswer(BaseModel):
    """What making everything whole would take."""

    possible: bool
    slots: int
    fragment_bytes: int
    slots_without_target: int
    slots_beyond_spread: int
    lost_slots: int
    nodes: int
    room_bytes: int


class RiskAnswer(BaseModel):
    """One domain of `worst`."""

    domain: str
    after: dict[str, AmountAnswer]


class LossAnswer(BaseModel):
    """Classes are numbers of spare fragments, from the worst to the best."""

    lost: list[str]
    nodes: list[str]
    before: dict[str, AmountAnswer]
    after: dict[str, AmountAnswer]
    unreadable: AmountAnswer
    fragments_of_one_block_max: int
    rebuilding: RebuildingAnswer
    worst: list[RiskAnswer] | None = None


class ExplainRoutes:
    """Questions about redundancy."""

    def __init__(
        self, explainer: Explainer, losses: Losses, accounts: Accounts, tree: Tree
    ) -> None:
        self._explainer = explainer
        self._losses = losses
        self._accounts = accounts
        self._tree = tree
        self._page = PAGE.read_bytes()
        self._policy = content_policy(self._page.decode("utf-8"))

    def routes(self) -> list[Route]:
        """What this class serves."""
        return [
            Route(
                "GET",
                "/v1/admin/why/{subject}",
                self.why,
                access=Access.ADMIN,
                responses={200: {"model": WhyAnswer, "description": "What is known of it."}},
                problems=("forbidden", "entry_not_found", "node_not_found", "malformed_id"),
                openapi_extra={"parameters": [_SUBJECT]},
            ),
            Route(
                "GET",
                "/v1/admin/what-if",
                self.what_if,
                access=Access.ADMIN,
                responses={200: {"model": LossAnswer, "description": "What would be left."}},
                problems=("forbidden", "invalid_request"),
            ),
            Route(
                "GET",
                "/v1/admin/events",
                self.events,
                access=Access.ADMIN,
                responses={200: {"model": EventsAnswer, "description": "What happened."}},
                problems=("forbidden", "invalid_request"),
            ),
            Route(
                "GET",
                "/admin",
                self.page,
                access=Access.PUBLIC,
                responses={
                    200: {
                        "description": "A page for a browser.",
                        "content": {"text/html": {"schema": {"type": "string"}}},
                    }
                },
            ),
        ]

    async def why(self, call: Call) -> Answer:
        """References, slots, history, risk and next action of a block, a volume or a node."""
        subject = call.argument
        if len(subject) == 64:
            try:
                return json_answer(await self._why_block(BlockHash.parse(subject)))
            except MalformedHash as error:
                raise _no_subject(subject) from error
        try:
            node_id = NodeId.parse(subject)
            # A node may be called v12; then that is what was meant.
            if not _VOLUME.fullmatch(subject) or await self._explainer.is_node(node_id):
                return json_answer(await self._explainer.node(node_id))
            return json_answer(await self._explainer.volume(VolumeId.parse(subject)))
        except MalformedId as error:
            raise _no_subject(subject) from error

    async def what_if(self, call: Call, query: Annotated[LossQuery, Query()]) -> Answer:
        """What the loss of nodes, hosts or racks would leave, from the placement."""
        del call
        if (query.lose is None) == (query.any_one is None):
            raise InvalidRequest("give lose=NAME,... or any_one=node|host|rack, one of the two")
        if query.any_one is not None:
            return json_answer(await self._losses.worst(query.any_one))
        assert query.lose is not None
        names = query.lose.split(",")
        if len(names) > LOST_MAX:
            raise InvalidRequest(f"{len(names)} names: at most {LOST_MAX} can be lost at once")
        return json_answer(await self._losses.lose(names))

    async def events(self, call: Call, query: Annotated[EventsQuery, Query()]) -> Answer:
        """What happened in the cell, or to one subject."""
        del call
        return json_answer({"events": await self._explainer.events(query.subject, query.limit)})

    async def page(self, call: Call) -> Answer:
        """The status page."""
        del call
        return Answer(200, (_HTML, self._policy, NOSNIFF, _NO_REFERRER, _REVALIDATE), (self._page,))

    async def _why_block(self, block: BlockHash) -> dict[str, Any]:
        accounts = (await self._accounts.list_accounts())[:ACCOUNTS_ASKED]
        names = {account.id: account.name for account in accounts}
        roots = {account.namespace_id: account.name for account in accounts}
        answer: dict[str, Any]
        answer, referring = await asyncio.gather(
            self._explainer.block(block, tuple(names)), self._tree.referring(block)
        )
        answer["owner_name"] = names.get(answer["owner"])
        for claim in answer["claims"]:
            claim["name"] = names.get(claim["owner"])
        answer["references"] = {
            "total": sum(referring.values()),
            "namespaces_total": len(referring),
            "namespaces": [
                {"namespace": namespace, "account": roots.get(namespace), "count": count}
                for namespace, count in list(referring.items())[:REFERENCES_SHOWN]
            ],
        }
        return answer


def content_policy(page: str) -> tuple[bytes, bytes]:
    """The header that lets a browser run this page's own script and style, and nothing else."""

    def sources(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(body.encode()).digest() for body in bodies]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return b"content-security-policy", policy.encode("ascii")


def _no_subject(subject: str) -> MalformedId:
    return MalformedId("block, volume or node", subject)


_VOLUME: Final = re.compile(r"v[0-9]{1,18}")
_HTML: Final = (b"content-type", b"text/html; charset=utf-8")
_NO_REFERRER: Final = (b"referrer-policy", b"no-referrer")
_REVALIDATE: Final = (b"cache-control", b"no-cache")
_SUBJECT: Final = {
    "name": "subject",
    "in": "path",
    "required": True,
    "description": "A block's hash, a volume such as v12, or a node's name.",
    "schema": {"type": "string"},
}
