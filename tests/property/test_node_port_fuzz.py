"""Any bytes at all on the data port: understood as sent, or the end of that connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from node_parts import CLUSTER_ID, IDENTITY, SECRET, at_once, fragment_key, fragment_record, noise

from protocol.clock import SystemClock
from protocol.errors import FormatUnsupported
from protocol.frames import FrameHeader, MalformedFrame, Op, Status, pack_header, unpack_header
from protocol.limits import FRAME_BODY_BYTES_MAX, KIB
from protocol.messages import (
    Challenge,
    DeleteRequest,
    GetRequest,
    Hello,
    InventoryRequest,
    LeaseRequest,
    PutRequest,
    SummaryRequest,
)
from storage_node import handshake
from storage_node.memory_store import MemoryStore
from storage_node.node import StorageNode
from storage_node.port_frames import SCRATCH_BYTES, FrameProtocol, decode
from storage_node.port_server import DataPort, _Connection


class Wire:
    """A transport that keeps what is written and can be paused."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.ended = False
        self.reading = True

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            self.sent += piece

    def abort(self) -> None:
        self.ended = True

    close = abort

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        return None


def deliver(protocol: FrameProtocol, wire: Wire, data: bytes, sizes: Sequence[int]) -> None:
    """Hand `data` over in pieces of `sizes`, repeated, as a socket would."""
    position = turn = 0
    while position < len(data) and not wire.ended:
        room = protocol.get_buffer(-1)
        size = min(len(room), sizes[turn % len(sizes)], len(data) - position)
        room[:size] = data[position : position + size]
        protocol.buffer_updated(size)
        position += size
        turn += 1


class Listener(FrameProtocol):
    """Remembers the frames it received."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[Op, bytes, bytes]] = []

    def frame_received(self, header: FrameHeader, meta: bytearray, body: memoryview) -> None:
        self.frames.append((header.op, bytes(meta), bytes(body)))


def listener() -> tuple[Listener, Wire]:
    made, wire = Listener(), Wire()
    made.connection_made(cast("asyncio.Transport", wire))
    made.trust()
    return made, wire


def frame(op: Op, meta: bytes, body: bytes = b"") -> bytes:
    return pack_header(op, Status.REQUEST, 1, meta, len(body)) + meta + body


body_sizes = st.one_of(
    st.integers(0, 200), st.sampled_from([SCRATCH_BYTES - 40, SCRATCH_BYTES, SCRATCH_BYTES + 999])
)
frames = st.lists(
    st.tuples(st.sampled_from(Op), st.binary(max_size=300), body_sizes), max_size=6
)  # op, meta, bytes of body


def _with_bodies(drawn: list[tuple[Op, bytes, int]]) -> list[tuple[Op, bytes, bytes]]:
    return [(op, meta, noise(number, size)) for number, (op, meta, size) in enumerate(drawn)]


splits = st.lists(
    st.one_of(st.integers(1, 100), st.integers(1000, 100_000)), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(drawn=frames, sizes=splits)
def test_frames_arrive_whole_however_the_stream_is_cut(
    drawn: list[tuple[Op, bytes, int]], sizes: list[int]
) -> None:
    sent = _with_bodies(drawn)
    protocol, wire = listener()
    deliver(protocol, wire, b"".join(frame(*item) for item in sent), sizes)
    assert protocol.frames == sent
    assert not wire.ended


@settings(deadline=None)
@given(drawn=frames.filter(bool), sizes=splits, data=st.data())
def test_a_changed_header_or_meta_is_never_taken_for_a_frame(
    drawn: list[tuple[Op, bytes, int]], sizes: list[int], data: st.DataObject
) -> None:
    sent = _with_bodies(drawn)
    number = data.draw(st.integers(0, len(sent) - 1))
    before = b"".join(frame(*item) for item in sent[:number])
    changed = bytearray(frame(*sent[number]))
    guarded = len(changed) - len(sent[number][2])
    position = data.draw(st.integers(0, guarded - 1))
    changed[position] ^= data.draw(st.integers(1, 255))
    protocol, wire = listener()
    after = b"".join(frame(*item) for item in sent[number + 1 :])
    deliver(protocol, wire, before + bytes(changed) + after, sizes)
    assert protocol.frames[:number] == sent[:number]
    assert protocol.frames[number:] == []


@settings(deadline=None)
@given(noise=st.binary(max_size=500), sizes=splits)
def test_any_bytes_are_a_frame_or_the_end(noise: bytes, sizes: list[int]) -> None:
    protocol, wire = listener()
    deliver(protocol, wire, noise, sizes)
    if protocol.frames or wire.ended or len(noise) < 32:
        return
    header = unpack_header(noise)  # a header that is right so far, waiting for the rest
    assert header.meta_length + header.body_length > len(noise) - 32


@given(header=st.binary(min_size=32, max_size=32))
def test_a_header_is_read_or_refused_and_never_trusted_beyond_the_limits(header: bytes) -> None:
    try:
        read = unpack_header(header)
    except (MalformedFrame, FormatUnsupported):
        return
    assert read.body_length <= FRAME_BODY_BYTES_MAX


# -- the server behind it ----------------------------------------------------------------------

keys = st.lists(st.integers(0, 5).map(lambda n: fragment_key(n).pack()), max_size=4)
odd_keys = st.lists(st.binary(max_size=50), max_size=3)
requests = st.one_of(
    st.tuples(
        st.just(Op.PUT),
        st.builds(PutRequest, st.integers(0, 3), st.lists(st.integers(-5, 2000), max_size=4)),
    ),
    st.tuples(st.just(Op.GET), st.builds(GetRequest, st.one_of(keys, odd_keys))),
    st.tuples(
        st.just(Op.DELETE), st.builds(DeleteRequest, st.integers(0, 2), st.one_of(keys, odd_keys))
    ),
    st.tuples(
        st.just(Op.LEASE), st.builds(LeaseRequest, st.integers(-3, 2), st.integers(-5, 10**12))
    ),
    st.tuples(st.just(Op.SUMMARY), st.just(SummaryRequest())),
    st.tuples(
        st.just(Op.INVENTORY),
        st.builds(
            InventoryRequest, st.one_of(st.just(b""), st.binary(max_size=60)), st.integers(-2, 10)
        ),
    ),
)
metas = st.one_of(
    requests.map(lambda item: (item[0], msgspec.msgpack.encode(item[1]))),
    st.tuples(st.sampled_from(Op), st.binary(max_size=100)),
)
bodies = st.one_of(
    st.just(b""),
    st.binary(max_size=100),
    st.integers(0, 5).map(lambda number: fragment_record(number, 1 * KIB)[1]),
)


async def _answered(chunks: list[bytes], *, authenticated: bool, sizes: list[int]) -> None:
    """Feed one connection; whatever it is, the node serves the next client."""
    store = MemoryStore()
    node = StorageNode(IDENTITY, store, SystemClock(), at_once)
    await node.lease(1, 3600)
    kept, record = fragment_record(99)
    await node.put(1, [record])
    port = DataPort(node, SECRET, os.urandom)
    connection, wire = _Connection(port), Wire()
    connection.connection_made(cast("asyncio.Transport", wire))
    if authenticated:
        _prove(connection, wire)
    for chunk in chunks:
        deliver(connection, wire, chunk, sizes)
    while connection.requests:
        await asyncio.wait(connection.requests)
    connection.connection_lost(None)
    assert port.body_bytes == 0
    assert port.strangers == 0
    assert not port.connections
    assert node.incarnation in (1, 2)
    (answer,) = await node.get([kept])
    assert answer.record == record
    assert authenticated or node.store is store


def _prove(connection: FrameProtocol, wire: Wire) -> None:
    hello = Hello(CLUSTER_ID, str(IDENTITY.node_id), bytes(handshake.NONCE_BYTES))
    deliver(connection, wire, frame(Op.HELLO, msgspec.msgpack.encode(hello)), [1000])
    answer: Any = decode(Challenge, bytes(wire.sent[32:]))
    proof = handshake.prove(SECRET, hello, answer)
    deliver(connection, wire, frame(Op.PROVE, msgspec.msgpack.encode(proof)), [1000])
    assert not wire.ended


@settings(deadline=None, max_examples=100)
@given(chunks=st.lists(st.binary(max_size=300), max_size=4), sizes=splits, proven=st.booleans())
def test_noise_harms_nothing_before_or_after_the_handshake(
    chunks: list[bytes], sizes: list[int], proven: bool
) -> None:
    asyncio.run(_answered(chunks, authenticated=proven, sizes=sizes))


@settings(deadline=None, max_examples=150)
@given(sent=st.lists(st.tuples(metas, bodies), max_size=5), sizes=splits, proven=st.booleans())
def test_well_framed_nonsense_harms_nothing(
    sent: list[tuple[tuple[Op, bytes], bytes]], sizes: list[int], proven: bool
) -> None:
    chunks = [frame(op, meta, body) for (op, meta), body in sent]
    asyncio.run(_answered(chunks, authenticated=proven, sizes=sizes))
