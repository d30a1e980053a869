"""The data port of a node: frames in, `StorageNode` calls, frames out.

Step "receive and answer" of every walk on a node; started by the actor (and by tests) with
`serve`.  Nobody is served before the handshake; until then only greeting-sized frames are read,
against a deadline.  Afterwards many requests are in flight per connection, each in a task of its
own; answers leave in the order in which they are done.

Back-pressure: a connection is not read from while it has too many requests in work, while its
answers are not taken, or while the bodies in work on all connections exceed the queue limit; the
rest waits in the kernel and in the senders.  A malformed frame ends its connection, nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import HandshakeRefused, HaversackError, InvalidRequest, NodeRefuses
from protocol.frames import FrameHeader, MalformedFrame, Op, Status
from protocol.hashing import Buffer
from protocol.limits import (
    FRAME_ITEMS_MAX,
    KIB,
    NODE_INFLIGHT_REQUESTS_MAX,
    NODE_QUEUE_BYTES_MAX,
)
from protocol.messages import (
    Challenge,
    DeleteReply,
    DeleteRequest,
    ErrorReply,
    FindingsRequest,
    GetReply,
    GetRequest,
    Hello,
    InventoryRequest,
    LeaseRequest,
    Message,
    Prove,
    PutPurpose,
    PutReply,
    PutRequest,
    ScrubAction,
    ScrubRequest,
    SummaryRequest,
    VerifyReply,
    VerifyRequest,
    Welcome,
)
from storage_node import handshake
from storage_node.interface import FragmentKey, VerifiedRecord
from storage_node.node import StorageNode
from storage_node.port_frames import FrameProtocol, decode

HANDSHAKE_SECONDS: Final = 5.0
"""An unauthenticated connection is closed after this."""

CLOSE_SECONDS: Final = 10.0
"""How long a closing port waits for requests in work."""

STRANGERS_MAX: Final = 64
"""Unauthenticated connections at a time; one more is closed at once."""

LEASE_MS_MAX: Final = 3_600_000
_KEY_BYTES: Final = 41
_ERROR_TEXT_MAX: Final = 2 * KIB
_log = logging.getLogger("haversack.port")


@dataclass(slots=True)
class DataPort:
    """A listening data port and what its connections share."""

    node: StorageNode
    secret: bytes
    entropy: Callable[[int], bytes]
    body_bytes_max: int = NODE_QUEUE_BYTES_MAX
    body_bytes: int = 0
    """Bodies being received or in work, on all connections."""
    connections: set[_Connection] = field(default_factory=set)
    waiting: deque[_Connection] = field(default_factory=deque)
    """Connections held until bodies in work are done, longest first."""
    strangers: int = 0
    server: asyncio.Server | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: host and the port that the system chose."""
        assert self.server is not None
        host, port = self.server.sockets[0].getsockname()[:2]
        return host, port

    @property
    def endpoint(self) -> str:
        """`host:port`, as registered with placement."""
        host, port = self.address
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stop listening and drop every connection; returns when the requests in work, which
        are not answered any more, have let go of the node."""
        if self.server is not None:
            self.server.close()
        working = [task for connection in self.connections for task in connection.requests]
        for connection in list(self.connections):
            connection.shut()
        if working:
            await asyncio.wait(working, timeout=CLOSE_SECONDS)
        if self.server is not None:
            await self.server.wait_closed()

    def reserve(self, size: int, connection: _Connection) -> bool:
        """Take room for a body, or remember that `connection` waits for it."""
        if self.body_bytes and self.body_bytes + size > self.body_bytes_max:
            self.waiting.append(connection)
            return False
        self.body_bytes += size
        return True

    def release(self, size: int) -> None:
        """Give the room of a finished body back."""
        self.body_bytes -= size
        for _ in range(len(self.waiting)):
            self.waiting.popleft().room()  # one that still has none waits again


async def serve(
    node: StorageNode,
    host: str,
    port: int,
    secret: bytes,
    *,
    entropy: Callable[[int], bytes],
) -> DataPort:
    """Listen.  `port` 0 takes any free one: a restarted node must not wait for its old one."""
    data_port = DataPort(node, secret, entropy)
    loop = asyncio.get_running_loop()
    data_port.server = await loop.create_server(lambda: _Connection(data_port), host, port)
    return data_port


class _Connection(FrameProtocol):
    """One client of a node."""

    def __init__(self, port: DataPort) -> None:
        super().__init__()
        self._port = port
        self._node = port.node
        self._hello: Hello | None = None
        self._challenge: Challenge | None = None
        self._trusted = False
        self._stranger = False
        self._deadline: asyncio.TimerHandle | None = None
        self.requests: set[asyncio.Task[None]] = set()
        self._receiving = 0  # body bytes announced but not yet handed to a request
        self._paused = False

    # -- life ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._port.connections.add(self)
        if self._port.strangers >= STRANGERS_MAX:
            self.fail(HandshakeRefused("too many connections that did not prove themselves"))
            return
        self._stranger = True
        self._port.strangers += 1
        loop = asyncio.get_running_loop()
        late = HandshakeRefused(f"no handshake within {HANDSHAKE_SECONDS:g} s")
        self._deadline = loop.call_later(HANDSHAKE_SECONDS, self.fail, late)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fail(self, error: Exception) -> None:
        if not self.closed:
            _log.warning("data port of %s: connection ended: %s", self._node.node_id, error)
        super().fail(error)

    def shut(self) -> None:
        """Drop the connection because the port closes."""
        self.closed = True
        self.writable.set()
        if self.transport is not None:
            self.transport.abort()

    def connection_ended(self, error: Exception | None) -> None:
        self._port.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
        self._no_stranger()
        if self in self._port.waiting:
            self._port.waiting.remove(self)
        if self._receiving:
            self._node.commits.expect(-1)
            self._port.release(self._receiving)
            self._receiving = 0

    def _no_stranger(self) -> None:
        if self._stranger:
            self._stranger = False
            self._port.strangers -= 1

    # -- back-pressure ---------------------------------------------------------------------

    def body_announced(self, size: int) -> bool:
        if not self._port.reserve(size, self):
            self._regulate()
            return False
        self._receiving = size
        self._node.commits.expect(1)
        return True

    def room(self) -> None:
        """Bodies in work were finished: try again."""
        self.resume_receiving()
        self._regulate()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._regulate()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._regulate()

    def _regulate(self) -> None:
        """Read from the socket, or do not."""
        if self.closed or self.transport is None:
            return
        full = len(self.requests) >= NODE_INFLIGHT_REQUESTS_MAX
        pause = full or self._is_held() or not self.writable.is_set()
        if pause and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        elif not pause and self._paused:
            self._paused = False
            self.transport.resume_reading()

    def _is_held(self) -> bool:
        return self in self._port.waiting

    # -- requests --------------------------------------------------------------------------

    def frame_received(self, header: FrameHeader, meta: bytearray, body: memoryview) -> None:
        size, self._receiving = self._receiving, 0
        if size:
            self._node.commits.expect(-1)
        if header.status is not Status.REQUEST:
            self._port.release(size)
            raise MalformedFrame(f"a client sent a frame of status {header.status.name}")
        if not self._trusted:
            self._greet(header, meta)
            return
        task = asyncio.create_task(self._answer(header, meta, body, size))
        self.requests.add(task)
        if len(self.requests) >= NODE_INFLIGHT_REQUESTS_MAX:
            self._regulate()

    def _greet(self, header: FrameHeader, meta: bytearray) -> None:
        try:
            if header.op is Op.HELLO and self._hello is None:
                self._hello_received(header, decode(Hello, meta))
            elif header.op is Op.PROVE and self._hello is not None and self._challenge is not None:
                self._prove_received(header, decode(Prove, meta))
            else:
                raise HandshakeRefused(f"{header.op.name} before the handshake is done")
        except HandshakeRefused as error:
            _log.warning("data port of %s refused a client: %s", self._node.node_id, error)
            self.send(header.op, Status.ERROR, header.request_id, _error_reply(error))
            self.closed = True
            if self.transport is not None:
                self.transport.close()

    def _hello_received(self, header: FrameHeader, hello: Hello) -> None:
        identity = self._node.identity
        handshake.check_hello(hello, identity.cluster_id, identity.node_id)
        self._hello = hello
        self._challenge = handshake.challenge(
            self._port.secret,
            hello,
            self._node.incarnation,
            self._port.entropy(handshake.NONCE_BYTES),
        )
        self.send(Op.HELLO, Status.OK, header.request_id, self._challenge)

    def _prove_received(self, header: FrameHeader, proof: Prove) -> None:
        assert self._hello is not None
        assert self._challenge is not None
        handshake.check_proof(self._port.secret, self._hello, self._challenge, proof)
        self._trusted = True
        self.trust()
        self._no_stranger()
        if self._deadline is not None:
            self._deadline.cancel()
        welcome = Welcome(self._node.incarnation)
        self.send(Op.PROVE, Status.OK, header.request_id, welcome)

    async def _answer(
        self, header: FrameHeader, meta: bytearray, body: memoryview, size: int
    ) -> None:
        try:
            reply, pieces = await self._carry_out(header, meta, body)
            if not self.writable.is_set():
                await self.writable.wait()
            self.send(header.op, Status.OK, header.request_id, reply, pieces)
        except MalformedFrame as error:
            self.fail(error)
        except HaversackError as error:
            self.send(header.op, Status.ERROR, header.request_id, _error_reply(error))
        except Exception:  # noqa: BLE001  the caller must hear of it, and other requests go on
            _log.exception("data port of %s: %s failed", self._node.node_id, header.op.name)
            bug = NodeRefuses(f"{self._node.node_id} could not carry out {header.op.name}: a bug")
            self.send(header.op, Status.ERROR, header.request_id, _error_reply(bug))
        finally:
            if size:
                self._port.release(size)
            task = asyncio.current_task()
            if task is not None:
                self.requests.discard(task)
            if self._paused:
                self._regulate()

    async def _carry_out(
        self, header: FrameHeader, meta: bytearray, body: memoryview
    ) -> tuple[Message, Sequence[Buffer]]:
        """The node's answer to one request, and the answer's body."""
        node = self._node
        match header.op:
            case Op.PUT:
                put = decode(PutRequest, meta)
                records = split_body(body, put.lengths)
                outcome = await node.put(put.incarnation, records, purpose=_purpose(put))
                return PutReply(outcome.incarnation, [int(s) for s in outcome.statuses]), ()
            case Op.GET:
                found = await node.get(_keys(decode(GetRequest, meta).keys))
                pieces = [answer.record for answer in found if answer.record is not None]
                statuses = [int(answer.status) for answer in found]
                lengths = [0 if answer.record is None else len(answer.record) for answer in found]
                return GetReply(statuses, lengths), pieces
            case Op.DELETE:
                delete = decode(DeleteRequest, meta)
                done = await node.delete(delete.incarnation, _keys(delete.keys))
                return DeleteReply([int(status) for status in done]), ()
            case Op.LEASE:
                lease = decode(LeaseRequest, meta)
                if not 0 <= lease.lease_ms <= LEASE_MS_MAX:
                    raise InvalidRequest(f"a lease of {lease.lease_ms} ms")
                return await node.lease(lease.incarnation, lease.lease_ms / 1000), ()
            case Op.SUMMARY:
                decode(SummaryRequest, meta)
                return await node.summary(), ()
            case Op.INVENTORY:
                page = decode(InventoryRequest, meta)
                after = _keys([page.after])[0] if page.after else None
                return await node.inventory(after, page.limit), ()
            case Op.VERIFY:
                return _verify_reply(await node.verify(_keys(decode(VerifyRequest, meta).keys))), ()
            case Op.SCRUB:
                order = decode(ScrubRequest, meta)
                return await node.scrub(_action(order), order.bytes_per_s), ()
            case Op.FINDINGS:
                wanted = decode(FindingsRequest, meta)
                after = _keys([wanted.after])[0] if wanted.after else None
                return await node.findings(after, wanted.limit), ()
            case Op.HELLO | Op.PROVE:
                raise MalformedFrame(f"{header.op.name} after the handshake")


def split_body(body: memoryview, lengths: Sequence[int]) -> list[memoryview]:
    """The records of a body.  Raises `MalformedFrame` unless `lengths` add up to it."""
    if len(lengths) > FRAME_ITEMS_MAX or min(lengths, default=0) < 0 or sum(lengths) != len(body):
        raise MalformedFrame(f"{len(lengths)} lengths do not divide a body of {len(body)} bytes")
    records = []
    position = 0
    for length in lengths:
        records.append(body[position : position + length])
        position += length
    return records


def _purpose(request: PutRequest) -> PutPurpose:
    """A purpose of a newer gateway than this node counts as a client's: it gets no privilege."""
    try:
        return PutPurpose(request.purpose)
    except ValueError:
        return PutPurpose.CLIENT


def _action(request: ScrubRequest) -> ScrubAction:
    try:
        return ScrubAction(request.action)
    except ValueError as error:
        raise InvalidRequest(f"a scrubber cannot do {request.action}") from error


def _verify_reply(found: Sequence[VerifiedRecord]) -> VerifyReply:
    return VerifyReply(
        [int(record.status) for record in found],
        [record.length for record in found],
        [record.epoch for record in found],
        [record.stripe_tag for record in found],
    )


def _keys(packed: Sequence[bytes]) -> list[FragmentKey]:
    if len(packed) > FRAME_ITEMS_MAX or any(len(key) != _KEY_BYTES for key in packed):
        raise MalformedFrame("a list of fragment keys is too long, or holds one that is none")
    return [FragmentKey.unpack(key) for key in packed]


def _error_reply(error: HaversackError) -> ErrorReply:
    return ErrorReply(error.kind, error.message[:_ERROR_TEXT_MAX], error.details)
