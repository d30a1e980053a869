"""The placement service over real rows, virtual time and nodes that answer as a script says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cell_rows import (
    CLUSTER_ID,
    RS,
    SMALL,
    Rows,
    empty_database,
    new_block,
    new_cell,
    node_ids,
    node_spec,
    registration,
)
from sqlalchemy import Connection, update

from chaos.sim.clock import VirtualClock
from chaos.sim.loop import SimLoop
from cluster import map_rows, schema
from cluster.block_index import BlockIndex, RecordOutcome
from cluster.cell import add_nodes
from cluster.disk_reports import KeptReport, read_disk_reports
from cluster.events import read_events
from cluster.placement_service import PlacementService
from cluster.placement_settings import PlacementSettings
from cluster.sightings import (
    FORGOTTEN_S,
    FRESH_S,
    Sighting,
    read_sightings,
    replace_sightings,
)
from cluster.topology import NodeState, NodeView, VolumeView
from protocol.errors import (
    ConfigInvalid,
    DatabaseBusy,
    DirectoryForeign,
    NodeRefuses,
    NodeUnavailable,
    NotLeader,
    StaleIncarnation,
    UnknownOutcome,
)
from protocol.ids import NodeId, VolumeId
from protocol.limits import VOLUME_BYTES_TARGET
from protocol.messages import LeaseReply, ScrubProgress, SpaceReport, SummaryReply
from sql.database import Database
from storage_node.identity import Identity
from storage_node.local_port import LocalPort
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode

SETTINGS = PlacementSettings()
UP, SUSPECT, DOWN, JOINING = NodeState.UP, NodeState.SUSPECT, NodeState.DOWN, NodeState.JOINING


@dataclass
class ScriptedNode:
    """What a node answers to leases and summaries, and what it was asked."""

    alive: bool = True
    answer_after_s: float = 0.0
    state: str = "serving"
    detail: str = ""
    fault: str = ""
    placement_free_bytes: int = 1 << 39
    incarnation: int = 0
    free_bytes: int = 1 << 39
    fragments: int = 0
    leases: list[tuple[float, int]] = field(default_factory=list)
    summaries: int = 0
    ports_open: int = 0
    scrub: ScrubProgress = field(default_factory=ScrubProgress)


class ScriptedPort:
    """The control half of a `NodePort`; a port dies with the endpoint it was made for."""

    def __init__(self, cell: ServiceCell, view: NodeView) -> None:
        self._cell = cell
        self.node_id = view.node_id
        self._endpoint = view.endpoint
        self._node.ports_open += 1

    @property
    def _node(self) -> ScriptedNode:
        return self._cell.nodes[self.node_id]

    async def lease(self, incarnation: int, lease_s: float, deadline_s: float) -> LeaseReply:
        assert (lease_s, deadline_s) == (SETTINGS.lease_s, SETTINGS.call_deadline_s)
        node = self._node
        node.leases.append((self._cell.clock.monotonic(), incarnation))
        await self._reach(deadline_s)
        if incarnation < node.incarnation:
            raise StaleIncarnation(
                "older than mine", {"node": self.node_id, "incarnation": node.incarnation}
            )
        node.incarnation = incarnation
        return LeaseReply(
            incarnation, node.state, node.detail, node.fault, free_bytes=node.free_bytes
        )

    async def summary(self, deadline_s: float) -> SummaryReply:
        await self._reach(deadline_s)
        node = self._node
        node.summaries += 1
        return SummaryReply(
            node.state,
            "",
            node.incarnation,
            node.fragments,
            1000 * node.fragments,
            0,
            node.free_bytes,
            1,
            {},
            node.fault,
            SpaceReport(1 << 40, placement_free_bytes=node.placement_free_bytes),
            node.scrub,
        )

    async def close(self) -> None:
        self._node.ports_open -= 1

    async def _reach(self, deadline_s: float) -> None:
        node = self._node
        if node.answer_after_s > deadline_s:
            await asyncio.sleep(deadline_s)
            raise NodeUnavailable("no answer before the deadline")
        await asyncio.sleep(node.answer_after_s)
        if not node.alive or self._endpoint != self._cell.endpoints[self.node_id]:
            raise NodeUnavailable("connection refused")


class ServiceCell:
    """A service, its database and its nodes."""

    def __init__(self, db: Database, clock: VirtualClock, count: int, **settings: Any) -> None:
        self.db = db
        self.clock = clock
        self.rows = Rows(db)
        self.settings = PlacementSettings(**settings)
        self.nodes = {node_id: ScriptedNode() for node_id in node_ids(count)}
        self.endpoints: dict[NodeId, str] = {}
        self.service = self.new_service("first")

    def new_service(self, holder: str) -> PlacementService:
        return PlacementService(
            self.db,
            self.clock,
            random.Random(holder),
            lambda view: ScriptedPort(self, view),  # type: ignore[arg-type,return-value]
            self.settings,
            holder,
        )

    def node(self, number: int) -> ScriptedNode:
        return self.nodes[NodeId.numbered(number)]

    async def start_node(self, number: int, service: PlacementService | None = None) -> int:
        """A node process starts, with an endpoint that no life before it had."""
        node_id = NodeId.numbered(number)
        lives = int(self.endpoints.get(node_id, "h:0").split(":")[1]) + 1
        self.endpoints[node_id] = f"h:{lives}"
        self.nodes[node_id].alive = True
        announced = registration(number, endpoint=f"h:{lives}")
        return await (service or self.service).register(announced)

    async def start_all(self) -> None:
        for number in range(1, len(self.nodes) + 1):
            await self.start_node(number)

    def states(self) -> list[NodeState]:
        return [node.state for node in self.rows.nodes()]

    def open_volumes(self) -> list[VolumeView]:
        return self.db.read_now(map_rows.read_open_volumes)

    def version(self) -> int:
        return self.db.read_now(map_rows.read_version)

    async def until_down(self, number: int) -> None:
        """Step on until the service has given a silent node up."""
        for _ in range(20):
            await self.service.step()
            if self.states()[number - 1] is DOWN:
                return
            await asyncio.sleep(1)
        raise AssertionError("it is still trusted")

    async def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> float:
        """Wait in virtual time; returns how long it took."""
        started = self.clock.monotonic()
        while not condition():
            assert self.clock.monotonic() - started < within_s, "it did not come to that"
            await asyncio.sleep(0.05)
        return self.clock.monotonic() - started


Play = Callable[[ServiceCell], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    def run(main: Play, nodes: int = 9, **settings: Any) -> None:
        loop = SimLoop()
        db = empty_database(tmp_path)
        try:

            async def whole() -> None:
                clock = VirtualClock(loop)
                new_cell(db, clock, nodes)  # type: ignore[arg-type]
                cell = ServiceCell(db, clock, nodes, **settings)
                await main(cell)
                await cell.service.stop()
                assert {node.ports_open for node in cell.nodes.values()} <= {0}, "ports left open"

            loop.run_until_complete(whole())
            assert loop.unnoticed_failures() == []
        finally:
            loop.close()
            db.close()

    return run


# -- registering -----------------------------------------------------------------------------------


def test_a_registered_node_is_leased_and_comes_up_and_volumes_are_opened(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        assert cell.states() == [JOINING] * 9
        await cell.start_all()
        assert all(node.leases[0][1] == 1 for node in cell.nodes.values())
        await cell.service.step()
        assert cell.states() == [UP] * 9
        by_scheme = [volume.scheme for volume in cell.open_volumes()]
        assert by_scheme.count(RS) == by_scheme.count(SMALL) == SETTINGS.open_volumes
        assert not any(volume.vacant_slots for volume in cell.open_volumes())

    play(main)


def test_each_registration_is_a_new_incarnation_with_its_endpoint_and_pid(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        assert [await cell.start_node(3) for _ in range(3)] == [1, 2, 3]
        view = cell.rows.node(3)
        assert (view.incarnation, view.endpoint, view.pid) == (3, "h:3", 1003)
        assert view.capacity_bytes == 1 << 40
        assert cell.node(3).leases[-1][1] == 3

    play(main)


def test_a_stranger_a_swapped_store_and_a_removed_node_are_refused_with_the_reason(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        with pytest.raises(ConfigInvalid, match="node-10 is not a member"):
            await cell.service.register(registration(10))
        with pytest.raises(DirectoryForeign, match=r"holds store store-2, but node-01 is store-?"):
            await cell.service.register(registration(1, store_id="store-2"))
        cell.rows.set_state(4, NodeState.GONE)
        with pytest.raises(DirectoryForeign, match="removed"):
            await cell.service.register(registration(4))
        assert {view.incarnation for view in cell.rows.nodes()} == {0}

    play(main)


def test_a_node_that_refuses_its_directory_is_heard_and_begins_no_life(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_node(1)
        why = "/disks/node-02 belongs to node-09"
        cell.node(2).state, cell.node(2).detail = "refusing", why
        cell.endpoints[NodeId.numbered(2)] = "h:1"
        said = replace(registration(2, endpoint="h:1", store_id="unknown"), refusal=why)
        assert await cell.service.register(said) == 0
        for _ in range(3):
            await cell.service.step()
        view = cell.rows.node(2)
        assert (view.endpoint, view.incarnation, view.disk_failed) == ("h:1", 0, False)
        assert why in view.detail
        served = replace(registration(1, endpoint="h:9", store_id="unknown"), refusal=why)
        with pytest.raises(NodeRefuses, match="another process serves node-01"):
            await cell.service.register(served)
        assert cell.rows.node(1).endpoint == "h:1"
        cell.node(2).state = "serving"
        await cell.start_node(2)
        await cell.service.step()
        assert cell.rows.node(2).state is UP

    play(main)


def test_a_registration_before_the_role_is_taken_is_told_to_come_again(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        with pytest.raises(NotLeader):
            await cell.service.register(registration(1))

    play(main)


def test_a_registration_stands_even_if_the_lease_does_not_arrive(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        cell.node(1).answer_after_s = 60
        assert await cell.start_node(1) == 1
        cell.node(1).answer_after_s = 0
        await cell.service.step()
        assert cell.states()[0] is UP

    play(main)


def test_a_registration_fences_receipts_of_the_life_before(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        index = BlockIndex(cell.db, cell.clock)
        volume = next(volume for volume in cell.open_volumes() if volume.scheme == RS)
        early = new_block("early", volume)
        late = new_block("late", volume)
        assert await index.record_puts([early]) == [RecordOutcome.NEW]
        await cell.start_node(5)
        assert await index.record_puts([late]) == [RecordOutcome.FENCED]

    play(main)


# -- health ----------------------------------------------------------------------------------------


def test_silence_makes_a_node_suspect_then_down_and_an_answer_brings_it_up(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await cell.until(lambda: cell.states() == [UP] * 9)
        await asyncio.sleep(SETTINGS.start_grace_s)
        cell.node(7).alive = False
        suspect_s = await cell.until(lambda: cell.states()[6] is SUSPECT)
        assert suspect_s <= SETTINGS.misses_until_suspect * SETTINGS.lease_interval_s + 0.2
        down_s = suspect_s + await cell.until(lambda: cell.states()[6] is DOWN)
        assert SETTINGS.down_after_s - 1.1 <= down_s <= SETTINGS.down_after_s + 1.1
        assert cell.states().count(UP) == 8
        assert "connection refused" in cell.rows.node(7).detail
        cell.node(7).alive = True
        assert await cell.until(lambda: cell.states()[6] is UP) <= 1.2
        assert cell.rows.node(7).incarnation == 1, "it never restarted: its receipts are good"
        await cell.service.stop()
        await running

    play(main)


def test_what_happened_to_a_node_and_its_volumes_can_be_read_afterwards(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        volume = next(view for view in cell.open_volumes() if view.scheme == RS)
        await BlockIndex(cell.db, cell.clock).record_puts([new_block("a", volume)])
        cell.node(7).alive = False
        await cell.until_down(7)

        def told(subject: NodeId | VolumeId) -> list[str]:
            found = cell.db.read_now(lambda c: read_events(c, subject))
            return [f"{event.kind}: {event.detail}" for event in reversed(found)]

        assert told(NodeId.numbered(7)) == [
            "node added: rack rack, host host, weight 1",
            "node registered: incarnation 1, process 1007 at h:1",
            "node state: joining -> up",
            "node state: up -> suspect: connection refused",
            "node state: suspect -> down: connection refused",
        ]
        assert told(volume.volume_id) == ["volume sealed: node lost"]

    play(main)


def test_one_lost_answer_changes_nothing(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        version = cell.version()
        cell.node(2).alive = False
        await cell.service.step()
        cell.node(2).alive = True
        await cell.service.step()
        assert cell.version() == version
        assert cell.states() == [UP] * 9

    play(main)


def test_a_slow_node_delays_nobody_elses_lease(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await cell.until(lambda: cell.states() == [UP] * 9)
        cell.node(1).answer_after_s = 1.9  # within its deadline, slower than the interval
        cell.node(2).answer_after_s = 60
        await asyncio.sleep(30)
        for number in range(3, 10):
            times = [at for at, _ in cell.node(number).leases]
            gaps = [late - early for early, late in pairwise(times)]
            assert max(gaps) <= SETTINGS.lease_interval_s + 0.1
        assert cell.states()[0] is UP
        assert cell.states()[1] is DOWN
        assert cell.states().count(UP) == 8
        await cell.service.stop()
        await running

    play(main)


def test_a_node_that_refuses_its_directory_is_down_at_once(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        cell.node(3).state, cell.node(3).detail = "refusing", "the directory is gone"
        await cell.service.step()
        assert cell.states()[2] is DOWN
        assert cell.rows.node(3).detail == "refusing: the directory is gone"

    play(main)


def test_a_nodes_state_follows_from_what_placement_and_gateways_hear(
    play: Callable[..., None],
) -> None:
    """All combinations, each on a node of its own."""
    # What gateways say: (name, reachable, reached, missed).
    heard = ("one", False, 9, 3)
    words: dict[str, list[tuple[str, bool, int, int]]] = {
        "nothing": [],
        "one cannot": [heard],
        "two cannot": [heard, ("two", False, 9, 3)],
        "one can, one cannot": [heard, ("two", True, 9, 3)],
        "one can": [("one", True, 9, 3)],
        "cut off": [("one", False, 0, 12)],
        "a minority cannot": [("one", False, 2, 9)],
        "two minorities cannot": [("one", False, 2, 9), ("two", False, 2, 9)],
    }
    unusable = {"one cannot", "two cannot", "two minorities cannot"}
    cases = [(answers, word) for answers in (True, False) for word in words]

    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        assert cell.states() == [UP] * len(cases)
        for number, (answers, _) in enumerate(cases, 1):
            cell.node(number).alive = answers

        def say(connection: Connection) -> None:
            rows: dict[str, list[Sighting]] = {}
            for number, (_, word) in enumerate(cases, 1):
                for name, reachable, reached, missed in words[word]:
                    node, now = NodeId.numbered(number), cell.clock.wall()
                    row = Sighting(name, node, 1, reachable, "cut", reached, missed, now, now)
                    rows.setdefault(name, []).append(row)
            for name, found in rows.items():
                replace_sightings(connection, name, found)

        seen: list[list[NodeState]] = []
        for _ in range(int(SETTINGS.start_grace_s) + 10):
            cell.db.transact(say)
            await cell.service.step()
            seen.append(cell.states())
            await asyncio.sleep(1)
        for (answers, word), states in zip(cases, zip(*seen, strict=True), strict=True):
            good = answers and word not in unusable
            assert states[-1] is (UP if good else DOWN), (answers, word)
            assert (SUSPECT in states) is not good, "nobody is down at once"
        details = {case: view.detail for case, view in zip(cases, cell.rows.nodes(), strict=True)}
        assert details[True, "one cannot"] == (
            "it answers the placement service, but one cannot reach it: cut"
        )
        assert details[False, "one cannot"] == "connection refused"
        # Gateways fall silent: what they said does not last, whatever time it is to them.
        await asyncio.sleep(FRESH_S)
        await cell.service.step()
        assert cell.states() == [UP if answers else DOWN for answers, _ in cases]
        await asyncio.sleep(FORGOTTEN_S)
        await cell.service.step()
        assert cell.db.read_now(read_sightings) == []

    play(main, nodes=len(cases))


def test_a_bad_disk_is_noted_in_the_row_until_the_node_serves_without_that_fault(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        cell.node(3).fault = "disk"  # it goes on serving
        cell.node(4).state, cell.node(4).fault = "refusing", "directory"
        await cell.service.step()
        assert cell.states()[2:4] == [DOWN, DOWN]
        assert [view.disk_failed for view in cell.rows.nodes()[2:4]] == [True, False]
        assert cell.rows.nodes()[2].detail == "its disk is bad: serving"
        await cell.service.step()
        version = cell.version()
        await cell.service.step()
        assert cell.states()[2] is DOWN, "its answers do not bring it up"
        cell.node(3).alive = False
        await cell.service.step()
        assert cell.rows.nodes()[2].disk_failed, "silence proves nothing"
        assert cell.version() == version
        # A successor knows it from the row.
        await cell.service.stop()
        cell.service = cell.new_service("second")
        await cell.service.start()
        await cell.service.step()
        assert cell.rows.nodes()[2].disk_failed
        cell.node(3).fault = cell.node(4).fault = ""
        cell.node(4).state = "serving"
        cell.node(3).alive = True
        await cell.service.step()
        assert cell.states()[2:4] == [UP, UP]
        assert not cell.rows.nodes()[2].disk_failed

    play(main)


def test_a_crowded_node_gets_no_new_volumes_and_keeps_those_it_has(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        crowded = NodeId.numbered(2)
        before = {volume.volume_id: volume for volume in cell.open_volumes()}
        assert any(crowded in volume.slots for volume in before.values())
        cell.node(2).placement_free_bytes = 0
        await asyncio.sleep(SETTINGS.report_interval_s + 1)
        await cell.service.step()
        assert cell.rows.nodes()[1].is_crowded
        assert {volume.volume_id for volume in cell.open_volumes()} == set(before)

        def fill(connection: Connection) -> None:
            full = schema.volumes.update().values(stored_bytes=VOLUME_BYTES_TARGET, blocks=1)
            connection.execute(full)

        cell.db.transact(fill)
        await cell.service.step()
        after = cell.open_volumes()
        assert len(after) == len(before)
        assert not any(crowded in volume.slots for volume in after)
        assert not any(volume.vacant_slots for volume in after)

    play(main, nodes=11)


def test_a_node_whose_store_failed_is_suspect_while_it_reopens(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        cell.node(3).state = "failed"
        for _ in range(SETTINGS.misses_until_suspect):
            await cell.service.step()
        assert cell.states()[2] is SUSPECT
        cell.node(3).state = "serving"
        await cell.service.step()
        assert cell.states()[2] is UP
        assert cell.rows.node(3).detail == ""

    play(main)


def test_after_a_cold_start_nobody_is_down_before_the_grace_is_over(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        await cell.service.stop()
        for node in cell.nodes.values():
            node.alive = False
        cell.service = cell.new_service("second")
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(SETTINGS.start_grace_s - 1)
        assert DOWN not in cell.states()
        for number in range(1, 9):
            await cell.start_node(number)
        await cell.until(lambda: cell.states() == [UP] * 8 + [DOWN])
        await cell.service.stop()
        await running

    play(main)


# -- volumes ---------------------------------------------------------------------------------------


def test_a_lost_node_seals_its_volumes_and_the_rest_carry_on_without_it(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        index = BlockIndex(cell.db, cell.clock)
        used = next(volume for volume in cell.open_volumes() if volume.scheme == RS)
        empty = {volume.volume_id for volume in cell.open_volumes()} - {used.volume_id}
        assert await index.record_puts([new_block("a", used)]) == [RecordOutcome.NEW]
        cell.node(9).alive = False
        await cell.until_down(9)
        opened = cell.open_volumes()
        assert all(NodeId.numbered(9) not in volume.slots for volume in opened)
        wide = [volume for volume in opened if volume.scheme == RS]
        assert len(wide) == SETTINGS.open_volumes
        assert {volume.vacant_slots for volume in wide} == {(8,)}
        assert cell.rows.volume(used.volume_id).state == "sealed"
        kept = cell.db.read_now(lambda c: map_rows.read_volumes(c, empty))
        assert all(NodeId.numbered(9) not in volume.slots for volume in kept), "removed: empty"

    play(main, start_grace_s=0.0)


def test_when_the_node_returns_volumes_become_whole_again(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        cell.node(9).alive = False
        await cell.until_down(9)
        assert any(volume.vacant_slots for volume in cell.open_volumes())
        await cell.start_node(9)
        await cell.service.step()
        assert cell.states() == [UP] * 9
        assert not any(volume.vacant_slots for volume in cell.open_volumes())
        assert len(cell.open_volumes()) == 2 * SETTINGS.open_volumes

    play(main, start_grace_s=0.0)


def holders(cell: ServiceCell, number: int) -> int:
    """Open volumes with a slot on a node."""
    node_id = NodeId.numbered(number)
    return sum(node_id in volume.slots for volume in cell.open_volumes())


def test_a_full_node_leaves_the_open_volumes_at_once_and_stays_up(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        run = asyncio.ensure_future(cell.service.run())
        await cell.until(lambda: cell.service.epoch == 1)
        await cell.start_all()
        await cell.until(lambda: len(cell.open_volumes()) == 8)
        assert holders(cell, 1) > 0
        cell.node(1).free_bytes = 0
        took_s = await cell.until(lambda: holders(cell, 1) == 0)
        assert took_s <= SETTINGS.lease_interval_s + 0.1
        assert cell.states() == [UP] * 12
        assert len(cell.open_volumes()) == 8
        await asyncio.sleep(2 * SETTINGS.review_interval_s)
        version = cell.version()
        for number in range(30):  # a little room now and then is none
            cell.node(1).free_bytes = number % 2
            await asyncio.sleep(1)
        assert cell.version() == version
        cell.node(1).free_bytes = SETTINGS.room_bytes_min
        await asyncio.sleep(2 * SETTINGS.review_interval_s)
        assert cell.version() == version
        await cell.service.stop()
        await run

    play(main, nodes=12)


def test_a_node_that_fails_writes_is_kept_out_of_open_volumes_for_a_while(
    play: Callable[..., None],
) -> None:
    """It opens its store again within a second, and looks well to every lease after."""

    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        assert holders(cell, 1) > 0
        cell.node(1).state = "failed"
        await cell.service.step()
        cell.node(1).state = "serving"
        for _ in range(5):
            await cell.service.step()
            assert holders(cell, 1) == 0
            assert len(cell.open_volumes()) == 8
        assert cell.states() == [UP] * 12
        await asyncio.sleep(SETTINGS.write_failed_s)
        cell.node(2).free_bytes = cell.node(3).free_bytes = cell.node(4).free_bytes = 0
        await cell.service.step()
        wide = [volume for volume in cell.open_volumes() if volume.scheme == RS]
        # It is needed, and trusted again.
        assert all(NodeId.numbered(1) in volume.slots for volume in wide)

    play(main, nodes=12)


def test_in_a_cell_of_as_many_nodes_as_slots_a_full_node_changes_nothing(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        wide = [volume for volume in cell.open_volumes() if volume.scheme == RS]
        cell.node(1).free_bytes = 0
        for _ in range(5):
            await cell.service.step()
            await asyncio.sleep(1)
        assert [volume for volume in cell.open_volumes() if volume.scheme == RS] == wide

    play(main)


def test_a_flapping_node_leaves_no_trail_of_empty_volumes(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        for _ in range(5):
            cell.node(9).alive = False
            await cell.until_down(9)
            await cell.start_node(9)
            await cell.service.step()
        every = cell.db.read_now(lambda c: map_rows.changed_volumes(c, -1))
        assert len(every) == 2 * SETTINGS.open_volumes

    play(main, start_grace_s=0.0)


def test_full_volumes_are_sealed_and_replaced_at_the_next_review(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await cell.until(lambda: len(cell.open_volumes()) == 2 * SETTINGS.open_volumes)
        full = cell.open_volumes()[0]

        def fill(connection: Connection) -> None:
            connection.execute(
                update(schema.volumes)
                .where(schema.volumes.c.volume_id == int(full.volume_id))
                .values(stored_bytes=VOLUME_BYTES_TARGET, blocks=256)
            )

        await asyncio.sleep(1)
        cell.db.transact(fill)
        waited = await cell.until(lambda: cell.rows.volume(full.volume_id).state == "sealed")
        assert waited <= SETTINGS.review_interval_s + SETTINGS.lease_interval_s
        assert len(cell.open_volumes()) == 2 * SETTINGS.open_volumes
        await cell.service.stop()
        await running

    play(main)


def test_no_volume_is_opened_on_the_few_nodes_that_start_first(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        for number in range(1, 10):
            assert cell.open_volumes() == []
            await cell.start_node(number)
            await asyncio.sleep(0.3)
        small = [volume for volume in cell.open_volumes() if volume.scheme == SMALL]
        assert len({frozenset(volume.slots) for volume in small}) == SETTINGS.open_volumes
        await cell.service.stop()
        await running

    play(main)


def test_a_node_that_never_starts_does_not_hold_the_cell_up_for_ever(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        for number in range(1, 9):
            await cell.start_node(number)
        waited = await cell.until(lambda: len(cell.open_volumes()) == 2 * SETTINGS.open_volumes)
        assert SETTINGS.start_grace_s - 1 <= waited <= SETTINGS.start_grace_s + 1.1
        wide = [volume for volume in cell.open_volumes() if volume.scheme == RS]
        assert {volume.vacant_slots for volume in wide} == {(8,)}
        await cell.service.stop()
        await running

    play(main)


def test_an_added_node_is_used_once_it_registers(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await cell.until(lambda: cell.states() == [UP] * 9)
        add_nodes(cell.db, cell.clock, [node_spec(10)])
        cell.nodes[NodeId.numbered(10)] = ScriptedNode()
        await cell.start_node(10)
        await cell.until(lambda: cell.states() == [UP] * 10)
        await cell.service.stop()
        await running

    play(main)


def test_what_an_operator_changed_in_sql_is_seen_at_the_next_review(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        cell.rows.set_state(2, NodeState.DRAINING)
        await cell.service.step()
        assert cell.states()[1] is NodeState.DRAINING, "an answer does not end a drain"
        drained = NodeId.numbered(2)
        assert all(drained not in volume.slots for volume in cell.open_volumes())

    play(main, start_grace_s=0.0)


# -- leadership ------------------------------------------------------------------------------------


def test_a_successor_takes_the_role_and_leases_the_nodes_it_finds(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        volumes = cell.open_volumes()
        successor = cell.new_service("second")
        await successor.start()
        assert successor.epoch == cell.service.epoch + 1
        before = {node_id: len(node.leases) for node_id, node in cell.nodes.items()}
        await successor.step()
        for node_id, node in cell.nodes.items():
            assert len(node.leases) == before[node_id] + 1
            assert node.leases[-1][1] == 1, "nobody restarted: nobody loses an incarnation"
        assert cell.open_volumes() == volumes
        await successor.stop()

    play(main)


def test_a_deposed_leader_changes_nothing_and_stops_itself(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await cell.until(lambda: cell.states() == [UP] * 9)
        successor = cell.new_service("second")
        await successor.start()
        version = cell.version()
        with pytest.raises(NotLeader, match="second has been placement leader since epoch 2"):
            await cell.service.register(registration(1))
        await asyncio.wait([running], timeout=SETTINGS.review_interval_s + 2)
        assert isinstance(running.exception(), NotLeader)
        assert cell.version() == version
        asked = {node_id: len(node.leases) for node_id, node in cell.nodes.items()}
        await asyncio.sleep(10)
        assert asked == {node_id: len(node.leases) for node_id, node in cell.nodes.items()}
        await successor.stop()

    play(main)


def test_a_deposed_leader_cannot_seal_what_it_planned_to_seal(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        await cell.service.step()
        successor = cell.new_service("second")
        await successor.start()
        cell.node(1).alive = False
        volumes = cell.open_volumes()
        with pytest.raises(NotLeader):
            await cell.until_down(1)
        assert cell.open_volumes() == volumes
        assert cell.states() == [UP] * 9
        await successor.stop()

    play(main, start_grace_s=0.0)


def test_a_database_set_back_in_time_catches_up_with_its_nodes(play: Callable[..., None]) -> None:
    async def main(cell: ServiceCell) -> None:
        await cell.service.start()
        await cell.start_all()
        cell.node(4).incarnation = 12  # written on its disk by the future that was rolled back
        await cell.service.step()
        await cell.service.step()
        assert cell.rows.node(4).incarnation == 13
        assert cell.node(4).incarnation == 13
        assert cell.states() == [UP] * 9

    play(main)


# -- database trouble, idleness --------------------------------------------------------------------


def test_a_pass_that_the_database_refused_is_done_by_a_later_one(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await cell.until(lambda: cell.states() == [UP] * 9)
        refusals: list[Exception] = [DatabaseBusy("by the test"), UnknownOutcome("by the test")]
        write = cell.db.write

        async def sometimes(work: Callable[[Connection], Any]) -> Any:
            if refusals:
                raise refusals.pop()
            return await write(work)

        monkeypatch.setattr(cell.db, "write", sometimes)
        cell.node(7).alive = False
        await cell.until(lambda: cell.states()[6] is SUSPECT, within_s=10)
        assert refusals == []
        await cell.service.stop()
        await running

    play(main)


def test_a_service_that_cannot_take_its_role_yet_tries_again(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(cell: ServiceCell) -> None:
        refusals: list[Exception] = [DatabaseBusy("by the test"), UnknownOutcome("by the test")]
        write = cell.db.write

        async def sometimes(work: Callable[[Connection], Any]) -> Any:
            if refusals:
                raise refusals.pop()
            return await write(work)

        monkeypatch.setattr(cell.db, "write", sometimes)
        running = asyncio.create_task(cell.service.run())
        await cell.until(lambda: cell.service.epoch == 1)
        await cell.service.stop()
        await running

    play(main)


def test_an_idle_cell_writes_nothing_and_reads_little(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await asyncio.sleep(30)
        version, transactions = cell.version(), cell.db.stats().transactions
        reads = 0
        read = cell.db.read

        async def counted(work: Callable[[Connection], Any]) -> Any:
            nonlocal reads
            reads += 1
            return await read(work)

        monkeypatch.setattr(cell.db, "read", counted)
        await asyncio.sleep(100)
        assert cell.db.stats().transactions == transactions
        assert cell.version() == version
        looks = 100 / SETTINGS.review_interval_s + 100 / SETTINGS.sightings_interval_s
        assert reads <= looks + 2
        await cell.service.stop()
        await running

    play(main)


def test_reports_are_stored_at_a_bounded_rate_without_a_new_map_version(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        await asyncio.sleep(30)
        version, transactions = cell.version(), cell.db.stats().transactions
        for second in range(100):
            for node in cell.nodes.values():
                node.fragments = second
            await asyncio.sleep(1)
        assert cell.version() == version
        written = cell.db.stats().transactions - transactions
        assert 8 <= written <= 100 / SETTINGS.report_interval_s + 1
        await cell.until(lambda: cell.rows.node(5).fragments == 99)
        assert cell.rows.node(5).used_bytes == 99_000
        assert cell.rows.node(5).free_bytes == 1 << 39
        await cell.service.stop()
        await running

    play(main)


def test_what_nodes_tell_of_their_disks_is_kept_and_progress_alone_is_stored_seldom(
    play: Callable[..., None],
) -> None:
    async def main(cell: ServiceCell) -> None:
        running = asyncio.create_task(cell.service.run())
        await asyncio.sleep(0.1)
        await cell.start_all()
        node, name = cell.node(3), NodeId.numbered(3)

        def kept() -> KeptReport | None:
            return cell.db.read_now(read_disk_reports).get(name)

        await cell.until(lambda: kept() is not None)
        transactions = cell.db.stats().transactions
        for done in range(600):
            node.scrub = ScrubProgress(1, running=True, bytes_done=done, bytes_total=600)
            await asyncio.sleep(1)
        written = cell.db.stats().transactions - transactions
        assert written <= 600 / SETTINGS.disk_report_interval_s + 2
        last = kept()
        assert last is not None
        assert last.scrub.bytes_done >= 600 - 2 * SETTINGS.disk_report_interval_s
        node.scrub = ScrubProgress(1, running=True, bytes_done=600, findings=1)
        await cell.until(lambda: (now := kept()) is not None and now.scrub.findings == 1, 25.0)
        await cell.service.stop()
        await running

    play(main)


# -- with real nodes -------------------------------------------------------------------------------


def test_real_nodes_get_leases_and_adopt_their_incarnations(play: Callable[..., None]) -> None:
    async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    async def main(cell: ServiceCell) -> None:
        real = {
            node_id: StorageNode(
                Identity(CLUSTER_ID, node_id, f"store-{number}"),
                MemoryStore(Disk()),
                cell.clock,
                inline,
            )
            for number, node_id in enumerate(node_ids(9), start=1)
        }
        service = PlacementService(
            cell.db, cell.clock, random.Random(1), lambda view: LocalPort(real[view.node_id])
        )
        await service.start()
        for number in range(1, 10):
            await service.register(registration(number))
        await service.step()
        assert cell.states() == [UP] * 9
        assert all(node.has_lease and node.incarnation == 1 for node in real.values())
        await service.register(registration(6))
        assert real[NodeId.numbered(6)].incarnation == 2
        assert real[NodeId.numbered(6)].has_lease
        await service.stop()
        await asyncio.sleep(SETTINGS.lease_s + 0.1)
        assert not any(node.has_lease for node in real.values()), "leases end by themselves"

    play(main)
