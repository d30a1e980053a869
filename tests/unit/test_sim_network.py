"""The simulated network shows a caller what a TCP connection would."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from chaos.sim.loop import SimLoop
from chaos.sim.network import LinkQuality, Network
from chaos.sim.port import SimPort
from chaos.sim.process import SimProcess
from chaos.sim.trace import Trace
from protocol.errors import HandshakeRefused, NodeFull, NodeUnavailable, UnknownOutcome
from protocol.ids import NodeId
from protocol.messages import PutPurpose


class Echo:
    """A server that counts what it did."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.service_s = 0.0

    async def greet(self, cluster_id: str, node_id: str) -> None:
        if cluster_id != "cell":
            raise HandshakeRefused("another cell")

    async def put(self, incarnation: int, records: list[bytes], purpose: PutPurpose) -> list[bytes]:
        assert purpose is PutPurpose.CLIENT
        await asyncio.sleep(self.service_s)
        self.calls.append("put")
        if not records:
            raise NodeFull("full", {"node": "n"})
        return records

    async def get(self, keys: list[bytes]) -> list[bytes]:
        await asyncio.sleep(self.service_s)
        self.calls.append("get")
        return keys

    async def summary(self) -> None:
        raise ZeroDivisionError


class Cell:
    """One server, one client, one network."""

    def __init__(self, quality: LinkQuality | None = None) -> None:
        self.loop = SimLoop(start=0.0)
        trace = Trace(self.loop.time)
        self.network = Network(self.loop, random.Random(7), trace, quality or LinkQuality())
        self.server = SimProcess(self.loop, "node-01")
        self.client = SimProcess(self.loop, "gateway")
        self.echo = Echo()
        self.network.listen("node-01:1", self.server, self.echo)
        self.port = self.connect()

    def connect(self, endpoint: str = "node-01:1", cluster: str = "cell") -> SimPort:
        return SimPort(self.network, self.client, NodeId("node-01"), endpoint, cluster)

    def kill_server(self) -> None:
        self.server.kill()
        self.network.hang_up(self.server)

    def run(self, main: Any) -> None:
        self.loop.run_until_complete(main)


@pytest.fixture
def cell() -> Iterator[Cell]:
    cell = Cell()
    yield cell
    cell.loop.close()


def test_a_call_is_answered_after_a_handshake_and_two_latencies(cell: Cell) -> None:
    async def main() -> None:
        assert await cell.port.put(1, [[b"he", b"llo"]], 1.0) == [b"hello"]
        assert 0.0004 <= cell.loop.time() < 0.05

    cell.run(main())


def test_an_error_of_the_server_arrives_as_a_copy(cell: Cell) -> None:
    async def main() -> None:
        with pytest.raises(NodeFull) as caught:
            await cell.port.put(1, [], 1.0)
        assert caught.value.details == {"node": "n"}

    cell.run(main())


def test_a_refused_handshake_is_the_servers_error(cell: Cell) -> None:
    async def main() -> None:
        with pytest.raises(HandshakeRefused):
            await cell.connect(cluster="other").put(1, [[b"x"]], 1.0)
        assert cell.echo.calls == []

    cell.run(main())


def test_nobody_listening_means_nothing_was_sent(cell: Cell) -> None:
    async def main() -> None:
        with pytest.raises(NodeUnavailable, match="refused"):
            await cell.connect("node-01:2").put(1, [[b"x"]], 1.0)
        assert cell.loop.time() < 0.05

    cell.run(main())


def test_a_server_killed_at_work_breaks_the_connection_at_once(cell: Cell) -> None:
    cell.echo.service_s = 5.0

    async def main() -> None:
        cell.loop.call_later(1.0, cell.kill_server)
        put = asyncio.ensure_future(cell.port.put(1, [[b"x"]], 60.0))
        get = asyncio.ensure_future(cell.connect().get([], 60.0))
        with pytest.raises(UnknownOutcome, match="broken"):
            await put
        with pytest.raises(NodeUnavailable, match="broken"):
            await get
        assert cell.loop.time() < 1.1
        with pytest.raises(NodeUnavailable, match="refused"):
            await cell.port.put(1, [[b"x"]], 60.0)

    cell.run(main())


def test_a_paused_server_answers_nothing_until_it_goes_on(cell: Cell) -> None:
    async def main() -> None:
        await cell.port.get([], 1.0)
        cell.server.pause()
        with pytest.raises(UnknownOutcome, match="expired"):
            await cell.port.put(1, [[b"x"]], 2.0)
        assert cell.echo.calls == ["get"]
        cell.server.resume()
        await asyncio.sleep(1.0)
        assert cell.echo.calls == ["get", "put"]

    cell.run(main())


def test_before_a_connection_a_partition_means_nothing_was_sent(cell: Cell) -> None:
    cell.network.block("gateway", "node-01")

    async def main() -> None:
        with pytest.raises(NodeUnavailable):
            await cell.port.put(1, [[b"x"]], 2.0)
        assert cell.loop.time() == pytest.approx(2.0)

    cell.run(main())


@pytest.mark.parametrize("direction", [("gateway", "node-01"), ("node-01", "gateway")])
def test_a_partition_of_either_direction_leaves_a_put_unknown(
    cell: Cell, direction: tuple[str, str]
) -> None:
    async def main() -> None:
        await cell.port.get([], 1.0)
        cell.network.block(*direction)
        assert not cell.network.reachable("gateway", "node-01")
        with pytest.raises(UnknownOutcome):
            await cell.port.put(1, [[b"x"]], 2.0)
        done = cell.echo.calls.count("put")
        assert done == (1 if direction == ("node-01", "gateway") else 0)
        cell.network.unblock(*direction)
        assert await cell.port.put(1, [[b"y"]], 2.0) == [b"y"]

    cell.run(main())


def test_a_message_held_by_a_partition_may_arrive_after_it(cell: Cell) -> None:
    async def main() -> None:
        await cell.port.get([], 1.0)
        cell.network.block("gateway", "node-01")
        for _ in range(20):
            with pytest.raises(UnknownOutcome):
                await cell.port.put(1, [[b"x"]], 1.0)
        cell.network.unblock_all()
        await asyncio.sleep(5.0)
        assert 0 < cell.echo.calls.count("put") < 20

    cell.run(main())


@pytest.mark.parametrize(
    ("quality", "fired", "done"),
    [
        (LinkQuality(request_loss=1.0), "request_lost", 0),
        (LinkQuality(reply_loss=1.0), "reply_lost", 1),
    ],
)
def test_a_lost_message_leaves_the_outcome_unknown(
    quality: LinkQuality, fired: str, done: int
) -> None:
    cell = Cell(quality)

    async def main() -> None:
        with pytest.raises(UnknownOutcome):
            await cell.port.put(1, [[b"x"]], 1.0)
        assert cell.echo.calls == ["put"] * done
        assert cell.network.fired[fired] == 1
        with pytest.raises(NodeUnavailable):
            await cell.port.get([], 1.0)

    cell.run(main())
    cell.loop.close()


def test_a_duplicated_request_is_carried_out_twice_and_answered_once() -> None:
    cell = Cell(LinkQuality(duplicate=1.0))

    async def main() -> None:
        assert await cell.port.put(1, [[b"x"]], 1.0) == [b"x"]
        await asyncio.sleep(60.0)
        assert cell.echo.calls == ["put", "put"]

    cell.run(main())
    cell.loop.close()


def test_a_connection_lost_while_its_owner_was_stopped_means_nothing_was_sent(cell: Cell) -> None:
    async def call() -> None:
        with pytest.raises(NodeUnavailable, match="broken"):
            await cell.port.put(1, [[b"x"]], 60.0)

    async def main() -> None:
        task = cell.client.spawn(call(), "call")
        await asyncio.sleep(0)
        cell.client.pause()
        await asyncio.sleep(1.0)
        cell.kill_server()
        cell.client.resume()
        await task
        assert cell.echo.calls == []

    cell.run(main())


def test_closing_a_port_fails_what_is_under_way(cell: Cell) -> None:
    cell.echo.service_s = 5.0

    async def main() -> None:
        put = asyncio.ensure_future(cell.port.put(1, [[b"x"]], 60.0))
        await asyncio.sleep(1.0)
        await cell.port.close()
        with pytest.raises(UnknownOutcome):
            await put

    cell.run(main())


def test_an_unexpected_error_of_a_server_ends_the_run(cell: Cell) -> None:
    async def main() -> None:
        await cell.port.summary(1.0)

    with pytest.raises(ZeroDivisionError):
        cell.run(main())
