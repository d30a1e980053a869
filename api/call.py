"""A request on its way through the gateway, and who may make it.

Made by `gate.Gate` for each request, handed to the endpoint of its route.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request

from api.http_exchange import EXCHANGE
from api.turns import Turns
from cluster.byte_budget import ByteBudget
from metadata.accounts import Account
from protocol.clock import Clock, SystemClock

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
    turns: Turns | None = None
    """Where this call's turn comes from; None: it needs none."""
    has_turn: bool = False
    clock: Clock = SystemClock()
    off_turn_s: float = 0.0
    """Seconds spent waiting for the peer or for memory: not our slowness."""
    uploads: ByteBudget | None = None
    """Memory for request bodies."""
    downloads: ByteBudget | None = None
    """Memory for answers."""
    _held: contextlib.AsyncExitStack | None = None

    # -- turns: held while we work, not while we wait for the peer ------------------------------

    async def take_turn(self) -> None:
        """Wait for a turn.  Raises `Overloaded`."""
        if self.turns is not None:
            if not self.turns.take_now():
                await self.turns.take()
            self.has_turn = True

    def end_turn(self) -> None:
        """Let somebody else work."""
        if self.has_turn and self.turns is not None:
            self.has_turn = False
            self.turns.give_back()

    @contextlib.asynccontextmanager
    async def off_turn(self) -> AsyncIterator[None]:
        """Wait for the peer, or for memory that others' peers hold, without a turn.

        Raises `Overloaded` if no turn can be had afterwards.
        """
        self.end_turn()
        began = self.clock.monotonic()
        yield
        self.off_turn_s += self.clock.monotonic() - began
        await self.take_turn()

    @property
    def body_is_here(self) -> bool:
        """Whether the whole body has arrived, so that reading it takes no time."""
        exchange = self.scope.get(EXCHANGE)
        return exchange is not None and exchange.body_complete

    # -- memory: held until the answer is sent ---------------------------------------------------

    async def hold(self, budget: ByteBudget | None, wanted: int) -> None:
        """Hold `wanted` bytes of a budget until the answer is sent.  Raises `Overloaded`."""
        if budget is None:
            return
        if self._held is None:
            self._held = contextlib.AsyncExitStack()
        if budget.free >= wanted:
            await self._held.enter_async_context(budget.hold(wanted))
        else:
            async with self.off_turn():
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
