"""`SocketPort`: a node as a gateway sees it, over one connection to its data port.

Called by `cluster.node_pool` and `cluster.block_client` (put, get, delete) and by the placement
service (lease, summary, inventory).  Connects on the first call and again after a loss; many
calls share the connection.  Imports nothing above `storage_node`, no ray, no rocksdict.

What a caller may conclude: `NodeUnavailable` and other `RetryLater` errors mean that nothing was
done; a put or delete that was sent and not answered, for whatever reason, is `UnknownOutcome`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from protocol import errors
from protocol.clock import Clock
from protocol.errors import (
    HandshakeRefused,
    HaversackError,
    InvalidRequest,
    NodeUnavailable,
    UnknownOutcome,
)
from protocol.frames import FrameHeader, MalformedFrame, Op, Status
from protocol.hashing import Buffer
from protocol.ids import NodeId
from protocol.limits import FRAME_BODY_BYTES_MAX, FRAME_ITEMS_MAX
from protocol.messages import (
    Challenge,
    DeleteReply,
    DeleteRequest,
    ErrorReply,
    FindingsReply,
    FindingsRequest,
    GetReply,
    GetRequest,
    Hello,
    InventoryReply,
    InventoryRequest,
    ItemStatus,
    LeaseReply,
    LeaseRequest,
    Message,
    Prove,
    PutPurpose,
    PutReply,
    PutRequest,
    ScrubAction,
    ScrubProgress,
    ScrubRequest,
    SummaryReply,
    SummaryRequest,
    VerifyReply,
    VerifyRequest,
    Welcome,
)
from storage_node import handshake
from storage_node.interface import FragmentKey, PutOutcome, StoredRecord, VerifiedRecord
from storage_node.port_frames import FrameProtocol, decode

_MUTATING: Final = frozenset({Op.PUT, Op.DELETE})
_M = TypeVar("_M", bound=Message)


class _Reply(NamedTuple):
    header: FrameHeader
    meta: bytearray
    body: memoryview


class SocketPort:
    """`NodePort` over TCP."""

    def __init__(
        self,
        node_id: NodeId,
        endpoint: str,
        cluster_id: str,
        secret: bytes,
        clock: Clock,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._node_id = node_id
        self._endpoint = endpoint
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(f"{endpoint!r} is not host:port", {"node": node_id})
        self._address = (host.strip("[]"), int(port))
        self._cluster_id = cluster_id
        self._secret = secret
        self._clock = clock
        self._entropy = entropy
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._closed = False

    @property
    def node_id(self) -> NodeId:
        return self._node_id

    @property
    def endpoint(self) -> str:
        return self._endpoint

    @property
    def connected(self) -> bool:
        """True while a connection that passed the handshake is open."""
        return self._connection is not None and not self._connection.closed

    # -- operations ------------------------------------------------------------------------

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        """Store records, each given in pieces.  Raises `InvalidRequest` for more than a frame."""
        lengths = [sum(map(len, pieces)) for pieces in records]
        if sum(lengths) > FRAME_BODY_BYTES_MAX or len(lengths) > FRAME_ITEMS_MAX:
            raise InvalidRequest(
                f"{len(lengths)} records of {sum(lengths)} bytes: one put takes "
                f"{FRAME_ITEMS_MAX} of {FRAME_BODY_BYTES_MAX}"
            )
        body = [piece for pieces in records for piece in pieces]
        request = PutRequest(incarnation, lengths, purpose)
        answer = await self._call(Op.PUT, request, body, deadline_s)
        reply = self._decode(PutReply, answer, len(records))
        return PutOutcome(reply.incarnation, [_status(status) for status in reply.statuses])

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        """Read records; asks again for those that did not fit into one answer."""
        until = asyncio.get_running_loop().time() + deadline_s
        answers: dict[int, StoredRecord] = {}
        wanted = list(range(len(keys)))
        while wanted:
            found = await self._get_some([keys[number] for number in wanted], until)
            answers.update(zip(wanted, found, strict=True))
            left = [n for n in wanted if answers[n].status is ItemStatus.NOT_SENT]
            if len(left) == len(wanted):
                raise self._garbled(Op.GET, "a get that answers nothing")
            wanted = left
        return [answers[number] for number in range(len(keys))]

    async def _get_some(self, keys: list[FragmentKey], until: float) -> list[StoredRecord]:
        request = GetRequest([key.pack() for key in keys])
        answer = await self._call(Op.GET, request, (), until - asyncio.get_running_loop().time())
        reply = self._decode(GetReply, answer, len(keys))
        if sum(reply.lengths) != len(answer.body) or min(reply.lengths, default=0) < 0:
            raise self._garbled(Op.GET, "lengths that do not divide the body of a get")
        found = []
        position = 0
        for status, length in zip(reply.statuses, reply.lengths, strict=True):
            record = answer.body[position : position + length]
            position += length
            ok = status == ItemStatus.OK
            found.append(StoredRecord(_status(status), record if ok else None))
        return found

    async def delete(
        self, incarnation: int, keys: Sequence[FragmentKey], deadline_s: float
    ) -> list[ItemStatus]:
        """Remove fragments."""
        request = DeleteRequest(incarnation, [key.pack() for key in keys])
        answer = await self._call(Op.DELETE, request, (), deadline_s)
        reply = self._decode(DeleteReply, answer, len(keys))
        return [_status(status) for status in reply.statuses]

    async def lease(self, incarnation: int, lease_s: float, deadline_s: float) -> LeaseReply:
        """Grant or renew the right to acknowledge writes."""
        request = LeaseRequest(incarnation, round(lease_s * 1000))
        return self._decode(LeaseReply, await self._call(Op.LEASE, request, (), deadline_s))

    async def summary(self, deadline_s: float) -> SummaryReply:
        """State and counts."""
        answer = await self._call(Op.SUMMARY, SummaryRequest(), (), deadline_s)
        return self._decode(SummaryReply, answer)

    async def inventory(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> InventoryReply:
        """A page of what the node holds."""
        request = InventoryRequest(b"" if after is None else after.pack(), limit)
        return self._decode(InventoryReply, await self._call(Op.INVENTORY, request, (), deadline_s))

    async def verify(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[VerifiedRecord]:
        """Have records checked where they are; asks again for those the node did not get to."""
        until = asyncio.get_running_loop().time() + deadline_s
        found: list[VerifiedRecord] = []
        while len(found) < len(keys):
            wanted = keys[len(found) :]
            left_s = until - asyncio.get_running_loop().time()
            request = VerifyRequest([key.pack() for key in wanted])
            reply = self._decode(
                VerifyReply, await self._call(Op.VERIFY, request, (), left_s), len(wanted)
            )
            columns = (reply.statuses, reply.lengths, reply.epochs, reply.stripe_tags)
            if len(set(map(len, columns))) != 1:
                raise self._garbled(Op.VERIFY, "columns of different lengths")
            records = [
                VerifiedRecord(_status(row[0]), *row[1:]) for row in zip(*columns, strict=True)
            ]
            read = [record for record in records if record.status is not ItemStatus.NOT_SENT]
            if not read:
                raise self._garbled(Op.VERIFY, "a verify that answers nothing")
            found += read
        return found

    async def scrub(
        self, action: ScrubAction, bytes_per_s: int, deadline_s: float
    ) -> ScrubProgress:
        """Start, pause or resume the node's scrub; where it stands now."""
        request = ScrubRequest(action, bytes_per_s)
        return self._decode(ScrubProgress, await self._call(Op.SCRUB, request, (), deadline_s))

    async def findings(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> FindingsReply:
        """A page of the fragments that the node has set aside."""
        request = FindingsRequest(b"" if after is None else after.pack(), limit)
        answer = await self._call(Op.FINDINGS, request, (), deadline_s)
        reply = self._decode(FindingsReply, answer)
        if not len(reply.keys) == len(reply.statuses) == len(reply.found_at):
            raise self._garbled(Op.FINDINGS, "columns of different lengths")
        return reply

    async def close(self) -> None:
        """Close the connection.  Idempotent."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.shut()

    # -- calls -----------------------------------------------------------------------------

    async def _call(
        self, op: Op, request: Message, body: Sequence[Buffer], deadline_s: float
    ) -> _Reply:
        loop = asyncio.get_running_loop()
        started = loop.time()
        connection: _Connection | None = None
        answer: asyncio.Future[_Reply] | None = None
        try:
            async with asyncio.timeout_at(started + deadline_s):
                connection = await self._connected()
                await connection.writable.wait()
                answer = connection.ask(op, request, body)
                reply = await answer
        except TimeoutError as error:
            if connection is not None and connection.silent_for(loop.time()) >= SILENT_SECONDS:
                connection.shut()
            raise self._lost(op, answer, f"no answer within {deadline_s:g} s") from error
        except _ConnectionLost as error:
            raise self._lost(op, answer, str(error)) from error
        if reply.header.status is Status.ERROR:
            raise self._refused(self._decode(ErrorReply, reply))
        return reply

    def _lost(
        self, op: Op, sent: asyncio.Future[_Reply] | None, why: str
    ) -> NodeUnavailable | UnknownOutcome:
        details = {"node": self._node_id, "endpoint": self._endpoint}
        if sent is not None and op in _MUTATING:
            return UnknownOutcome(
                f"{op.name} was sent to {self._node_id} and not answered: {why}", details
            )
        return NodeUnavailable(f"{self._node_id} at {self._endpoint}: {why}", details)

    def _refused(self, reply: ErrorReply) -> HaversackError:
        return errors.rebuild(reply.kind, reply.message, reply.details)

    def _decode(self, kind: type[_M], answer: _Reply, items: int | None = None) -> _M:
        """The typed answer; one that is not well-formed costs the connection."""
        try:
            reply = decode(kind, answer.meta)
        except MalformedFrame as error:
            raise self._garbled(answer.header.op, str(error)) from error
        if items is not None and len(getattr(reply, "statuses", ())) != items:
            raise self._garbled(answer.header.op, f"{kind.__name__} without {items} statuses")
        return reply

    def _garbled(self, op: Op, what: str) -> HaversackError:
        if self._connection is not None:
            self._connection.fail(MalformedFrame(what))
        details = {"node": self._node_id, "endpoint": self._endpoint}
        kind = UnknownOutcome if op in _MUTATING else NodeUnavailable
        return kind(f"{self._node_id} answered {op.name} with {what}", details)

    async def _connected(self) -> _Connection:
        if self._closed:
            raise _ConnectionLost("the port was closed")
        if self._connection is not None and not self._connection.closed:
            return self._connection
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._connect_ended)
        connecting = self._connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if connecting.cancelled():  # by `close`; this caller was not
                raise _ConnectionLost("the port was closed") from None
            raise

    def _connect_ended(self, task: asyncio.Task[_Connection]) -> None:
        self._connecting = None
        if task.cancelled() or task.exception() is not None:
            return
        self._connection = task.result()
        if self._closed:
            self._connection.shut()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop.time), *self._address
                )
                try:
                    await self._prove(connection)
                except BaseException:
                    connection.shut()
                    raise
        except TimeoutError as error:
            raise _ConnectionLost(f"no handshake within {CONNECT_SECONDS:g} s") from error
        except OSError as error:
            raise _ConnectionLost(f"cannot connect: {error.strerror or error}") from error
        return connection

    async def _prove(self, connection: _Connection) -> None:
        hello = Hello(self._cluster_id, self._node_id, self._entropy(handshake.NONCE_BYTES))
        received = await self._greet(connection, Op.HELLO, hello, Challenge)
        proof: Prove = handshake.prove(self._secret, hello, received)
        connection.trust()
        await self._greet(connection, Op.PROVE, proof, Welcome)

    async def _greet(self, connection: _Connection, op: Op, message: Message, kind: type[_M]) -> _M:
        reply = await connection.ask(op, message, ())
        try:
            if reply.header.status is Status.ERROR:
                refusal = self._refused(decode(ErrorReply, reply.meta))
                if isinstance(refusal, HandshakeRefused):
                    raise refusal
                raise _ConnectionLost(f"handshake failed: {refusal}")
            return decode(kind, reply.meta)
        except MalformedFrame as error:
            raise _ConnectionLost(f"handshake failed: {error}") from error


CONNECT_SECONDS: Final = 5.0
"""Bounds connecting and the handshake, whatever the deadline of the call that started them."""


SILENT_SECONDS: Final = 2.0
"""A connection on which nothing was heard for this long while answers were due is given up, so
that the next call connects anew instead of waiting behind a partition."""


def _status(number: int) -> ItemStatus:
    """A status of a newer node than this program counts as one that says nothing."""
    try:
        return ItemStatus(number)
    except ValueError:
        return ItemStatus.IO_ERROR


class _ConnectionLost(Exception):
    """Inside this file: the connection is gone, or could not be made."""


class _Connection(FrameProtocol):
    """The client's end: who waits for which answer."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self._now = now
        self._asked_since: float | None = None  # the first request since something was heard
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[_Reply]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, op: Op, message: Message, body: Sequence[Buffer]) -> asyncio.Future[_Reply]:
        """Send a request; the future gets its answer, or `_ConnectionLost`."""
        if self.closed:
            raise _ConnectionLost(str(self.failure or "the connection was closed"))
        if self._asked_since is None:
            self._asked_since = self._now()
        number = next(self._ids)
        answer: asyncio.Future[_Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))
        self.send(op, Status.REQUEST, number, message, body)
        return answer

    def silent_for(self, now: float) -> float:
        """Seconds for which answers were due and nothing came."""
        return 0.0 if self._asked_since is None else now - self._asked_since

    def shut(self) -> None:
        """Close at once."""
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def buffer_updated(self, nbytes: int) -> None:
        self._asked_since = None
        super().buffer_updated(nbytes)

    def frame_received(self, header: FrameHeader, meta: bytearray, body: memoryview) -> None:
        if header.status is Status.REQUEST:
            raise MalformedFrame("a node sent a request")
        answer = self._waiting.get(header.request_id)
        if answer is not None and not answer.done():
            answer.set_result(_Reply(header, meta, body))

    def connection_ended(self, error: Exception | None) -> None:
        lost = _ConnectionLost(f"connection lost: {error}" if error else "connection lost")
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(lost)
                answer.exception()  # its caller may have been cancelled
