"""The node pool: whom to keep away from, for how long, and when a read is late."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest

from chaos.sim.clock import VirtualClock
from chaos.sim.loop import SimLoop
from cluster.latency import QuantileEstimate, size_class
from cluster.node_pool import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    HEDGE_COLD_S,
    HEDGE_FLOOR_S,
    HEDGE_MEDIAN_FACTOR,
    LOST_RACES_MAX,
    SILENCE_S,
    Direction,
    NodePool,
)
from cluster.topology import NodeState, NodeView
from cluster.volume_map import VolumeMap
from protocol.clock import Clock
from protocol.errors import (
    HaversackError,
    NodeFull,
    NodeRefuses,
    NodeUnavailable,
    StaleIncarnation,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus, PutPurpose, SummaryReply
from storage_node.interface import FragmentKey, NodePort, PutOutcome, StoredRecord
from storage_node.service_state import ServiceState

A, B = NodeId.numbered(1), NodeId.numbered(2)
KEY = FragmentKey(VolumeId(1), BlockHash(bytes(32)), 0)


def view(
    node_id: NodeId,
    *,
    incarnation: int = 1,
    endpoint: str = "here:1",
    state: NodeState = NodeState.UP,
) -> NodeView:
    return NodeView(
        node_id=node_id,
        store_id="store",
        directory="/dir",
        host="host",
        rack="rack",
        weight=1.0,
        state=state,
        state_since=0.0,
        incarnation=incarnation,
        endpoint=endpoint,
        pid=1,
        capacity_bytes=1 << 40,
        used_bytes=0,
        fragments=0,
        free_bytes=1 << 40,
        detail="",
    )


class FakeMap:
    """The part of a volume map that the pool reads."""

    def __init__(self, *nodes: NodeView) -> None:
        self.views = {node.node_id: node for node in nodes}

    def node(self, node_id: NodeId) -> NodeView:
        try:
            return self.views[node_id]
        except KeyError:
            raise NodeUnavailable(f"{node_id} is unknown") from None

    async def refresh(self, max_age_s: float = 0.0) -> bool:
        return False


class ScriptedPort:
    """A node that does what the test says: `error` for every call, after `delay_s`."""

    def __init__(self, node: NodeView, clock: Clock) -> None:
        self.node_id = node.node_id
        self.view = node
        self.clock = clock
        self.error: HaversackError | None = None
        self.put_error: HaversackError | None = None
        self.delay_s = 0.0
        self.state = ServiceState.SERVING
        self.lease = True
        self.free_bytes = 1 << 40
        self.summaries: list[float] = []
        self.closed = False

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        assert purpose is PutPurpose.CLIENT
        await self._answer()
        if self.put_error is not None:
            raise self.put_error
        return PutOutcome(incarnation, [ItemStatus.OK] * len(records))

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        await self._answer()
        return [StoredRecord(ItemStatus.NOT_FOUND, None)] * len(keys)

    async def summary(self, deadline_s: float) -> SummaryReply:
        self.summaries.append(self.clock.monotonic())
        await self._answer()
        counters = {"lease": self.lease}
        return SummaryReply(self.state, "", 1, 0, 0, 0, self.free_bytes, 1, counters)

    async def _answer(self) -> None:
        if self.delay_s:
            await self.clock.sleep(self.delay_s)
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        self.closed = True


class World:
    """A pool over two scripted nodes under virtual time."""

    def __init__(self, loop: SimLoop, seed: int = 1) -> None:
        self.clock = VirtualClock(loop)
        self.map = FakeMap(view(A), view(B))
        self.ports: list[ScriptedPort] = []
        self.pool = NodePool(
            cast(VolumeMap, self.map), self._connect, self.clock, random.Random(seed)
        )

    def _connect(self, node: NodeView) -> NodePort:
        port = ScriptedPort(node, self.clock)
        self.ports.append(port)
        return cast(NodePort, port)

    def port(self, node_id: NodeId) -> ScriptedPort:
        return cast(ScriptedPort, self.pool.port(node_id))

    async def read(self, node_id: NodeId, size: int = KIB) -> None:
        await self.pool.read(node_id, [KEY], size, 5.0)

    async def write(self, node_id: NodeId) -> None:
        await self.pool.write(node_id, 1, [(b"record",)], 5.0)

    async def fails(self, call: Awaitable[Any]) -> None:
        with pytest.raises(HaversackError):
            await call


def simulate(main: Callable[[World], Awaitable[None]], seed: int = 1) -> None:
    """Run `main` under virtual time; no task may be left when the pool is closed."""
    loop = SimLoop()

    async def whole() -> None:
        world = World(loop, seed)
        await main(world)
        await world.pool.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    try:
        loop.run_until_complete(whole())
        assert loop.unnoticed_failures() == []
    finally:
        loop.close()


UNREACHABLE = NodeUnavailable("refused")


def test_a_node_that_fails_is_suspected_until_a_probe_is_answered() -> None:
    async def main(world: World) -> None:
        world.port(A).error = UNREACHABLE
        await world.fails(world.read(A))
        assert world.pool.suspected(Direction.READ) == (A,)
        assert world.pool.suspected(Direction.WRITE) == (A,)
        await world.clock.sleep(60)
        assert world.pool.is_suspected(A, Direction.READ)
        world.port(A).error = None
        await world.clock.sleep(2 * BACKOFF_MAX_S)
        assert world.pool.suspected(Direction.READ) == ()

    simulate(main)


def test_probes_of_a_dead_node_become_rarer_up_to_a_limit() -> None:
    async def main(world: World) -> None:
        world.port(A).put_error = NodeFull("full")
        await world.fails(world.write(A))
        world.port(A).error = UNREACHABLE
        await world.clock.sleep(300)
        times = world.port(A).summaries
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert gaps[0] < 2 * 1.5 * BACKOFF_FIRST_S
        assert all(BACKOFF_MAX_S / 2 <= gap <= BACKOFF_MAX_S * 1.5 for gap in gaps[8:])
        assert len({round(gap, 6) for gap in gaps[8:]}) > 3, "they are jittered"

    simulate(main)


def test_a_burst_of_failures_counts_as_one() -> None:
    async def main(world: World) -> None:
        world.port(A).error = UNREACHABLE
        await asyncio.gather(*(world.fails(world.read(A)) for _ in range(50)))
        world.port(A).error = None
        await world.clock.sleep(1.5 * BACKOFF_FIRST_S)
        assert not world.pool.is_suspected(A, Direction.READ)

    simulate(main)


@pytest.mark.parametrize("error", [NodeFull("full"), NodeRefuses("no lease")])
def test_a_node_that_refuses_writes_is_still_read_from(error: HaversackError) -> None:
    async def main(world: World) -> None:
        world.port(A).put_error = error
        await world.fails(world.write(A))
        assert world.pool.is_suspected(A, Direction.WRITE)
        assert not world.pool.is_trusted(A, Direction.WRITE)
        assert world.pool.is_trusted(A, Direction.READ)

    simulate(main)


def test_an_unanswered_put_makes_the_node_suspect_in_both_directions() -> None:
    async def main(world: World) -> None:
        world.port(A).put_error = UnknownOutcome("no answer")
        await world.fails(world.write(A))
        assert world.pool.is_suspected(A, Direction.WRITE)
        assert world.pool.is_suspected(A, Direction.READ)

    simulate(main)


def test_a_stale_incarnation_is_no_reason_to_suspect_a_node() -> None:
    async def main(world: World) -> None:
        world.port(A).put_error = StaleIncarnation("you mean my earlier life")
        await world.fails(world.write(A))
        assert world.pool.suspected(Direction.WRITE) == ()

    simulate(main)


def test_each_relapse_on_trial_doubles_the_back_off_until_a_success() -> None:
    async def main(world: World) -> None:
        pauses = []
        world.port(A).put_error = NodeFull("full")
        for _ in range(6):
            await world.fails(world.write(A))
            started = world.clock.monotonic()
            while world.pool.is_suspected(A, Direction.WRITE):
                await world.clock.sleep(0.01)
            pauses.append(world.clock.monotonic() - started)
        assert pauses[5] > 8 * pauses[0]
        world.port(A).put_error = None
        await world.write(A)
        world.port(A).put_error = NodeFull("full")
        await world.fails(world.write(A))
        await world.clock.sleep(1.5 * BACKOFF_FIRST_S + 0.01)
        assert not world.pool.is_suspected(A, Direction.WRITE)

    simulate(main)


def test_a_new_incarnation_is_trusted_at_once_over_a_new_connection() -> None:
    async def main(world: World) -> None:
        first = world.port(A)
        first.error = UNREACHABLE
        await world.fails(world.read(A))
        assert world.pool.is_suspected(A, Direction.READ)
        world.map.views[A] = view(A, incarnation=2, endpoint="here:2")
        assert not world.pool.is_suspected(A, Direction.READ)
        await world.read(A)
        assert world.port(A) is not first
        assert world.port(A).view.endpoint == "here:2"
        await asyncio.sleep(0)
        assert first.closed

    simulate(main)


def test_a_new_life_starts_with_the_shortest_back_off() -> None:
    async def main(world: World) -> None:
        for _ in range(6):
            world.port(A).put_error = NodeFull("full")
            await world.fails(world.write(A))
            while world.pool.is_suspected(A, Direction.WRITE):
                await world.clock.sleep(0.01)
        await world.fails(world.write(A))
        world.map.views[A] = view(A, incarnation=2)
        assert not world.pool.is_suspected(A, Direction.WRITE)
        world.port(A).put_error = NodeFull("full")
        await world.fails(world.write(A))
        await world.clock.sleep(1.5 * BACKOFF_FIRST_S + 0.01)
        assert not world.pool.is_suspected(A, Direction.WRITE)

    simulate(main)


@pytest.mark.parametrize(
    ("condition", "reads", "writes"),
    [
        ({"state": ServiceState.OPENING}, False, False),
        ({"state": ServiceState.REFUSING}, False, False),
        ({"state": ServiceState.FAILED}, True, False),
        ({"lease": False}, True, False),
        ({"free_bytes": 0}, True, False),
        ({}, True, True),
    ],
)
def test_a_probe_asks_whether_the_node_would_serve(
    condition: dict[str, Any], reads: bool, writes: bool
) -> None:
    async def main(world: World) -> None:
        port = world.port(A)
        port.error = UNREACHABLE
        await world.fails(world.read(A))
        port.error = None
        for name, value in condition.items():
            setattr(port, name, value)
        await world.clock.sleep(60)
        assert world.pool.is_trusted(A, Direction.READ) == reads
        assert world.pool.is_trusted(A, Direction.WRITE) == writes

    simulate(main)


def test_the_connection_is_kept_while_the_node_lives() -> None:
    async def main(world: World) -> None:
        for _ in range(5):
            await world.read(A)
            await world.write(A)
        assert len(world.ports) == 1

    simulate(main)


def test_a_node_that_never_registered_is_unavailable() -> None:
    async def main(world: World) -> None:
        world.map.views[B] = view(B, incarnation=0, endpoint="")
        with pytest.raises(NodeUnavailable, match="not registered"):
            await world.read(B)
        with pytest.raises(NodeUnavailable):
            await world.read(NodeId.numbered(77))
        assert not world.pool.is_trusted(NodeId.numbered(78), Direction.READ)

    simulate(main)


def test_a_node_that_the_map_calls_down_is_not_trusted() -> None:
    async def main(world: World) -> None:
        world.map.views[A] = view(A, state=NodeState.DOWN)
        assert not world.pool.is_trusted(A, Direction.READ)
        assert not world.pool.is_trusted(A, Direction.WRITE)
        assert world.pool.is_trusted(B, Direction.WRITE)

    simulate(main)


def test_a_cancelled_request_is_no_failure() -> None:
    async def main(world: World) -> None:
        world.port(A).delay_s = 100
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await world.read(A)
        assert world.pool.suspected(Direction.READ) == ()

    simulate(main)


# -- when to hedge -----------------------------------------------------------------------------


def test_hedging_starts_cold_and_follows_the_nodes_own_p95() -> None:
    async def main(world: World) -> None:
        assert world.pool.hedge_delay_s(A, MIB) == HEDGE_COLD_S
        rng = random.Random(5)
        for _ in range(400):
            world.port(A).delay_s = rng.uniform(0.04, 0.06)
            await world.read(A, MIB)
        assert world.pool.hedge_delay_s(A, MIB) == pytest.approx(0.059, rel=0.15)
        assert world.pool.hedge_delay_s(A, KIB) == HEDGE_COLD_S, "another size class"

    simulate(main)


def test_hedging_never_starts_below_its_floor() -> None:
    async def main(world: World) -> None:
        for _ in range(50):
            world.port(A).delay_s = 0.0001
            await world.read(A)
        assert world.pool.hedge_delay_s(A, KIB) == HEDGE_FLOOR_S

    simulate(main)


def test_a_node_that_is_always_slow_is_hedged_by_what_the_others_need() -> None:
    async def main(world: World) -> None:
        world.port(A).delay_s = 3.0
        world.port(B).delay_s = 0.02
        for turn in range(200):
            await world.read(A if turn % 5 == 0 else B)
        assert world.pool.hedge_delay_s(A, KIB) < 2 * HEDGE_MEDIAN_FACTOR * 0.02

    simulate(main)


def test_a_silent_node_that_keeps_losing_races_is_suspected() -> None:
    async def main(world: World) -> None:
        await world.read(A)
        await world.clock.sleep(2 * SILENCE_S)
        for _ in range(LOST_RACES_MAX - 1):
            world.pool.lost_race(A, KIB, 0.1)
        assert not world.pool.is_suspected(A, Direction.READ)
        world.pool.lost_race(A, KIB, 0.1)
        assert world.pool.is_suspected(A, Direction.READ)

    simulate(main)


def test_a_burst_of_lost_races_of_a_node_that_answers_is_forgiven() -> None:
    async def main(world: World) -> None:
        await world.read(A)
        for _ in range(10 * LOST_RACES_MAX):
            world.pool.lost_race(A, KIB, 0.1)
        assert not world.pool.is_suspected(A, Direction.READ)

    simulate(main)


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_an_estimate_settles_at_its_quantile_and_follows_a_shift(quantile: float) -> None:
    rng = random.Random(9)
    estimate = QuantileEstimate(quantile)
    for scale in (1.0, 10.0, 1.0):
        for _ in range(1500):
            estimate.observe(scale * rng.uniform(1.0, 2.0))
        tail = []
        for _ in range(2000):
            estimate.observe(scale * rng.uniform(1.0, 2.0))
            tail.append(estimate.value)
        assert sum(tail) / len(tail) == pytest.approx(scale * (1 + quantile), rel=0.1)


def test_size_classes_are_factors_of_sixteen() -> None:
    assert [size_class(size) for size in (0, 100, KIB, 60 * KIB, 700 * KIB, 4 * MIB)] == [
        0, 0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert size_class(64 * MIB) == 5
