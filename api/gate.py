"""The gate: every request passes through it once, and every answer comes out of it.

Step 2 of every walk over HTTP, called by the HTTP connection as the outermost ASGI application:

    1. find the route                                  404, 405
    2. take a turn, or wait for one                    429
    3. who is it? may they call this?                  401, 403
    4. read the parameters, call the endpoint          422, 413, whatever it raises
    5. give the turn back; send the answer, or the error as the table of `api.errors` says
    6. give the memory back; count; log if it deserves it

No route has credentials, limits or error handling of its own, so none can forget them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from api.access_log import AccessLog
from api.answers import error_answer
from api.authentication import Authenticator, refuse_watcher, require_admin
from api.call import Access, Call, PeerGone
from api.metrics import NO_ROUTE, HttpMetrics
from api.routing import Route, RouteTable
from api.turns import Turns
from cluster.byte_budget import ByteBudget
from protocol.clock import Clock
from protocol.errors import HaversackError

REQUEST_ID: Final = b"x-request-id"
STATUS_GONE: Final = 499
"""For metrics and logs only: the peer left before it could be answered."""

_GOOD_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class InternalError(HaversackError):
    """What a caller learns of an exception that nobody foresaw: where to look for it."""


class Gate:
    """The ASGI application in front of the routes.  `inner` answers what is not HTTP."""

    def __init__(
        self,
        inner: ASGIApp,
        routes: Sequence[Route],
        *,
        authenticator: Authenticator,
        turns: Turns,
        uploads: ByteBudget,
        downloads: ByteBudget,
        metrics: HttpMetrics,
        log: AccessLog,
        clock: Clock,
        name: str,
    ) -> None:
        """`name` makes request ids of this process differ from those of others."""
        self._inner = inner
        self._table = RouteTable(routes)
        self._authenticator = authenticator
        self._turns = turns
        self._uploads = uploads
        self._downloads = downloads
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._name = name
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started = self._clock.monotonic()
        call = Call(scope, receive, send)
        call.request_id = self._request_id(call)
        call.clock = self._clock
        call.uploads, call.downloads = self._uploads, self._downloads
        route: Route | None = None
        status, sent = STATUS_GONE, 0
        worked_s: float | None = None
        try:
            try:
                route, call.argument = self._table.find(scope["method"], scope["path"])
                if route.access is not Access.PUBLIC:
                    call.turns = self._turns
                    await call.take_turn()
                    await self._admit(call, route)
                answer = await route.answer(call)
            except HaversackError as error:
                answer = error_answer(error)
            except PeerGone:
                return
            except Exception:  # noqa: BLE001 - logged, and answered as the mistake of ours it is
                self._log.failed(call, route.path if route is not None else NO_ROUTE)
                answer = error_answer(_internal(call.request_id))
            worked_s = self._clock.monotonic() - started - call.off_turn_s
            call.end_turn()  # a peer that reads slowly keeps its memory, not its turn
            status, sent = answer.status_code, answer.length
            answer.raw_headers.append((REQUEST_ID, call.request_id.encode("ascii")))
            await answer(scope, receive, send)
        finally:
            call.end_turn()
            await call.release()
            seconds = self._clock.monotonic() - started
            self._count(call, route, status, seconds, sent)
            self._log.answered(
                call,
                route.path if route is not None else NO_ROUTE,
                status,
                worked_s or 0.0,
                seconds,
                is_probe=route is not None and route.access is Access.PUBLIC,
            )

    async def _admit(self, call: Call, route: Route) -> None:
        """Raises `Unauthenticated` or `Forbidden`."""
        call.account = await self._authenticator.account(call.field(b"authorization"))
        if not route.reads_block:
            refuse_watcher(call.account)
        if route.access is Access.ADMIN:
            require_admin(call.account)

    def _request_id(self, call: Call) -> str:
        """The caller's, if it is harmless; else a new one."""
        given = call.field(REQUEST_ID)
        if given is not None and _GOOD_ID.fullmatch(given):
            return given.decode("ascii")
        return f"{self._name}-{next(self._numbers):x}"

    def _count(
        self, call: Call, route: Route | None, status: int, seconds: float, sent: int
    ) -> None:
        received = int(call.field(b"content-length") or 0) if status < 400 else 0
        method, template = (route.method, route.path) if route is not None else ("", NO_ROUTE)
        self._metrics.answered(method, template, status, seconds, received, sent)


def _internal(request_id: str) -> InternalError:
    return InternalError(
        f"an error of the server, not of the request; its log says more about {request_id}",
        {"request_id": request_id},
    )
