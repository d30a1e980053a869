"""The data port over a real socket: honest clients, strangers, liars and lost connections."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvloop
from node_parts import (
    CLUSTER_ID,
    IDENTITY,
    SECRET,
    at_once,
    connected,
    fragment_key,
    fragment_record,
    listening,
    node_on,
    until,
)

from erasure.fragment import parse
from protocol.clock import SystemClock
from protocol.errors import (
    HandshakeRefused,
    InvalidRequest,
    NodeRefuses,
    NodeUnavailable,
    StaleIncarnation,
    UnknownOutcome,
)
from protocol.frames import HEADER_BYTES, Op, Status, pack_header, unpack_header
from protocol.ids import NodeId
from protocol.limits import FRAME_BODY_BYTES_MAX, FRAME_ITEMS_MAX, KIB, MIB
from protocol.messages import Challenge, Hello, ItemStatus, PutRequest
from storage_node import handshake, port_client, port_server
from storage_node.interface import PutOutcome, VerifiedRecord
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode
from storage_node.port_client import SocketPort
from storage_node.port_frames import SCRATCH_BYTES, decode
from storage_node.port_server import DataPort

OK, NOT_FOUND = ItemStatus.OK, ItemStatus.NOT_FOUND
DEADLINE_S = 20.0
NOISE = bytes(range(7, 71))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def port(disk: Disk) -> AsyncIterator[DataPort]:
    """A node with a long lease, listening."""
    node = node_on(MemoryStore(disk))
    await node.lease(1, 3600)
    async with listening(node) as data_port:
        yield data_port


@pytest.fixture
async def client(port: DataPort) -> AsyncIterator[SocketPort]:
    async with connected(port) as made:
        yield made


class Stranger:
    """A raw socket to the port that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: DataPort) -> Stranger:
        return cls(*await asyncio.open_connection(*port.address))

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hears_the_end(self) -> None:
        """The other end closes, whatever it says first."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionError:
                pass
        self.writer.close()

    async def frame(self) -> tuple[Any, bytes, bytes]:
        async with asyncio.timeout(DEADLINE_S):
            header = unpack_header(await self.reader.readexactly(HEADER_BYTES))
            meta = await self.reader.readexactly(header.meta_length)
            return header, meta, await self.reader.readexactly(header.body_length)

    async def prove(self) -> None:
        """An honest handshake."""
        hello = Hello(CLUSTER_ID, str(IDENTITY.node_id), os.urandom(handshake.NONCE_BYTES))
        await self.say(frame(Op.HELLO, encode(hello)))
        _, meta, _ = await self.frame()
        proof = handshake.prove(SECRET, hello, decode(Challenge, meta))
        await self.say(frame(Op.PROVE, encode(proof)))
        header, _, _ = await self.frame()
        assert header.status is Status.OK


def encode(message: Any) -> bytes:
    return msgspec.msgpack.encode(message)


def frame(op: Op, meta: bytes, body: bytes = b"", status: Status = Status.REQUEST) -> bytes:
    return pack_header(op, status, 1, meta, len(body)) + meta + body


async def assert_serves(port: DataPort) -> None:
    """The node is alive and correct for a client that behaves."""
    async with connected(port) as client:
        key, record = fragment_record(4711)
        assert (await client.put(1, [[record]], DEADLINE_S)).statuses == [OK]
        (answer,) = await client.get([key], DEADLINE_S)
        assert answer.record == record


# -- honest clients ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [0, 1, 1 * KIB, SCRATCH_BYTES - 200, SCRATCH_BYTES, SCRATCH_BYTES + 1, 700 * KIB, 4 * MIB],
)
async def test_a_record_comes_back_byte_for_byte(client: SocketPort, size: int) -> None:
    key, record = fragment_record(1, size)
    outcome = await client.put(1, [[record[:96], record[96:]]], DEADLINE_S)
    assert (outcome.incarnation, outcome.statuses) == (1, [OK])
    (answer,) = await client.get([key], DEADLINE_S)
    assert (answer.status, bytes(answer.record or b"")) == (OK, record)


async def test_a_frame_of_many_records_is_answered_one_by_one(client: SocketPort) -> None:
    records = [fragment_record(number, 10 * number) for number in range(500)]
    bad = bytearray(records[7][1])
    bad[-1] ^= 1
    pieces = [[record] if n != 7 else [bytes(bad)] for n, (_, record) in enumerate(records)]
    outcome = await client.put(1, pieces, DEADLINE_S)
    assert [n for n, status in enumerate(outcome.statuses) if status is not OK] == [7]
    answers = await client.get([key for key, _ in records], DEADLINE_S)
    for number, answer in enumerate(answers):
        assert answer.record == (None if number == 7 else records[number][1])


async def test_more_than_one_frame_can_carry_is_fetched_in_several(client: SocketPort) -> None:
    records = [fragment_record(number, 4 * MIB) for number in range(10)]
    for _, record in records:
        await client.put(1, [[record]], DEADLINE_S)
    keys = [key for key, _ in records]
    answers = await client.get([*keys, fragment_key(99)], DEADLINE_S)
    assert sum(len(record) for _, record in records) > FRAME_BODY_BYTES_MAX
    assert [answer.record for answer in answers[:-1]] == [record for _, record in records]
    assert answers[-1].status is NOT_FOUND


async def test_records_are_verified_where_they_are_however_many(client: SocketPort) -> None:
    records = [fragment_record(number, 300 * KIB) for number in range(300)]
    for start in range(0, 300, 50):
        pieces = [[record] for _, record in records[start : start + 50]]
        assert set((await client.put(1, pieces, DEADLINE_S)).statuses) == {OK}
    keys = [key for key, _ in records]
    found = await client.verify([fragment_key(999), *keys], DEADLINE_S)
    assert found[0] == VerifiedRecord(NOT_FOUND)
    for (_, record), verified in zip(records, found[1:], strict=True):
        fragment = parse(record)
        assert verified == (OK, len(record), fragment.epoch, fragment.stripe_tag)


async def test_a_verify_that_takes_several_answers_is_asked_for_again(
    client: SocketPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage_node.examine.VERIFY_BYTES_MAX", 1)
    monkeypatch.setattr("storage_node.examine._VERIFY_KEYS", 2)
    records = [fragment_record(number) for number in range(7)]
    await client.put(1, [[record] for _, record in records], DEADLINE_S)
    found = await client.verify([key for key, _ in records], DEADLINE_S)
    assert [(item.status, item.length) for item in found] == [
        (OK, len(record)) for _, record in records
    ]


async def test_every_operation_travels(client: SocketPort, port: DataPort) -> None:
    key, record = fragment_record(1)
    await client.put(1, [[record]], DEADLINE_S)
    assert await client.delete(1, [key, fragment_key(2)], DEADLINE_S) == [OK, NOT_FOUND]
    await client.put(1, [[record]], DEADLINE_S)
    page = await client.inventory(None, 10, DEADLINE_S)
    assert (page.keys, page.lengths, page.more) == ([key.pack()], [len(record)], False)
    assert (await client.inventory(key, 10, DEADLINE_S)).keys == []
    assert (await client.summary(DEADLINE_S)).fragments == 1
    answer = await client.lease(2, 60, DEADLINE_S)
    assert (answer.incarnation, answer.state) == (2, "serving")
    assert port.node.incarnation == 2


async def test_errors_arrive_as_what_they_were(client: SocketPort, port: DataPort) -> None:
    with pytest.raises(StaleIncarnation) as caught:
        await client.put(9, [[fragment_record(1)[1]]], DEADLINE_S)
    assert caught.value.details == {"node": "node-01", "incarnation": 1}
    await client.lease(2, 0, DEADLINE_S)
    with pytest.raises(NodeRefuses, match="no live lease"):
        await client.put(2, [[fragment_record(1)[1]]], DEADLINE_S)


async def test_an_oversized_put_is_refused_before_it_is_sent(client: SocketPort) -> None:
    with pytest.raises(InvalidRequest):
        await client.put(1, [[bytes(FRAME_BODY_BYTES_MAX + 1)]], DEADLINE_S)
    with pytest.raises(InvalidRequest):
        await client.put(1, [[b""]] * (FRAME_ITEMS_MAX + 1), DEADLINE_S)


async def test_many_clients_at_once_each_get_their_own_answers(port: DataPort) -> None:
    async def work(number: int) -> None:
        async with connected(port) as client:
            for turn in range(5):
                key, record = fragment_record(1000 * number + turn, 50 * KIB * (turn % 3) + turn)
                outcome, missing = await asyncio.gather(
                    client.put(1, [[record]], DEADLINE_S),
                    client.get([fragment_key(-1)], DEADLINE_S),
                )
                assert outcome.statuses == [OK]
                assert missing[0].status is NOT_FOUND
                (answer,) = await client.get([key], DEADLINE_S)
                assert answer.record == record

    await asyncio.gather(*(work(number) for number in range(30)))
    assert port.node.commits.groups < 150
    assert port.body_bytes == 0


async def test_many_requests_share_one_connection(client: SocketPort, port: DataPort) -> None:
    records = [fragment_record(number, 20 * KIB) for number in range(300)]
    await asyncio.gather(*(client.put(1, [[record]], DEADLINE_S) for _, record in records))
    answers = await asyncio.gather(*(client.get([key], DEADLINE_S) for key, _ in records))
    assert [answer.record for (answer,) in answers] == [record for _, record in records]
    assert len(port.connections) == 1


# -- strangers ---------------------------------------------------------------------------------


async def test_a_client_with_another_secret_is_refused(port: DataPort) -> None:
    async with connected(port, secret=b"x" * 32) as client:
        with pytest.raises(HandshakeRefused):
            await client.get([fragment_key(1)], DEADLINE_S)
    await assert_serves(port)


@pytest.mark.parametrize(("cluster", "node"), [("cluster-2", "node-01"), (CLUSTER_ID, "node-02")])
async def test_a_client_of_another_cluster_or_node_is_refused(
    port: DataPort, cluster: str, node: str
) -> None:
    client = SocketPort(NodeId(node), port.endpoint, cluster, SECRET, SystemClock())
    with pytest.raises(HandshakeRefused):
        await client.summary(DEADLINE_S)
    await client.close()
    await assert_serves(port)


async def test_a_node_that_does_not_hold_the_secret_gets_nothing_from_a_client() -> None:
    seen: list[bytes] = []

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))
        lie = Challenge(bytes(32), 1, bytes(32))
        writer.write(frame(Op.HELLO, encode(lie), status=Status.OK))
        seen.append(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    host, number = server.sockets[0].getsockname()
    client = SocketPort(IDENTITY.node_id, f"{host}:{number}", CLUSTER_ID, SECRET, SystemClock())
    with pytest.raises(HandshakeRefused):
        await client.put(1, [[b"secret data"]], DEADLINE_S)
    await until(lambda: len(seen) == 2)
    assert seen[1] == b""
    assert SECRET not in seen[0]
    await client.close()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100),
        bytes(64),
        NOISE,
        frame(Op.GET, b"\x91\x90"),
        frame(Op.PROVE, b"\x91\xc4\x00"),
        frame(Op.HELLO, b"not msgpack"),
        frame(Op.HELLO, b"", status=Status.OK),
        pack_header(Op.HELLO, Status.REQUEST, 1, b"", 1),
        struct.pack("<4sBBBBQII", b"HVSP", 1, 1, 0, 0, 1, 0, 2**32 - 1) + bytes(8),
        struct.pack("<4sBBBBQII", b"HVSP", 1, 1, 0, 0, 1, 2**31, 0) + bytes(8),
        struct.pack("<4sBBBBQII", b"HVSP", 2, 1, 0, 0, 1, 0, 0) + bytes(8),
        struct.pack("<4sBBBBQII", b"HVSP", 1, 99, 0, 0, 1, 0, 0) + bytes(8),
        frame(Op.HELLO, b"x" * 2000),
    ],
)
async def test_anything_but_a_handshake_ends_a_strangers_connection(
    port: DataPort, opening: bytes
) -> None:
    stranger = await Stranger.connect(port)
    await stranger.say(opening)
    await stranger.hears_the_end()
    await until(lambda: port.strangers == 0)
    await assert_serves(port)


async def test_a_stranger_that_says_nothing_is_closed_after_a_while(
    port: DataPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_server, "HANDSHAKE_SECONDS", 0.05)
    stranger = await Stranger.connect(port)
    slow = await Stranger.connect(port)
    hello = Hello(CLUSTER_ID, str(IDENTITY.node_id), os.urandom(32))
    await slow.say(frame(Op.HELLO, encode(hello)))
    await stranger.hears_the_end()
    await slow.hears_the_end()
    await assert_serves(port)


async def test_strangers_beyond_a_number_are_turned_away(
    port: DataPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_server, "STRANGERS_MAX", 3)
    waiting = [await Stranger.connect(port) for _ in range(3)]
    await until(lambda: port.strangers == 3)
    late = await Stranger.connect(port)
    await late.hears_the_end()
    for stranger in waiting:
        stranger.writer.close()
    await until(lambda: port.strangers == 0)
    await assert_serves(port)


# -- liars: authenticated, and wrong -----------------------------------------------------------


def put_frame(lengths: list[int], body: bytes) -> bytes:
    return frame(Op.PUT, encode(PutRequest(1, lengths)), body)


def corrupted(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "lie",
    [
        NOISE,
        put_frame([5], b"four"),
        put_frame([-1, 5], b"four"),
        put_frame([2**63], b""),
        frame(Op.PUT, b"\xc1"),
        frame(Op.PUT, encode([1, "x"])),
        frame(Op.GET, encode([[b"too short"]])),
        frame(Op.DELETE, encode([1, [bytes(40)]])),
        frame(Op.INVENTORY, encode([b"x", 1])),
        frame(Op.HELLO, encode(Hello("a", "b", b""))),
        frame(Op.SUMMARY, b"", status=Status.ERROR),
        corrupted(frame(Op.SUMMARY, b"\x90"), 9),
        corrupted(frame(Op.SUMMARY, b"\x90"), 30),
        corrupted(frame(Op.SUMMARY, b"\x90"), 32),
        struct.pack("<4sBBBBQII", b"HVSP", 1, 3, 0, 0, 1, 0, 33 * MIB) + bytes(8),
        struct.pack("<4sBBBBQII", b"HVSP", 1, 3, 0, 0, 1, 5 * MIB, 0) + bytes(8),
    ],
)
async def test_a_malformed_frame_ends_its_connection_and_nothing_else(
    port: DataPort, client: SocketPort, disk: Disk, lie: bytes
) -> None:
    await client.summary(DEADLINE_S)
    liar = await Stranger.connect(port)
    await liar.prove()
    await liar.say(lie)
    await liar.hears_the_end()
    assert disk.entries == {}
    assert (await client.summary(DEADLINE_S)).state == "serving"
    assert port.body_bytes == 0
    await assert_serves(port)


async def test_a_frame_cut_short_leaves_nothing_behind(port: DataPort, disk: Disk) -> None:
    whole = put_frame([len(fragment_record(1)[1])], fragment_record(1)[1])
    for length in (1, HEADER_BYTES, HEADER_BYTES + 2, len(whole) - 1):
        stranger = await Stranger.connect(port)
        await stranger.prove()
        await stranger.say(whole[:length])
        stranger.writer.close()
    await until(lambda: not port.connections)
    assert disk.entries == {}
    assert port.body_bytes == 0
    await assert_serves(port)


async def test_a_frame_in_single_bytes_is_understood(port: DataPort, disk: Disk) -> None:
    key, record = fragment_record(1, 300)
    whole = put_frame([len(record)], record) * 2
    stranger = await Stranger.connect(port)
    stranger.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await stranger.prove()
    for position in range(len(whole)):
        await stranger.say(whole[position : position + 1])
        await asyncio.sleep(0)
    for _ in range(2):
        header, _, _ = await stranger.frame()
        assert header.status is Status.OK
    assert disk.entries[key.pack()].record == record
    stranger.writer.close()


async def test_a_bug_in_the_node_is_an_answer_and_not_a_dead_connection(
    port: DataPort, client: SocketPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(port.node, "summary", broken)
    with pytest.raises(NodeRefuses, match="a bug"):
        await client.summary(DEADLINE_S)
    assert (await client.get([fragment_key(1)], DEADLINE_S))[0].status is NOT_FOUND


# -- back-pressure -----------------------------------------------------------------------------


async def all_stored(puts: Sequence[asyncio.Task[PutOutcome]]) -> None:
    assert [outcome.statuses for outcome in await asyncio.gather(*puts)] == [[OK]] * len(puts)


class Gate:
    """A `run` that stops at writes while it is shut."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        if work.__name__ == "_store_client_group":
            await self.open.wait()
        return work(*arguments)


@pytest.fixture
async def gated(disk: Disk) -> AsyncIterator[tuple[Gate, DataPort, SocketPort]]:
    async with gated_node(disk) as parts:
        yield parts


@asynccontextmanager
async def gated_node(disk: Disk) -> AsyncIterator[tuple[Gate, DataPort, SocketPort]]:
    gate = Gate()
    node = StorageNode(IDENTITY, MemoryStore(disk), SystemClock(), gate.run, run_slow=at_once)
    await node.lease(1, 3600)
    async with listening(node) as port, connected(port) as client:
        yield gate, port, client


async def test_bodies_beyond_the_limit_wait_outside_the_node(
    gated: tuple[Gate, DataPort, SocketPort],
) -> None:
    gate, port, client = gated
    port.body_bytes_max = 10 * MIB
    gate.open.clear()
    records = [fragment_record(number, 1 * MIB) for number in range(40)]
    puts = [asyncio.create_task(client.put(1, [[record]], DEADLINE_S)) for _, record in records]
    await until(lambda: bool(port.waiting))
    for _ in range(50):
        await asyncio.sleep(0.001)
        assert port.body_bytes <= 10 * MIB
    assert not any(put.done() for put in puts)
    gate.open.set()
    await all_stored(puts)
    assert port.body_bytes == 0
    assert not port.waiting


async def test_a_second_connection_gets_its_turn_while_the_first_is_held(
    gated: tuple[Gate, DataPort, SocketPort],
) -> None:
    gate, port, client = gated
    port.body_bytes_max = 3 * MIB
    async with connected(port) as second:
        gate.open.clear()
        puts = [
            asyncio.create_task(
                (client, second)[number % 2].put(
                    1, [[fragment_record(number, 1 * MIB)[1]]], DEADLINE_S
                )
            )
            for number in range(20)
        ]
        await until(lambda: len(port.waiting) == 2)
        gate.open.set()
        await all_stored(puts)


async def test_too_many_requests_stop_the_reading_until_some_are_answered(
    gated: tuple[Gate, DataPort, SocketPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, port, client = gated
    monkeypatch.setattr(port_server, "NODE_INFLIGHT_REQUESTS_MAX", 8)
    gate.open.clear()
    puts = [
        asyncio.create_task(client.put(1, [[fragment_record(n)[1]]], DEADLINE_S))
        for n in range(200)
    ]
    (connection,) = await _one_connection(port)
    await until(lambda: len(connection.requests) >= 8)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(connection.requests) < 150  # those of one read, not all
    gate.open.set()
    await all_stored(puts)


async def _one_connection(port: DataPort) -> Sequence[Any]:
    await until(lambda: len(port.connections) == 1)
    return list(port.connections)


async def test_answers_that_nobody_takes_are_not_piled_up(
    port: DataPort, client: SocketPort
) -> None:
    records = [fragment_record(number, 4 * MIB) for number in range(4)]
    for _, record in records:
        await client.put(1, [[record]], DEADLINE_S)
    greedy = await Stranger.connect(port)
    await greedy.prove()
    request = frame(Op.GET, encode([[key.pack() for key, _ in records]]))
    await greedy.say(request * 40)
    for _ in range(100):
        await asyncio.sleep(0.001)
    unsent = sum(
        connection.transport.get_write_buffer_size()
        for connection in port.connections
        if connection.transport is not None
    )
    assert unsent < 4 * 16 * MIB  # of the 640 MiB that were asked for
    greedy.writer.transport.abort()
    await assert_serves(port)


# -- lost connections --------------------------------------------------------------------------


async def test_nothing_listens_there(unused_tcp_port: int) -> None:
    endpoint = f"127.0.0.1:{unused_tcp_port}"
    client = SocketPort(IDENTITY.node_id, endpoint, CLUSTER_ID, SECRET, SystemClock())
    for call in (client.put(1, [[b"x"]], DEADLINE_S), client.summary(DEADLINE_S)):
        with pytest.raises(NodeUnavailable):
            await call
    await client.close()


async def test_a_put_cut_off_before_its_answer_has_an_unknown_outcome(
    gated: tuple[Gate, DataPort, SocketPort],
) -> None:
    gate, port, client = gated
    await client.summary(DEADLINE_S)
    gate.open.clear()
    put = asyncio.create_task(client.put(1, [[fragment_record(1)[1]]], DEADLINE_S))
    (connection,) = await _one_connection(port)
    await until(lambda: bool(connection.requests))
    connection.transport.abort()
    with pytest.raises(UnknownOutcome):
        await put
    gate.open.set()
    assert (await client.get([fragment_key(2)], DEADLINE_S))[0].status is NOT_FOUND


async def test_a_read_cut_off_is_unavailable_and_the_next_call_connects_again(
    disk: Disk,
) -> None:
    go = asyncio.Event()
    waiting = asyncio.Event()

    async def stuck(work: Callable[..., Any], *arguments: Any) -> Any:
        if work.__name__ == "get_many":
            waiting.set()
            await go.wait()
        return work(*arguments)

    node = StorageNode(IDENTITY, MemoryStore(disk), SystemClock(), stuck, run_slow=at_once)
    async with listening(node) as port, connected(port) as client:
        read = asyncio.create_task(client.get([fragment_key(1)], DEADLINE_S))
        await waiting.wait()
        (connection,) = await _one_connection(port)
        connection.transport.abort()
        with pytest.raises(NodeUnavailable):
            await read
        go.set()
        assert (await client.get([fragment_key(1)], DEADLINE_S))[0].status is NOT_FOUND


async def test_deadlines_pass_and_tell_reads_from_writes(
    gated: tuple[Gate, DataPort, SocketPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, port, client = gated
    await client.summary(DEADLINE_S)
    gate.open.clear()
    with pytest.raises(UnknownOutcome):
        await client.put(1, [[fragment_record(1)[1]]], 0.05)
    assert client.connected  # late is not lost
    gate.open.set()
    await until(lambda: port.node.commits.queued_bytes == 0)
    assert (await client.get([fragment_key(1)], DEADLINE_S))[0].status is OK


async def test_a_silent_connection_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(port_client, "SILENT_SECONDS", 0.05)
    node = node_on(MemoryStore())
    async with listening(node) as port, connected(port) as client:
        await client.summary(DEADLINE_S)
        (connection,) = await _one_connection(port)
        connection.transport.pause_reading()  # a node that was stopped, or a cut cable
        with pytest.raises(NodeUnavailable):
            await client.summary(0.2)
        assert not client.connected
        assert (await client.summary(DEADLINE_S)).state == "serving"


async def test_a_stopped_node_leaves_no_call_waiting(
    gated: tuple[Gate, DataPort, SocketPort],
) -> None:
    gate, port, client = gated
    await client.summary(DEADLINE_S)
    gate.open.clear()
    puts = [
        asyncio.create_task(client.put(1, [[fragment_record(n)[1]]], DEADLINE_S)) for n in range(5)
    ]
    (connection,) = await _one_connection(port)
    await until(lambda: len(connection.requests) == 5)
    closing = asyncio.create_task(port.close())
    for put in puts:
        with pytest.raises(UnknownOutcome):
            await put
    gate.open.set()
    await closing
    with pytest.raises(NodeUnavailable):
        await client.summary(DEADLINE_S)


async def test_closing_a_client_ends_its_calls(gated: tuple[Gate, DataPort, SocketPort]) -> None:
    gate, port, client = gated
    await client.summary(DEADLINE_S)
    gate.open.clear()
    put = asyncio.create_task(client.put(1, [[fragment_record(1)[1]]], DEADLINE_S))
    (connection,) = await _one_connection(port)
    await until(lambda: bool(connection.requests))
    await client.close()
    with pytest.raises(UnknownOutcome):
        await put
    with pytest.raises(NodeUnavailable):
        await client.summary(DEADLINE_S)
    gate.open.set()


async def test_calls_made_together_share_one_connection_attempt(port: DataPort) -> None:
    async with connected(port) as client:
        await asyncio.gather(*(client.summary(DEADLINE_S) for _ in range(20)))
        assert len(port.connections) == 1


async def test_a_cancelled_caller_leaves_the_connection_to_the_others(
    gated: tuple[Gate, DataPort, SocketPort],
) -> None:
    gate, port, client = gated
    await client.summary(DEADLINE_S)
    gate.open.clear()
    put = asyncio.create_task(client.put(1, [[fragment_record(1)[1]]], DEADLINE_S))
    (connection,) = await _one_connection(port)
    await until(lambda: bool(connection.requests))
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    gate.open.set()
    await until(lambda: not connection.requests)
    assert (await client.get([fragment_key(1)], DEADLINE_S))[0].status is OK
    assert len(port.connections) == 1


# -- the loop that nodes run on ----------------------------------------------------------------


async def _with_port(scenario: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
    disk = Disk()
    node = node_on(MemoryStore(disk))
    await node.lease(1, 3600)
    async with listening(node) as port, connected(port) as client:
        parts = {"port": port, "client": client, "disk": disk}
        wanted = [name for name in inspect.signature(scenario).parameters if name in parts]
        await scenario(*(parts[name] for name in wanted), *arguments)


@pytest.mark.parametrize(
    ("scenario", "arguments"),
    [
        (test_a_record_comes_back_byte_for_byte, (0,)),
        (test_a_record_comes_back_byte_for_byte, (SCRATCH_BYTES,)),
        (test_a_record_comes_back_byte_for_byte, (4 * MIB,)),
        (test_a_frame_of_many_records_is_answered_one_by_one, ()),
        (test_more_than_one_frame_can_carry_is_fetched_in_several, ()),
        (test_many_clients_at_once_each_get_their_own_answers, ()),
        (test_many_requests_share_one_connection, ()),
        (test_a_client_with_another_secret_is_refused, ()),
        (test_anything_but_a_handshake_ends_a_strangers_connection, (NOISE,)),
        (test_a_malformed_frame_ends_its_connection_and_nothing_else, (NOISE,)),
        (test_a_malformed_frame_ends_its_connection_and_nothing_else, (put_frame([5], b"four"),)),
        (test_a_frame_cut_short_leaves_nothing_behind, ()),
        (test_a_frame_in_single_bytes_is_understood, ()),
        (test_answers_that_nobody_takes_are_not_piled_up, ()),
        (test_calls_made_together_share_one_connection_attempt, ()),
    ],
)
def test_the_same_holds_on_uvloop(
    scenario: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]
) -> None:
    uvloop.run(_with_port(scenario, arguments))


@pytest.mark.parametrize(
    "scenario",
    [
        test_bodies_beyond_the_limit_wait_outside_the_node,
        test_a_second_connection_gets_its_turn_while_the_first_is_held,
        test_a_put_cut_off_before_its_answer_has_an_unknown_outcome,
        test_a_stopped_node_leaves_no_call_waiting,
        test_closing_a_client_ends_its_calls,
        test_a_cancelled_caller_leaves_the_connection_to_the_others,
    ],
)
def test_the_same_holds_for_a_gated_node_on_uvloop(
    scenario: Callable[[tuple[Gate, DataPort, SocketPort]], Awaitable[None]],
) -> None:
    async def run() -> None:
        async with gated_node(Disk()) as parts:
            await scenario(parts)

    uvloop.run(run())
