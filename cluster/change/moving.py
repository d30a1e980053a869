"""Jobs that move slots: drain, decommission, replace, rebalance.

Called by `runner`, one `MovingJob` per job.  Plans from the present state, hands the moves to
repair's executor, looks again, until nothing is left: a restart, a pause or a lost race costs a new
plan and nothing else.  May not import Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from sqlalchemy import Connection

from cluster import members
from cluster.block_client_settings import Run
from cluster.change import requests
from cluster.change.jobs import (
    Blocker,
    Job,
    JobEvent,
    JobKind,
    Progress,
    change_job,
    report_progress,
)
from cluster.change.plans import Blocked, MovePlan
from cluster.change.requests import ChangeRequest
from cluster.move_rows import read_moves
from cluster.repair.executor import Lead, RunState, VolumeResult
from cluster.repair.plan import SlotMove
from cluster.repair.volume_run import Progress as ShowMade
from cluster.topology import CellView, NodeState
from protocol.clock import Clock
from protocol.ids import NodeId, VolumeId
from sql.database import Database

VOLUMES_PER_ROUND: Final = 12
"""Volumes handed over at once: some more than are worked on at a time, so that none waits long."""

RETRY_S: Final = 3.0
RETRY_S_MAX: Final = 24.0
"""Before a job that gets no further looks again: the pause doubles, since a look reads all
volumes."""

AVOID_S: Final = 60.0
"""For so long a node that did not take fragments is no target."""

RATE_S: Final = 30.0
REPORT_S: Final = 1.0


class Mover(Protocol):
    """Repair's executor, as far as jobs need it."""

    async def run(self, moves: Iterable[SlotMove], progress: ShowMade) -> list[VolumeResult]:
        """Carry moves out; one result per volume."""
        ...

    async def abandon(self, slots: Sequence[tuple[VolumeId, int]]) -> None:
        """Forget moves."""
        ...


@dataclass(frozen=True, slots=True)
class JobTools:
    """What every kind of job needs."""

    db: Database
    clock: Clock
    lead: Lead
    mover: Mover
    run: Run
    """For planning: it computes for seconds in a large cell."""


@dataclass(slots=True)
class Tally:
    """How far a job is, and at what rate."""

    clock: Clock
    done_units: int
    done_bytes: int
    left_units: int = 0
    left_bytes: int = 0
    made_bytes: int = 0
    """Of moves that are not finished yet."""
    blockers: dict[VolumeId, Blocker] = field(default_factory=dict)
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def finished(self, units: int, size: int) -> None:
        """So much of the plan is done."""
        self.done_units += units
        self.done_bytes += size
        self.left_units -= units
        self.left_bytes -= size

    def progress(self, detail: str) -> Progress:
        """For the job's row."""
        now, made = self.clock.monotonic(), min(self.made_bytes, max(self.left_bytes, 0))
        done = self.done_bytes + made
        self._samples.append((now, done))
        while now - self._samples[0][0] > RATE_S:
            self._samples.popleft()
        then, before = self._samples[0]
        rate = max(0.0, (done - before) / (now - then)) if now > then else 0.0
        return Progress(
            self.done_units,
            self.done_units + max(self.left_units, 0),
            done,
            self.done_bytes + max(self.left_bytes, 0),
            rate,
            detail,
            tuple(self.blockers.values()),
        )


class MovingJob:
    """The work of one job, for as long as it runs."""

    def __init__(self, tools: JobTools, job: Job) -> None:
        self._tools = tools
        self._job = job
        self._request = requests.request_of(job)
        self._tally = Tally(tools.clock, job.progress.done_units, job.progress.done_bytes)
        self._avoid: dict[NodeId, float] = {}
        self._waiting = 0
        """Volumes that are moved as soon as they are sealed, or another move of them ended."""
        self._reported_at = float("-inf")

    async def work(self) -> bool:
        """Until there is nothing left to move; True if nodes left the cell.

        Raises `NotLeader`, `DatabaseBusy`.  May be cancelled at any time.
        """
        pause_s = RETRY_S
        while True:
            plan, resumed, sizes = await self._plan()
            if not (plan.moves or resumed or plan.blocked or plan.waiting):
                ended = await self._try_finish()
                if ended is not None:
                    return ended
            if await self._carry_out(plan, resumed, sizes):
                pause_s = RETRY_S
            else:
                await self._tools.clock.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_S_MAX)

    # -- plan --------------------------------------------------------------------------------------

    async def _plan(self) -> tuple[MovePlan, list[SlotMove], Mapping[VolumeId, int]]:
        """Moves that this job began and did not finish, and a plan for the rest."""
        now = self._tools.clock.wall()

        def enter(connection: Connection) -> bool:
            """Whether the node of a job is away; what was on it is repair's then."""
            if self._request.node is not None and self._request.kind is not JobKind.REPLACE:
                view = members.get_node(connection, self._request.node)
                if view.state is NodeState.DOWN:
                    return True
            requests.enter(connection, self._request, now, self._job.name)
            return False

        is_away = await self._tools.lead(enter)
        view, resumed, stale, busy = await self._tools.db.read(self._read)
        if stale:
            await self._tools.mover.abandon(stale)
        if is_away:
            plan, resumed = _waiting(view, self._request), []
        else:
            view = self._without_unfit(view)
            plan = await self._tools.run(requests.plan_request, view, self._request, busy)
        assert isinstance(plan, MovePlan)
        sizes = {move.volume: move.bytes for move in plan.moves}
        begun = {move.volume for move in resumed}
        self._waiting = sum(item.volume not in begun for item in plan.waiting)
        self._tally.left_units = len(plan.moves) + len(resumed) + len(plan.blocked) + self._waiting
        self._tally.left_bytes = plan.bytes
        self._tally.blockers = {
            blocked.volume: Blocker(str(blocked.volume), blocked.reason) for blocked in plan.blocked
        }
        return plan, resumed, sizes

    def _read(
        self, connection: Connection
    ) -> tuple[CellView, list[SlotMove], list[tuple[VolumeId, int]], frozenset[VolumeId]]:
        view, busy = requests.read_cell(connection)
        nodes = {node.node_id: node for node in view.nodes}
        slots = {volume.volume_id: volume.slots for volume in view.volumes}
        resumed: list[SlotMove] = []
        stale: list[tuple[VolumeId, int]] = []
        for row in read_moves(connection):
            if row.job_id != self._job.job_id:
                continue
            target = nodes.get(row.target)
            if row.volume not in slots or target is None or not target.takes_new_volumes:
                stale.append((row.volume, row.slot))
                continue
            source = slots[row.volume][row.slot]
            serves = source is not None and nodes[source].serves_reads
            resumed.append(
                SlotMove(
                    row.volume,
                    row.slot,
                    source if serves else None,
                    row.target,
                    row.reason,
                    row.job_id,
                )
            )
        return view, resumed, stale, busy

    def _without_unfit(self, view: CellView) -> CellView:
        """Nodes that did not take fragments lately get none."""
        now = self._tools.clock.monotonic()
        self._avoid = {node: until for node, until in self._avoid.items() if until > now}
        if not self._avoid:
            return view
        nodes = tuple(
            replace(node, weight=0.0) if node.node_id in self._avoid else node
            for node in view.nodes
        )
        return CellView(nodes, view.volumes)

    # -- do ----------------------------------------------------------------------------------------

    async def _carry_out(
        self, plan: MovePlan, resumed: Sequence[SlotMove], sizes: Mapping[VolumeId, int]
    ) -> bool:
        """All of a plan, some volumes at a time; whether anything was done."""
        moves = list(resumed)
        reason = str(self._job.kind)
        moves += [
            SlotMove(move.volume, move.slot, move.source, move.target, reason, self._job.job_id)
            for move in plan.moves
        ]
        done = False
        await self._report(force=True)
        for some in _rounds(moves):
            self._tally.made_bytes = 0
            results = await self._tools.mover.run(some, self._made)
            self._tally.made_bytes = 0
            done |= await self._take(results, some, sizes)
            await self._report(force=True)
        return done

    def _made(self, _fragments: int, size: int) -> None:
        self._tally.made_bytes += size

    async def _take(
        self,
        results: Iterable[VolumeResult],
        moves: Sequence[SlotMove],
        sizes: Mapping[VolumeId, int],
    ) -> bool:
        done = False
        given_up: list[tuple[VolumeId, int]] = []
        for result in results:
            slots = [move.slot for move in moves if move.volume == result.volume]
            if result.state is RunState.DONE:
                size = len(slots) * sizes.get(result.volume, 0)
                self._tally.finished(len(slots), size)
                self._tally.blockers.pop(result.volume, None)
                done = True
            elif result.state is RunState.UNFIT:
                assert result.unfit is not None
                self._avoid[result.unfit] = self._tools.clock.monotonic() + AVOID_S
                given_up += [(result.volume, slot) for slot in slots]
                self._block(result)
            elif result.state is RunState.PARTIAL:
                self._block(result)
        if given_up:
            await self._tools.mover.abandon(given_up)
        return done

    def _block(self, result: VolumeResult) -> None:
        failed = {**(result.lost or {}), **(result.postponed or {})}
        reason = result.detail or next(iter(failed.values()), str(result.state.value))
        blocks = tuple(str(block) for block in list(failed)[:20])
        self._tally.blockers[result.volume] = Blocker(str(result.volume), reason, blocks)

    async def _report(self, *, force: bool = False) -> None:
        now = self._tools.clock.monotonic()
        if not force and now - self._reported_at < REPORT_S:
            return
        self._reported_at = now
        progress = self._tally.progress(self._detail())
        await self._tools.lead(
            lambda connection: report_progress(connection, self._job.job_id, progress)
        )

    def _detail(self) -> str:
        said = []
        if self._tally.blockers:
            said.append(f"{len(self._tally.blockers)} volumes get no further")
        if self._waiting:
            said.append(f"{self._waiting} volumes wait to be sealed, or for another move of theirs")
        return "; ".join(said)

    async def show(self) -> None:
        """Note progress of moves that are under way; called now and then."""
        await self._report()

    # -- the end -----------------------------------------------------------------------------------

    async def _try_finish(self) -> bool | None:
        """End the job if its node is as empty as it must be; None if it is not.  True: a node
        left the cell."""
        now = self._tools.clock.wall()
        progress = self._tally.progress("")

        def work(connection: Connection) -> bool | None:
            report_progress(connection, self._job.job_id, progress)
            left = _leave(connection, self._request, now)
            if left is None:
                return None
            if left is _STUCK:
                why = f"{self._request.node} is away: repair rebuilt what it held"
                change_job(connection, self._job.job_id, JobEvent.FAIL, now, why)
                return False
            detail = "its directory was left as it is" if left is _LEFT else None
            change_job(connection, self._job.job_id, JobEvent.FINISH, now, detail)
            return left is _LEFT

        return await self._tools.lead(work)


_STAYS: Final = "stays"
_LEFT: Final = "left"
_STUCK: Final = "stuck"


def _leave(connection: Connection, request: ChangeRequest, now: float) -> str | None:
    """Let the node of a job take its last steps; None while something still refers to it."""
    if request.kind is JobKind.REBALANCE:
        return _STAYS
    assert request.node is not None
    emptied = members.mark_emptied(connection, request.node, now)
    if request.kind is JobKind.DRAIN:
        if emptied:
            return _STAYS
        state = members.get_node(connection, request.node).state
        away = state in (NodeState.DOWN, NodeState.GONE)
        return _STUCK if away and not members.references(connection, request.node) else None
    return _LEFT if members.remove_node(connection, request.node, now) else None


def _waiting(view: CellView, request: ChangeRequest) -> MovePlan:
    """Nothing is read from a node that is away, and it may come back: its job waits."""
    why = f"{request.node} is down: waits for it, or for repair to rebuild what it holds"
    held = [volume for volume in view.volumes if request.node in volume.slots]
    return MovePlan((), tuple(Blocked(volume.volume_id, why) for volume in held))


def _rounds(moves: Sequence[SlotMove]) -> Iterable[list[SlotMove]]:
    """Moves of at most `VOLUMES_PER_ROUND` volumes each; those of one volume stay together."""
    grouped: dict[VolumeId, list[SlotMove]] = {}
    for move in moves:
        grouped.setdefault(move.volume, []).append(move)
    volumes = list(grouped.values())
    for start in range(0, len(volumes), VOLUMES_PER_ROUND):
        yield [move for mine in volumes[start : start + VOLUMES_PER_ROUND] for move in mine]
