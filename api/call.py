"""A request on its way through the gateway, and who may make it.

Made by `gate.Gate` for each request, handed to the endpoint of its route.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Final

from starlette.requests import Request

from cluster.byte_budget import ByteBudget
from metadata.accounts import Account

NOBODY: Final = Account(0, "", False, 0)


class Access(enum.Enum):
    """Who may call a route."""

    PUBLIC = "public"
    """Anybody, without a token, and without waiting for a turn."""
    USER = "user"
    ADMIN = "admin"


class Call(Request):
    """A request with what the gateway found out about it."""

    account: Account = NOBODY
    """Who calls; nobody on public routes, and until the token was looked up."""
    argument: str = ""
    """The variable last segment of the path, if the route has one."""
    request_id: str = ""
    _held: contextlib.AsyncExitStack | None = None

    async def hold(self, budget: ByteBudget, wanted: int) -> None:
        """Hold `wanted` bytes of a budget until the answer is sent.  Raises `Overloaded`."""
        if self._held is None:
            self._held = contextlib.AsyncExitStack()
        await self._held.enter_async_context(budget.hold(wanted))

    async def release(self) -> None:
        """Give back what is held.  Called by the gate, after the answer, whatever happened."""
        if self._held is not None:
            await self._held.aclose()

    def field(self, name: bytes) -> bytes | None:
        """A header field by its lower-case name; the last one if it is repeated."""
        fields: dict[bytes, bytes] | None = self.scope.get("haversack.fields")
        if fields is None:
            fields = self.scope["haversack.fields"] = dict(self.scope["headers"])
        return fields.get(name)


class PeerGone(Exception):
    """The connection ended before the request was complete: nobody is left to answer.

    Not a `HaversackError`: it never reaches a client.
    """
