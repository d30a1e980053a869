"""Rebuild the errors that the server answered, by their stable kind.

Used by `client.transport` and `client.replies`.  May import `protocol` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from protocol.errors import (
    BadRequest,
    EntryNotFound,
    Forbidden,
    HaversackError,
    OperatorNeeded,
    Overloaded,
    RetryLater,
    Unauthenticated,
    UnknownOutcome,
    rebuild,
)

_MESSAGE_CHARACTERS_MAX = 500

_GROUP_BY_STATUS: dict[int, type[HaversackError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: EntryNotFound,
    408: RetryLater,
    425: RetryLater,
    429: Overloaded,
    500: HaversackError,
    502: UnknownOutcome,  # a proxy lost the server: it may have done the work
    503: RetryLater,
    504: UnknownOutcome,
    507: RetryLater,
}


def group_of_status(status: int) -> type[HaversackError]:
    """The error group of an HTTP status, for answers whose kind we do not know."""
    known = _GROUP_BY_STATUS.get(status)
    if known is not None:
        return known
    if 400 <= status < 500:
        return BadRequest
    return OperatorNeeded if 500 <= status < 600 else HaversackError


def error_of_answer(status: int, body: bytes, headers: Mapping[str, str]) -> HaversackError:
    """Rebuild the error that an answer of status >= 300 carries."""
    group = group_of_status(status)
    try:
        described = orjson.loads(body)["error"]
        error = error_of_json(described, group)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        error = rebuild(
            "", f"the server answered HTTP {status} without a reason of ours", {}, group
        )
        error.details["kind"] = f"http_{status}"
    retry_after_s = _seconds(headers.get("Retry-After"))
    if retry_after_s is not None:
        error.details["retry_after_s"] = retry_after_s
    error.details.setdefault("status", status)
    return error


def error_of_json(described: Any, group: type[HaversackError] = HaversackError) -> HaversackError:
    """Rebuild an error from its JSON form `{"kind", "message", "details"}`.

    Raises TypeError or KeyError for anything else.
    """
    if not isinstance(described, dict):
        raise TypeError("an error is an object")
    details = described.get("details")
    return rebuild(
        str(described["kind"]),
        str(described["message"])[:_MESSAGE_CHARACTERS_MAX],
        details if isinstance(details, dict) else {},
        group,
    )


def _seconds(text: str | None) -> float | None:
    """`Retry-After` in seconds; its date form is treated as absent."""
    if text is None or not text.isascii() or not text.isdigit():
        return None
    return float(min(int(text), 3600))
