"""The one exception tree, grouped by what the caller does next.

    HaversackError
    ├── RetryLater              the same call may succeed later or elsewhere; nothing was done
    │   ├── NodeUnavailable       no connection, or no answer before the deadline
    │   ├── NodeFull              the disk refuses writes; reads and deletes go on
    │   ├── NodeRefuses           the node does not serve: no lease, wrong identity, opening, failed
    │   ├── StaleEpoch            the caller's map of a volume is old: refresh it
    │   ├── StaleIncarnation      the caller spoke to a node's earlier life: refresh the map
    │   ├── NotEnoughNodes        fewer healthy failure domains than the operation needs
    │   ├── DatabaseBusy          the SQL database is locked or away
    │   ├── NotLeader             another process holds the role now: ask that one
    │   ├── Overloaded            a bounded queue is full, or a rate limit was reached
    │   ├── RequestTimeout        a request's header or body did not arrive in time
    │   ├── ServerUnreachable     client side: the HTTP server does not answer
    │   ├── CorruptReply          client side: an answer that is cut, or is not what it claims
    │   └── FileChanged           client side: a local file changed while it was read
    ├── UnknownOutcome          it may have been done: ask before doing it again
    ├── NeedsRepair             bytes are missing or wrong on a disk: read elsewhere, repair
    │   ├── CorruptFragment
    │   ├── FragmentNotFound
    │   └── BlockUnreadable       fewer than k good fragments answered
    ├── BadRequest              the caller must change the request
    │   ├── MalformedHash, MalformedId, InvalidPath, InvalidRequest
    │   ├── HashMismatch, BlockTooLarge, QuotaExceeded
    │   ├── Unauthenticated, Forbidden
    │   ├── BlockNotFound, EntryNotFound, NodeNotFound, JobNotFound
    │   ├── WrongState            what is asked for does not fit what the thing is doing now
    │   ├── RevConflict, MissingBlocks
    │   ├── MalformedHttp, HeaderTooLarge, LengthRequired, BodyTooLarge, RangeNotSatisfiable
    │   ├── RouteNotFound, MethodNotAllowed
    │   └── PathOccupied          client side: something else stands where a file should go
    └── OperatorNeeded          retrying cannot help: a person must act
        ├── ConfigInvalid
        ├── DirectoryInUse
        ├── DirectoryForeign      empty or another node's directory where ours was expected
        ├── DirectoryCorrupt
        ├── HandshakeRefused      wrong cluster secret, cluster or node
        ├── SchemeUnsupported
        ├── FormatUnsupported     written by a newer version
        └── LocalFileError        client side: the local file system refused

Each class has a stable `kind` (append-only: clients match on it).  `api/errors.py` holds the one
table from kinds to HTTP.  A message says what happened, to what, and what to do about it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class HaversackError(Exception):
    """Root of the tree.  `details` is JSON-ready and never holds a secret."""

    kind: ClassVar[str] = "internal"

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.details))


def _rebuild(cls: type[HaversackError], message: str, details: dict[str, Any]) -> HaversackError:
    """Unpickle without calling the subclass's own constructor (Ray carries errors by pickle)."""
    error = cls.__new__(cls)
    HaversackError.__init__(error, message, details)
    return error


class RetryLater(HaversackError):
    """Nothing was done; the same call may succeed later or elsewhere."""

    kind = "unavailable"


class NodeUnavailable(RetryLater):
    """No connection to a storage node, or no answer before the deadline."""

    kind = "node_unavailable"


class NodeFull(RetryLater):
    """A node's disk is above its write threshold; reads and deletes go on."""

    kind = "node_full"


class NodeRefuses(RetryLater):
    """A node is reachable and says why it does not serve this operation now."""

    kind = "node_refuses"


class StaleEpoch(RetryLater):
    """A request named an older epoch of a volume than the node has seen."""

    kind = "stale_epoch"


class StaleIncarnation(RetryLater):
    """A request was meant for another incarnation of the node."""

    kind = "stale_incarnation"


class NotEnoughNodes(RetryLater):
    """Fewer healthy failure domains than the operation needs."""

    kind = "not_enough_nodes"


class DatabaseBusy(RetryLater):
    """The SQL database is locked or unreachable; the transaction was not committed."""

    kind = "database_busy"


class NotLeader(RetryLater):
    """The process lost its role to another one, which has a higher epoch in SQL."""

    kind = "not_leader"


class Overloaded(RetryLater):
    """A bounded queue is full, or a rate limit was reached."""

    kind = "overloaded"


class RequestTimeout(RetryLater):
    """The header or the body of a request did not arrive in time; nothing was done."""

    kind = "request_timeout"


class ServerUnreachable(RetryLater):
    """The HTTP server did not answer: no connection, a broken one, or the deadline passed.

    Raised by the client only, and only where a lost answer cannot matter; a call that may have
    taken effect raises `UnknownOutcome`.
    """

    kind = "server_unreachable"


class CorruptReply(RetryLater):
    """An answer was cut short, or does not hash to the name it was asked for under."""

    kind = "corrupt_reply"


class FileChanged(RetryLater):
    """A local file changed while it was read; nothing of it was committed."""

    kind = "file_changed"


class UnknownOutcome(HaversackError):
    """The operation may have been done: ask for its state before doing it again."""

    kind = "unknown_outcome"


class NeedsRepair(HaversackError):
    """Bytes on a disk are missing or wrong."""

    kind = "needs_repair"


class CorruptFragment(NeedsRepair):
    """A fragment failed a check of its header, its checksum, its identity or its length."""

    kind = "corrupt_fragment"


class FragmentNotFound(NeedsRepair):
    """A node answered, after a complete look, that it does not hold the fragment."""

    kind = "fragment_not_found"


class BlockUnreadable(NeedsRepair):
    """Fewer than k good fragments of a block answered."""

    kind = "block_unreadable"


class BadRequest(HaversackError):
    """The caller must change the request before it can succeed."""

    kind = "invalid_request"


class InvalidRequest(BadRequest):
    """A request that parses but means nothing we can do."""

    kind = "invalid_request"


class MalformedHash(BadRequest):
    """Not 64 lower-case hex digits."""

    kind = "malformed_hash"

    def __init__(self, text: str) -> None:
        shown = text if len(text) <= 80 else text[:77] + "..."
        super().__init__(
            f"{shown!r} is not a block hash: send the SHA-256 as 64 lower-case hex digits",
            {"hash": shown},
        )


class MalformedId(BadRequest):
    """A node or volume name that does not parse."""

    kind = "malformed_id"

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{text[:80]!r} is not a {what} id", {"what": what, "id": text[:80]})


class InvalidPath(BadRequest):
    """A path that no entry can have."""

    kind = "invalid_path"


class HashMismatch(BadRequest):
    """A body does not hash to the name it was sent under."""

    kind = "hash_mismatch"


class BlockTooLarge(BadRequest):
    """A block above the block size limit."""

    kind = "block_too_large"


class QuotaExceeded(BadRequest):
    """A commit would take a namespace over its quota."""

    kind = "quota_exceeded"


class Unauthenticated(BadRequest):
    """No token, or one that is unknown, expired or revoked."""

    kind = "unauthenticated"


class Forbidden(BadRequest):
    """A known caller without the right to this."""

    kind = "forbidden"


class BlockNotFound(BadRequest):
    """No such block, or none that the caller may know of."""

    kind = "block_not_found"

    def __init__(self, block: object) -> None:
        super().__init__(
            f"block {block} is not in the store; upload it with PUT /v1/blocks/{block}",
            {"hash": str(block)},
        )


class EntryNotFound(BadRequest):
    """No file or folder at a path."""

    kind = "entry_not_found"


class NodeNotFound(BadRequest):
    """The cell has no node of this name."""

    kind = "node_not_found"


class JobNotFound(BadRequest):
    """No job of this number."""

    kind = "job_not_found"


class WrongState(BadRequest):
    """What is asked for does not fit the present state of a node or a job; `details` say it."""

    kind = "wrong_state"


class RevConflict(BadRequest):
    """The parent revision is not the current one; `details.server` is the server's state."""

    kind = "conflict"


class MissingBlocks(BadRequest):
    """A commit names blocks the caller has no claim to; `details.missing` lists them."""

    kind = "missing_blocks"

    def __init__(self, missing: Iterable[object]) -> None:
        names = [str(block) for block in missing]
        super().__init__(
            f"{len(names)} block(s) of this commit are not claimed by the caller; "
            "upload them, then commit again",
            {"missing": names},
        )


class MalformedHttp(BadRequest):
    """Bytes that are not an HTTP/1.1 request: the connection is closed."""

    kind = "malformed_http"


class HeaderTooLarge(BadRequest):
    """A request line and header above the limit."""

    kind = "header_too_large"


class LengthRequired(BadRequest):
    """A body without Content-Length where one is needed before anything is read."""

    kind = "length_required"


class BodyTooLarge(BadRequest):
    """A body above the limit of its route."""

    kind = "body_too_large"


class RangeNotSatisfiable(BadRequest):
    """A byte range that starts after the end; `details.length` is the length."""

    kind = "range_not_satisfiable"


class RouteNotFound(BadRequest):
    """No such path in the HTTP API."""

    kind = "route_not_found"


class MethodNotAllowed(BadRequest):
    """The path exists, the method does not; `details.allow` lists those that do."""

    kind = "method_not_allowed"


class PathOccupied(BadRequest):
    """Something else stands at a local path, and overwriting it was not asked for."""

    kind = "path_occupied"


class OperatorNeeded(HaversackError):
    """Retrying cannot help: a person must act."""

    kind = "operator_needed"


class ConfigInvalid(OperatorNeeded):
    """A setting that cannot be used, or contradicts what the cell was created with."""

    kind = "config_invalid"


class DirectoryInUse(OperatorNeeded):
    """Another process holds the directory."""

    kind = "directory_in_use"


class DirectoryForeign(OperatorNeeded):
    """A directory is empty, or another node's, where a node expected its own."""

    kind = "directory_foreign"


class DirectoryCorrupt(OperatorNeeded):
    """A store cannot be opened; set the disk aside and let the cell rebuild it."""

    kind = "directory_corrupt"


class HandshakeRefused(OperatorNeeded):
    """The other end does not hold the cluster secret, or is another cluster or node."""

    kind = "handshake_refused"


class SchemeUnsupported(OperatorNeeded):
    """A redundancy scheme outside the supported range."""

    kind = "scheme_unsupported"


class FormatUnsupported(OperatorNeeded):
    """Bytes written by a newer version than this one reads."""

    kind = "format_unsupported"


class LocalFileError(OperatorNeeded):
    """The local file system refused: unreadable, full, read-only, or gone."""

    kind = "local_file_error"


def rebuild(
    kind: str,
    message: str,
    details: Mapping[str, Any],
    otherwise: type[HaversackError] = HaversackError,
) -> HaversackError:
    """The error that crossed a wire as (kind, message, details).

    A kind this version does not know becomes `otherwise`, with the kind kept in the details: new
    kinds may appear, the groups stay.
    """
    known = _classes_by_kind().get(kind)
    if known is None:
        return _rebuild(otherwise, message, {**details, "kind": kind})
    return _rebuild(known, message, dict(details))


@functools.cache
def _classes_by_kind() -> dict[str, type[HaversackError]]:
    """Every kind; where a group shares its kind with a leaf, the leaf."""
    found: dict[str, type[HaversackError]] = {HaversackError.kind: HaversackError}
    queue: list[type[HaversackError]] = [HaversackError]
    while queue:
        for child in queue.pop(0).__subclasses__():
            found[child.kind] = child
            queue.append(child)
    return found
