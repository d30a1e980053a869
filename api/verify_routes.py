"""`GET` and `POST /v1/admin/verify`: what the verifier found, and the request for another pass.

For operators.  The work is the verifier's, in another process: a request is a row, and so is the
answer.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from api.answers import Answer, json_answer
from api.call import Access, Call
from api.routing import Route
from cluster.verify.admin import Verification
from protocol.errors import InvalidRequest


class DifferenceCount(BaseModel):
    """One class of difference."""

    count: int
    examples: list[dict[str, Any]]


class PassAnswer(BaseModel):
    """One pass of the verifier."""

    number: int
    begun: float
    ended: float | None
    state: str
    deep: bool
    request: int
    position: int
    blocks: int
    blocks_total: int
    unlooked_slots: int
    strays_left_off: int
    silent_nodes: dict[str, str]
    differences: dict[str, DifferenceCount]


class VerifyAnswer(BaseModel):
    """The newest pass (`current`), the last that ended, the newest request and removal, and strays
    by class."""

    current: PassAnswer | None
    finished: PassAnswer | None
    request: dict[str, Any] | None
    removal: dict[str, Any] | None
    strays: dict[str, dict[str, float]]
    watcher: dict[str, Any]
    canaries: list[dict[str, Any]]


class VerifyBody(BaseModel):
    """What to do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    deep: bool = False
    """Have every fragment read, and compare stripes."""
    remove_strays: bool = False
    """Instead of a pass: delete fragments in no row's slot, past the grace period."""
    dry_run: bool = False
    """With `remove_strays`: plan, and delete nothing."""


class RequestedAnswer(BaseModel):
    """The number by which the answer is known: `request` of a pass or a removal."""

    request: int


class VerifyRoutes:
    """Endpoints of the verifier."""

    def __init__(self, verification: Verification) -> None:
        self._verification = verification

    def routes(self) -> list[Route]:
        """What this class serves."""
        path = "/v1/admin/verify"
        return [
            Route(
                "GET",
                path,
                self.verification,
                access=Access.ADMIN,
                responses={200: {"model": VerifyAnswer, "description": "What was found."}},
                problems=("forbidden",),
            ),
            Route(
                "POST",
                path,
                self.verify,
                access=Access.ADMIN,
                responses={202: {"model": RequestedAnswer, "description": "It will be done."}},
                problems=("forbidden", "invalid_request"),
            ),
        ]

    async def verification(self, call: Call) -> Answer:
        """Passes of the verifier, strays, and what was asked for."""
        del call
        return json_answer(await self._verification.read())

    async def verify(self, call: Call, body: VerifyBody) -> Answer:
        """Ask for a pass over all blocks and disks, or for the removal of strays."""
        del call
        if body.dry_run and not body.remove_strays:
            raise InvalidRequest("dry_run is for remove_strays: a pass changes nothing on disks")
        if body.deep and body.remove_strays:
            raise InvalidRequest("deep is for a pass: ask for one, then for the removal")
        number = await self._verification.request(
            deep=body.deep, remove_strays=body.remove_strays, dry_run=body.dry_run
        )
        return json_answer({"request": number}, 202)
