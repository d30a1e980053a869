"""The repair service: looks for what is lost, plans, repairs, and says how far it is.

Step 1 of a move, and the loop around all of them.  Called by its Ray shell in a cluster, directly
by the simulation; imports no Ray.  Its durable state is in `cell.db`: a restarted one takes the
role over and goes on where the move rows and the disks say.

One pass:
  1. ask nodes that are down for their word, and decide which are out (`plan.is_out`);
  2. read what is lost (`repair_rows.read_view`) and plan (`plan.plan_repair`);
  3. carry the plan out (`executor`); whoever proved unfit is no target for a while.
Passes follow each other while there is something to do.  Then the service waits for the map to
change, and looks again from time to time all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
from sqlalchemy import Connection

from cluster.block_client_settings import Run
from cluster.block_index import BlockIndex, count_debts
from cluster.debts import oldest_debt
from cluster.leadership import check_role, take_role
from cluster.node_pool import NodePool
from cluster.repair import repair_rows
from cluster.repair.executor import RepairExecutor, RunState, VolumeResult
from cluster.repair.failing import FailureBook
from cluster.repair.plan import (
    NodeWord,
    RepairBudget,
    RepairPlan,
    RepairView,
    is_out,
    plan_repair,
    word_of,
)
from cluster.repair.remake import Remaker
from cluster.repair.settings import RepairSettings
from cluster.repair.throttle import LiveWatch, Throttle
from cluster.repair.volume_run import RunTools
from cluster.sightings import SightingBook, read_sightings
from cluster.topology import NodeState, NodeView
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.keyring import Keyring
from protocol.clock import Clock
from protocol.errors import HaversackError, NotLeader, RetryLater, UnknownOutcome
from protocol.ids import NodeId, VolumeId
from sql.database import Database
from storage_node.interface import NodePort

T = TypeVar("T")

ROLE: Final = "repair"

_WORD_S: Final = 2.0
"""Deadline of the question to a node that is down."""

_AVOID_S: Final = 60.0
"""For so long a node that did not take fragments is no target."""

_FORGET_AT_ONCE: Final = 500
"""Volumes of one statement."""

_LIVE_LOOK_S: Final = 0.5
_IDLE_LOOK_S: Final = 1.0
"""Between two looks at who else is served, while repair works and while there is nothing to do."""

_RATE_SAMPLES: Final = 30

log = structlog.get_logger()


@dataclass(slots=True)
class RepairCounters:
    """Since the process started, but for what is about the present."""

    passes: int = 0
    made_fragments: int = 0
    made_bytes: int = 0
    repaid: int = 0
    published: int = 0
    left_volumes: int = 0
    """Volumes that lost something, as of the last plan."""
    blocked_slots: int = 0
    left_bytes: int = 0
    """Bytes of fragments still to be made, about, as of the last plan."""
    debts: int = 0
    oldest_debt: float | None = None
    """Wall-clock seconds."""
    out_nodes: tuple[str, ...] = ()
    bytes_per_s: float = 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until nothing is left, at the present rate; None while nothing moves."""
        if not self.left_bytes:
            return 0.0
        return self.left_bytes / self.bytes_per_s if self.bytes_per_s > 0 else None

    def to_json(self) -> dict[str, Any]:
        """What is kept in SQL for status and metrics."""
        return {**dataclasses.asdict(self), "eta_s": self.eta_s}


class RepairService:
    """The holder of the repair role of one cell.  One event loop."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        rng: random.Random,
        ports: Callable[[NodeView], NodePort],
        codec: Codec,
        keyring: Keyring | None,
        run: Run,
        settings: RepairSettings | None = None,
        holder: str = "repair",
    ) -> None:
        """`ports` connects to a node as its row says; `run` computes off the event loop."""
        self._db = db
        self._clock = clock
        self._rng = rng
        self._settings = settings or RepairSettings()
        self._holder = holder
        self._epoch = 0
        self._map = VolumeMap(db, clock)
        self._pool = NodePool(self._map, ports, clock, rng)
        self._throttle = Throttle(
            clock, self._settings.bytes_per_s_max, self._settings.bytes_per_s_min
        )
        self._live = LiveWatch(
            self._throttle, self._pool.port, clock, self._settings.live_latency_s
        )
        tools = RunTools(
            self._pool,
            Remaker(codec, keyring),
            self._throttle,
            self._live,
            run,
            self._settings,
        )
        self.executor = RepairExecutor(
            db, BlockIndex(db, clock), self._map, tools, clock, self.lead
        )
        self.counters = RepairCounters()
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)
        self._unfit: dict[NodeId, float] = {}
        self._not_before: dict[VolumeId, float] = {}
        self._down_seen: dict[tuple[NodeId, float], float] = {}
        """When a node was first seen down since an instant of its row, by our own clock."""
        self._wake = asyncio.Event()
        self._stopped = False
        self._reported_at = float("-inf")
        self._sightings = SightingBook()
        self._failures = FailureBook(clock, self.lead)

    # -- the role ----------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of the role row, once started."""
        return self._epoch

    async def start(self) -> None:
        """Take the role from whoever had it.  Raises `DatabaseBusy`."""
        now = self._clock.wall()
        self._epoch = await self._db.write(
            lambda connection: take_role(connection, ROLE, self._holder, now)
        )
        await self._map.refresh()
        log.info("repair leads", epoch=self._epoch)

    async def lead(self, work: Callable[[Connection], T]) -> T:
        """A transaction that only the holder of the role may make.  Raises `NotLeader`."""
        epoch = self._epoch

        def guarded(connection: Connection) -> T:
            check_role(connection, ROLE, epoch)
            return work(connection)

        return await self._db.write(guarded)

    async def run(self) -> None:
        """Lead until `stop`.  Raises `NotLeader` when another process has taken the role."""
        try:
            while not self._epoch and not self._stopped:
                await self._try(self.start)
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch_clients(), name="repair-live")
                try:
                    await self._loop()
                finally:
                    watching.cancel()
        except* NotLeader as group:
            raise NotLeader(str(group.exceptions[0])) from None
        finally:
            await self._pool.aclose()

    async def stop(self) -> None:
        """End `run` after the present pass.  Idempotent."""
        self._stopped = True
        self._wake.set()

    def wake(self) -> None:
        """Something was asked for: look now."""
        self._wake.set()

    async def _loop(self) -> None:
        seen = -1
        passed_at = float("-inf")
        while not self._stopped:
            version = await self._try(self._map_version)
            now = self._clock.monotonic()
            due = now - passed_at >= self._settings.pass_s
            if version is not None and (version != seen or due or self._wake.is_set()):
                self._wake.clear()
                seen, passed_at = version, now
                if await self._try(self._noted_step):
                    seen = -1  # there may be more to do
                    await self._clock.sleep(self._settings.look_s / 10)
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.look_s):
                    await self._wake.wait()

    async def _noted_step(self) -> bool:
        """A pass; that it failed, or went well again, is noted for the alarm."""
        try:
            more = await self.step()
            await self._failures.worked()
        except NotLeader:
            raise
        except Exception as error:
            await self._failures.failed(error)
            raise
        return more

    async def _map_version(self) -> int:
        await self._map.refresh()
        return self._map.version

    async def _try(self, step: Callable[[], Any]) -> Any:
        """A step that may fail: whatever it wanted is still wanted at the next one."""
        try:
            return await step()
        except NotLeader:
            log.warning("repair lost its role", epoch=self._epoch)
            raise
        except (RetryLater, UnknownOutcome) as error:
            log.warning("repair step failed", error=error.message)
            await self._clock.sleep(self._settings.look_s)
            return None

    async def _watch_clients(self) -> None:
        while True:
            pause_s = _LIVE_LOOK_S if self.counters.left_volumes else _IDLE_LOOK_S
            due = self._clock.monotonic() + pause_s
            await self._clock.sleep(pause_s)
            if self.counters.left_volumes:
                await self._live.look(self._clock.monotonic() - due)

    # -- passes ------------------------------------------------------------------------------------

    async def step(self) -> bool:
        """One whole pass; True if it got something done, so that another should follow."""
        await self._map.refresh()
        view = await self.view()
        await self._forget_unrepairable(view)
        plan = self.plan(view)
        await self._note_plan(view, plan)
        if plan.abandon:
            await self.executor.abandon(plan.abandon)
        results: list[VolumeResult] = []
        if plan.repairs:
            results = await self.executor.repair_all(plan.repairs, self._progress)
        self.counters.passes += 1
        done = self._take_results(results)
        if results or plan.left:
            await self._report(force=not done)
        return done

    async def view(self) -> RepairView:
        """What is lost, as of now."""
        out = await self._out_nodes()
        view = await self._db.read(
            lambda connection: repair_rows.read_view(
                connection, out, self._settings.volumes_seen_max
            )
        )
        now = self._clock.monotonic()
        avoid = frozenset(node for node, until in self._unfit.items() if until > now)
        waiting = {volume for volume, until in self._not_before.items() if until > now}
        volumes = tuple(item for item in view.volumes if item.volume_id not in waiting)
        return dataclasses.replace(view, volumes=volumes, avoid=avoid)

    async def _forget_unrepairable(self, view: RepairView) -> None:
        """Nothing of these volumes is lost any more: their disks came back by themselves."""
        if len(view.volumes) >= self._settings.volumes_seen_max:
            return  # there may be damage that was not read
        listed = await self._db.read(repair_rows.listed_volumes)
        now = self._clock.monotonic()
        damaged = {int(item.volume_id) for item in view.volumes}
        damaged |= {int(volume) for volume, until in self._not_before.items() if until > now}
        whole = sorted(listed - damaged)[:_FORGET_AT_ONCE]
        if whole:
            await self.lead(lambda connection: repair_rows.forget_unrepairable(connection, whole))

    def plan(self, view: RepairView) -> RepairPlan:
        """What a pass would do with this view: a dry run."""
        budget = RepairBudget(self._settings.volumes_per_pass, self._settings.headroom_share)
        return plan_repair(view, budget, self._rng)

    async def _out_nodes(self) -> frozenset[NodeId]:
        """Nodes whose slots are to be placed anew; each that is due is asked once more."""
        down = [n for n in self._map.nodes() if n.state in (NodeState.DOWN, NodeState.GONE)]
        now = self._time_of_each(down)
        due = [node for node in down if is_out(node, now[node.node_id], self._settings)]
        if not due:
            return frozenset()
        words = await asyncio.gather(*(self._word(node) for node in due))
        self._sightings.update(await self._db.read(read_sightings), self._clock.monotonic())
        reached = self._sightings.reached(self._clock.monotonic())
        # Gateways say nothing of a node that is back: whoever missed their word finds it up here.
        await self._map.refresh()
        as_before = {(n.node_id, n.state, n.state_since) for n in self._map.nodes()}
        return frozenset(
            node.node_id
            for node, word in zip(due, words, strict=True)
            if (node.node_id, node.state, node.state_since) in as_before
            and is_out(
                node, now[node.node_id], self._settings, word, is_read=node.node_id in reached
            )
        )

    def _time_of_each(self, down: Sequence[NodeView]) -> dict[NodeId, float]:
        """Wall-clock time, but never less than what this process has itself seen pass since a node
        went down: its row was stamped by another host, whose clock may have been ahead."""
        now = self._clock.monotonic()
        seen = {
            (node.node_id, node.state_since): self._down_seen.get(
                (node.node_id, node.state_since), now
            )
            for node in down
        }
        self._down_seen = seen
        wall = self._clock.wall()
        return {node_id: max(wall, since + now - first) for (node_id, since), first in seen.items()}

    async def _word(self, node: NodeView) -> NodeWord:
        """What a node that placement calls down says of itself."""
        if node.state is NodeState.GONE or not node.endpoint:
            return NodeWord.SILENT
        try:
            reply = await self._pool.port(node.node_id).summary(_WORD_S)
        except HaversackError:
            return NodeWord.SILENT
        return word_of(reply.state, reply.fault)

    def _take_results(self, results: list[VolumeResult]) -> bool:
        """Remember who was unfit and what must wait; True if anything moved."""
        now = self._clock.monotonic()
        moved = False
        for result in results:
            self.counters.repaid += result.repaid
            if result.unfit is not None:
                log.warning("repair target unfit", node=str(result.unfit), detail=result.detail)
                self._unfit[result.unfit] = now + _AVOID_S
            stuck = bool(result.lost or result.postponed)
            pause_s = self._settings.retry_unrepairable_s if result.lost else 0.0
            if result.postponed and not result.lost:
                pause_s = self._settings.pass_s
            if result.state is RunState.MOVED_ON:
                pause_s = self._settings.look_s
            if pause_s:
                self._not_before[result.volume] = now + pause_s
            else:
                self._not_before.pop(result.volume, None)
            moved = moved or result.state is RunState.DONE or bool(result.made_fragments)
            moved = moved or result.state is RunState.UNFIT
            if result.state is RunState.DONE:
                self.counters.published += 1
            if stuck:
                log.warning("blocks not repaired", volume=str(result.volume), detail=_why(result))
        return moved

    # -- what it says ------------------------------------------------------------------------------

    def _progress(self, fragments: int, size: int) -> None:
        self.counters.made_fragments += fragments
        self.counters.made_bytes += size
        self.counters.left_bytes = max(0, self.counters.left_bytes - size)
        self._samples.append((self._clock.monotonic(), self.counters.made_bytes))
        (first_at, first), (last_at, last) = self._samples[0], self._samples[-1]
        if last_at > first_at:
            self.counters.bytes_per_s = (last - first) / (last_at - first_at)

    async def _note_plan(self, view: RepairView, plan: RepairPlan) -> None:
        counters = self.counters
        before = (counters.left_volumes, counters.debts, counters.out_nodes, counters.blocked_slots)
        per_volume: Counter[VolumeId] = Counter()
        for repair in plan.repairs:
            per_volume[repair.volume] += len(repair.moves)
        counters.left_volumes = len(plan.repairs) + plan.left
        counters.blocked_slots = len(plan.blocked)
        counters.out_nodes = tuple(sorted(view.out))
        counters.left_bytes = sum(
            volume.scheme.chunk_bytes(volume.stored_bytes) * per_volume[volume.volume_id]
            for volume in view.volumes
        )

        def work(connection: Connection) -> tuple[int, float | None]:
            return count_debts(connection), oldest_debt(connection)

        counters.debts, counters.oldest_debt = await self._db.read(work)
        if not counters.left_volumes:
            counters.bytes_per_s = 0.0
            self._samples.clear()
        after = (counters.left_volumes, counters.debts, counters.out_nodes, counters.blocked_slots)
        await self._report(force=after != before and not plan.repairs)

    async def _report(self, *, force: bool = False) -> None:
        """Note in SQL how far we are; at most every `report_s` unless something ended."""
        now = self._clock.monotonic()
        busy = self.counters.left_volumes > 0
        if not force and not (busy and now - self._reported_at >= self._settings.report_s):
            return
        self._reported_at = now
        wall = self._clock.wall()
        body, number = self.counters.to_json(), self.counters.passes
        ended = None if busy else wall
        await self.lead(
            lambda connection: repair_rows.save_progress(connection, number, wall, ended, body)
        )


def _why(result: VolumeResult) -> str:
    """For the log: how many blocks, and the reason of the first."""
    reasons = {**(result.postponed or {}), **(result.lost or {})}
    block, reason = next(iter(reasons.items()))
    return f"{len(reasons)} blocks; {block}: {reason}"
