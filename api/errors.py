"""The one table from error kinds to HTTP, and the body that carries an error.

Last step of every walk that fails: `api/gate.py` turns whatever was raised into this shape, so
that no route has a way of its own.  The body is

    {"error": {"kind": "hash_mismatch", "message": "...", "details": {...}}}

May not import anything of `cluster` or `metadata`: errors reach here as `protocol.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from protocol.errors import HaversackError, MethodNotAllowed, RangeNotSatisfiable, Unauthenticated


class Answer(NamedTuple):
    """How a kind looks on the wire."""

    status: int
    retry_after_s: int | None = None


_LATER: Final = Answer(503, 1)

ANSWERS: Final[Mapping[str, Answer]] = MappingProxyType(
    {
        # Retry later: nothing was done.
        "unavailable": _LATER,
        "node_unavailable": _LATER,
        "node_full": _LATER,
        "node_refuses": _LATER,
        "stale_epoch": _LATER,
        "stale_incarnation": _LATER,
        "not_enough_nodes": Answer(503, 5),
        "database_busy": _LATER,
        "not_leader": _LATER,
        "overloaded": Answer(429, 1),
        "request_timeout": Answer(408),
        # It may have been done.
        "unknown_outcome": Answer(504),
        # Bytes on a disk are missing or wrong: repair will bring the block back, if anything can.
        "needs_repair": Answer(503, 30),
        "corrupt_fragment": Answer(503, 30),
        "fragment_not_found": Answer(503, 30),
        "block_unreadable": Answer(503, 30),
        # The caller must change the request.
        "invalid_request": Answer(422),
        "malformed_hash": Answer(422),
        "malformed_id": Answer(422),
        "invalid_path": Answer(422),
        "hash_mismatch": Answer(400),
        "malformed_http": Answer(400),
        "header_too_large": Answer(431),
        "length_required": Answer(411),
        "block_too_large": Answer(413),
        "body_too_large": Answer(413),
        "range_not_satisfiable": Answer(416),
        "quota_exceeded": Answer(403),
        "unauthenticated": Answer(401),
        "forbidden": Answer(403),
        "route_not_found": Answer(404),
        "method_not_allowed": Answer(405),
        "block_not_found": Answer(404),
        "entry_not_found": Answer(404),
        "node_not_found": Answer(404),
        "job_not_found": Answer(404),
        "wrong_state": Answer(409),
        "conflict": Answer(409),
        "missing_blocks": Answer(409),
        # A person must act.
        "operator_needed": Answer(500),
        "config_invalid": Answer(500),
        "directory_in_use": Answer(500),
        "directory_foreign": Answer(500),
        "directory_corrupt": Answer(500),
        "handshake_refused": Answer(500),
        "scheme_unsupported": Answer(500),
        "format_unsupported": Answer(500),
        # A data-port connection broke its protocol: the next one may do better.
        "malformed_frame": _LATER,
        # Ours, or of the client's end: never meant to be seen here.
        "internal": Answer(500),
        "server_unreachable": Answer(500),
        "corrupt_reply": Answer(500),
        "file_changed": Answer(500),
        "path_occupied": Answer(500),
        "local_file_error": Answer(500),
    }
)


def answer_for(error: HaversackError) -> Answer:
    """The table's row.  A kind that is missing there is a mistake of ours, not a 500 in silence:
    `tests/unit/test_api_errors.py` walks every class."""
    return ANSWERS[error.kind]


def error_body(error: HaversackError) -> dict[str, Any]:
    """The inner object: kind, message, details."""
    return {"kind": error.kind, "message": error.message, "details": error.details}


def render(error: HaversackError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, extra headers and body of the answer to a request that failed with `error`."""
    status, retry_after_s = answer_for(error)
    headers: list[tuple[bytes, bytes]] = []
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b'Bearer realm="haversack"'))
    elif isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.details["allow"]).encode("ascii")))
    elif isinstance(error, RangeNotSatisfiable):
        headers.append((b"content-range", b"bytes */%d" % error.details["length"]))
    return status, headers, encode({"error": error_body(error)})


def encode(value: object) -> bytes:
    """JSON of plain values.  Text that UTF-8 cannot carry (a lone surrogate that came in through
    a path) is escaped, so that an error about it can still be told."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return orjson.dumps(_printable(value))


def _printable(value: object) -> object:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        case Mapping():
            return {str(_printable(str(key))): _printable(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_printable(item) for item in value]
        case int() if abs(value) < 2**63:
            return value
        case float() | None:
            return value
        case _:
            return str(value)
