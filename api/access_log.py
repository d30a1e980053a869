"""Which requests get a line in `DIR/logs/gateway.log`, and what it says.

Last step of every walk over HTTP, called by `gate.Gate`.  Errors and slow requests are always
written; every request only if the operator asks for it.  A line never holds a token, a query
string or a body.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import structlog

from api.call import Call

PATH_CHARACTERS_MAX: Final = 100

PROBLEM_STATUSES: Final = frozenset({400, 401, 403, 408, 411, 413, 429, 431})
"""Client errors worth a line: those that a working client does not cause all day (404, 409)."""


class AccessLog:
    """A line for a request, if it deserves one."""

    def __init__(self, what: Literal["problems", "all"], slow_s: float) -> None:
        self._all = what == "all"
        self._slow_s = slow_s
        self._log = structlog.get_logger()

    def answered(
        self,
        call: Call,
        template: str,
        status: int,
        worked_s: float,
        seconds: float,
        *,
        is_probe: bool,
    ) -> None:
        """Called after every request.  Only time we worked can be slow, not what the peer took.

        A probe that is told no is no problem: it asks ten times a second while a cell starts.
        """
        slow = worked_s > self._slow_s
        problem = status >= 500 or status in PROBLEM_STATUSES
        if not (self._all or slow or (problem and not is_probe)):
            return
        write = self._log.error if status >= 500 else self._log.info
        fields = _fields(call, template)
        times = {"worked_s": round(worked_s, 4), "seconds": round(seconds, 4)}
        write("request", status=status, slow=slow, **times, **fields)

    def failed(self, call: Call, template: str) -> None:
        """An exception that nobody foresaw: called inside its `except` block."""
        self._log.error("unforeseen error", exc_info=True, **_fields(call, template))


def _fields(call: Call, template: str) -> dict[str, Any]:
    client = call.scope.get("client")
    return {
        "request_id": call.request_id,
        "method": call.scope["method"],
        "route": template,
        "argument": call.argument[:PATH_CHARACTERS_MAX],
        "account": call.account.name,
        "peer": f"{client[0]}:{client[1]}" if client else None,
    }
