"""Keeps the cell's map true: leases, node states, a stock of open volumes.

Works ahead of every walk: a put finds open volumes and leased nodes because this service made
them.  Called by its Ray shell in a cluster, directly by the simulation.  Imports no Ray.  Its
durable state is in `cell.db`: a restarted one takes the role over and reads everything back.

One pass:
  1. push a lease to every node that has registered (`node_watch`), all at once;
  2. turn what was heard into node transitions (`topology.transition`);
  3. seal open volumes that are full, lost a node, hold one that takes no writes, or could be wider
     (`placement.plan_seals`);
  4. open new ones up to the stock (`placement.plan_volumes`).
Steps 2 to 4 are one transaction, which first compares the leader's epoch and raises the map version
if it changed anything.  When there is nothing to do, nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog
from sqlalchemy import Connection

from cluster import map_rows
from cluster.cell import open_cell
from cluster.change.jobs import wanted_schemes
from cluster.disk_reports import DiskReport, save_disk_reports
from cluster.events import CELL, EventKind, record_event
from cluster.leadership import check_role, take_role
from cluster.node_watch import NodeWatch, Ports
from cluster.placement import (
    Opening,
    OpenVolumesPlan,
    Seal,
    SealPlan,
    StockTarget,
    plan_seals,
    plan_volumes,
)
from cluster.placement_settings import PlacementSettings
from cluster.sightings import SightingBook, forget_gateways, read_sightings
from cluster.topology import (
    CellView,
    NodeEvent,
    NodeState,
    NodeView,
    VolumeView,
    may_happen,
    transition,
)
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import (
    ConfigInvalid,
    DirectoryForeign,
    NodeRefuses,
    NotLeader,
    RetryLater,
    UnknownOutcome,
)
from protocol.ids import NodeId
from sql.database import Database
from storage_node.interface import NodeRegistration

T = TypeVar("T")

ROLE: Final = "placement"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Change:
    """What a pass found to do before its transaction."""

    events: dict[NodeId, tuple[NodeEvent, str]]
    """With what the node said."""
    ahead: dict[NodeId, int]
    reports: tuple[map_rows.NodeReport, ...]
    disk_reports: tuple[DiskReport, ...]
    disks: dict[NodeId, bool]
    """Nodes whose disk went bad, or is well again."""
    unwritable: frozenset[NodeId]
    """See `CellView`; none while the service does not know its nodes yet."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a pass wrote."""

    nodes: tuple[NodeView, ...]
    moved: tuple[tuple[NodeId, NodeState, NodeState], ...]
    seals: tuple[Seal, ...]
    openings: tuple[Opening, ...]


class PlacementService:
    """The leader of one cell's map, once `start` or `run` has taken the role.  One event loop."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        rng: random.Random,
        ports: Ports,
        settings: PlacementSettings | None = None,
        holder: str = "placement",
    ) -> None:
        """`ports` connects to a node as its row says; `holder` names this process to people."""
        self._db = db
        self._clock = clock
        self._rng = rng
        self._ports = ports
        self._settings = settings or PlacementSettings()
        self._holder = holder
        self._epoch = 0
        self._version = -1
        self._targets: tuple[StockTarget, ...] = ()
        self._kept: dict[Scheme, float] = {}
        self._wake = asyncio.Event()
        self._watch: NodeWatch | None = None
        self._pass_lock = asyncio.Lock()
        self._settled_by = float("-inf")
        self._opened_settled = False
        self._reviewed_at = float("-inf")
        self._reviewed_unwritable: frozenset[NodeId] = frozenset()
        self._reported_at = float("-inf")
        self._stopped = False
        self._sightings = SightingBook()
        self._sighted_at = float("-inf")

    @property
    def epoch(self) -> int:
        """Of the leader row, once started."""
        return self._epoch

    async def start(self) -> None:
        """Take the role from whoever had it, and read the map.  Raises `ConfigInvalid` without a
        cell, `DatabaseBusy`."""
        cell = open_cell(self._db)
        if cell is None:
            raise ConfigInvalid("this database holds no cell yet: create it first")
        now = self._clock.wall()

        def work(connection: Connection) -> tuple[int, list[NodeView]]:
            epoch = take_role(connection, ROLE, self._holder, now)
            record_event(connection, now, EventKind.LEADER, CELL, f"{self._holder} leads {ROLE}")
            return epoch, map_rows.read_nodes(connection)

        self._epoch, nodes = await self._db.write(work)
        self._want(cell.schemes)
        self._settled_by = self._clock.monotonic() + self._settings.start_grace_s
        self._watch = NodeWatch(self._ports, self._clock, self._settings, self._wake.set)
        self._watch.adopt(nodes)
        log.info("placement leads", epoch=self._epoch, nodes=len(nodes))

    async def register(self, registration: NodeRegistration) -> int:
        """A node process opened its store: count a new incarnation and lease it; returns it.

        The lease itself arrives through the node's data port; a node that has none after this
        registers again.  One that refuses its directory begins no incarnation: only where to ask it
        is noted, unless another process of the node answers.  Raises `ConfigInvalid` for a node
        that is not a member, `DirectoryForeign` for another store than the member's or for a
        removed member, `NodeRefuses`, `NotLeader`, `DatabaseBusy`.
        """
        watch = self._watch
        if watch is None:
            raise NotLeader("the placement service has not taken its role yet: register again")
        if registration.refusal:
            return await self._note_refusal(watch, registration)

        def work(connection: Connection) -> NodeView:
            _admit(map_rows.read_node(connection, registration.node_id), registration)
            version = map_rows.next_version(connection)
            map_rows.begin_incarnation(connection, registration, version)
            view = map_rows.read_node(connection, registration.node_id)
            assert view is not None
            said = f"incarnation {view.incarnation}, process {view.pid} at {view.endpoint}"
            record_event(connection, now, EventKind.NODE_REGISTERED, view.node_id, said)
            return view

        now = self._clock.wall()
        view = await self._lead(work)
        watch.adopt([view])
        log.info("node registered", node=str(view.node_id), incarnation=view.incarnation)
        await watch.push_now(view.node_id)
        return view.incarnation

    async def _note_refusal(self, watch: NodeWatch, registration: NodeRegistration) -> int:
        """Let a node that does not serve be asked, and say why in its row."""

        def work(connection: Connection) -> NodeView:
            member = map_rows.read_node(connection, registration.node_id)
            _admit(member, registration)
            assert member is not None
            if member.endpoint != registration.endpoint or not member.detail:
                version = map_rows.next_version(connection)
                map_rows.note_refusal(connection, registration, version)
            view = map_rows.read_node(connection, registration.node_id)
            assert view is not None
            return view

        if watch.answers(registration.node_id):
            raise NodeRefuses(f"another process serves {registration.node_id}")
        view = await self._lead(work)
        watch.adopt([view])
        await watch.push_now(view.node_id)
        return view.incarnation

    async def run(self) -> None:
        """Take the role if `start` has not, and lead until `stop`.

        Raises `NotLeader` when another process has taken the role, `ConfigInvalid` without a cell.
        """
        try:
            while self._watch is None and not self._stopped:
                await self._try_start()
            await self._run()
        finally:
            await self.stop()

    async def step(self) -> None:
        """One whole pass, for tests and the simulation: push, wait for the answers, reconcile."""
        watch = self._started()
        watch.push_due()
        await watch.settle()
        await self._pass(review=True)

    async def stop(self) -> None:
        """End `run` and close the ports; leases run out by themselves.  Idempotent."""
        self._stopped = True
        self._wake.set()
        if self._watch is not None:
            async with self._pass_lock:
                await self._watch.aclose()

    async def _try_start(self) -> None:
        try:
            await self.start()
        except (RetryLater, UnknownOutcome) as error:
            log.warning("placement cannot take its role yet", error=error.message)
            await self._clock.sleep(self._settings.lease_interval_s)

    async def _run(self) -> None:
        push_at = self._clock.monotonic()
        while not self._stopped:
            now = self._clock.monotonic()
            if now >= push_at:
                self._started().push_due()
                push_at = now + self._settings.lease_interval_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(push_at - now):
                    await self._wake.wait()
            self._wake.clear()
            if not self._stopped:
                await self._try_pass()

    # -- passes --------------------------------------------------------------------------------

    async def _try_pass(self) -> None:
        """A pass that may fail: whatever it wanted is still wanted at the next one."""
        now = self._clock.monotonic()
        review = now - self._reviewed_at >= self._settings.review_interval_s
        review = review or (self._settled() and not self._opened_settled)
        try:
            await self._pass(review)
        except NotLeader:
            log.warning("placement lost its role", epoch=self._epoch)
            raise
        except (RetryLater, UnknownOutcome) as error:
            log.warning("placement pass failed", error=error.message)

    async def _pass(self, review: bool) -> None:
        """Steps 2 to 4, if there is anything to do.  `review`: look into the open volumes even if
        no node changed."""
        async with self._pass_lock:
            if self._stopped:
                return
            await self._look_at_sightings()
            change = self._heard()
            settled = self._settled()
            reports = change.reports or change.disk_reports
            idle = not (change.events or change.ahead or reports or change.disks)
            review = review or change.unwritable != self._reviewed_unwritable
            if idle and not (review and await self._volumes_want_change(change.unwritable)):
                self._opened_settled = settled
                self._reviewed_unwritable = change.unwritable
                return
            seed = self._rng.getrandbits(64)
            now = self._clock.wall()
            done = await self._lead(
                lambda connection: _write_pass(
                    connection,
                    change,
                    self._targets,
                    frozenset(self._kept),
                    random.Random(seed),
                    now,
                    settled,
                )
            )
            self._started().adopt(done.nodes)
            self._opened_settled = settled
            self._reviewed_unwritable = change.unwritable
            self._reviewed_at = self._clock.monotonic()
            if reports:
                self._reported_at = self._reviewed_at
                self._started().disk_reports_stored(change.disk_reports)
            _tell(done)

    async def _look_at_sightings(self) -> None:
        """What gateways say of nodes; what gateways said that are gone is removed."""
        now = self._clock.monotonic()
        if now - self._sighted_at < self._settings.sightings_interval_s:
            return
        self._sightings.update(await self._db.read(read_sightings), now)
        self._sighted_at = now
        watch = self._started()
        incarnations = {view.node_id: view.incarnation for view in watch.views()}
        watch.shun(self._sightings.unreachable(incarnations, now))
        gone = self._sightings.forgotten(now)
        if gone:
            await self._lead(lambda connection: forget_gateways(connection, gone))

    def _heard(self) -> _Change:
        watch = self._started()
        events: dict[NodeId, tuple[NodeEvent, str]] = {}
        for view in watch.views():
            event = watch.event_for(view.node_id)
            if event is not None:
                events[view.node_id] = event, watch.detail_of(view.node_id)
        since_report = self._clock.monotonic() - self._reported_at
        due = since_report >= self._settings.report_interval_s
        reports = tuple(watch.changed_reports()) if due else ()
        disk_reports = tuple(watch.disk_reports_due()) if due else ()
        unwritable = watch.unwritable() if self._settled() else frozenset[NodeId]()
        return _Change(
            events, watch.ahead(), reports, disk_reports, watch.disk_verdicts(), unwritable
        )

    async def _volumes_want_change(self, unwritable: frozenset[NodeId]) -> bool:
        """A look without a write: also finds out whether the role is still ours, and what others
        changed (an operator who adds or drains a node)."""
        held = self._version

        def work(
            connection: Connection,
        ) -> tuple[int, list[NodeView], list[VolumeView], tuple[Scheme, ...]]:
            check_role(connection, ROLE, self._epoch)
            version = map_rows.read_version(connection)
            nodes = [] if version == held else map_rows.read_nodes(connection, held)
            opened = map_rows.read_open_volumes(connection)
            return version, nodes, opened, wanted_schemes(connection)

        self._version, changed, open_volumes, schemes = await self._db.read(work)
        self._want(schemes)
        watch = self._started()
        watch.adopt(changed)
        self._reviewed_at = self._clock.monotonic()
        # The random numbers do not matter: only whether there is a plan.
        view = CellView(watch.views(), tuple(open_volumes), unwritable)
        kept = frozenset(self._kept)
        seals, opens = _plan(view, self._targets, kept, random.Random(0), self._settled())
        return bool(seals.seals or opens.openings)

    def _want(self, schemes: Sequence[Scheme]) -> None:
        """Keep a stock of these schemes.  Open volumes of others stay a while: gateways find out
        about a change of scheme within their map's age."""
        now = self._clock.monotonic()
        wanted = dict.fromkeys(schemes, now + self._settings.retired_after_s)
        self._kept = {scheme: until for scheme, until in self._kept.items() if until > now} | wanted
        self._targets = tuple(
            StockTarget(scheme, self._settings.open_volumes) for scheme in schemes
        )

    def _settled(self) -> bool:
        """Whether the service knows its nodes: volumes opened before would lie on the first few
        that answered."""
        return self._clock.monotonic() >= self._settled_by or self._started().all_heard()

    async def _lead(self, work: Callable[[Connection], T]) -> T:
        """A transaction that only the leader may make.  Raises `NotLeader`."""

        def guarded(connection: Connection) -> T:
            check_role(connection, ROLE, self._epoch)
            return work(connection)

        return await self._db.write(guarded)

    def _started(self) -> NodeWatch:
        assert self._watch is not None, "start() comes first"
        return self._watch


def _admit(member: NodeView | None, registration: NodeRegistration) -> None:
    """Refuse a node that is not the one its row means."""
    name = str(registration.node_id)
    details = {"node": name, "store": registration.store_id}
    if member is None:
        raise ConfigInvalid(
            f"{name} is not a member of this cell: add it before it is started", details
        )
    if member.state is NodeState.GONE:
        raise DirectoryForeign(
            f"{name} was removed from this cell: bring its disk back under a new name", details
        )
    if member.store_id != registration.store_id and not registration.refusal:
        raise DirectoryForeign(
            f"{registration.directory} holds store {registration.store_id}, but {name} is store "
            f"{member.store_id}: the directory belongs to another node or was made anew; put the "
            "right one back, or remove the node and add the disk under a new name",
            details,
        )


def _plan(
    view: CellView,
    targets: Sequence[StockTarget],
    kept: frozenset[Scheme],
    rng: random.Random,
    settled: bool,
) -> tuple[SealPlan, OpenVolumesPlan]:
    """Seals, and the openings that make up for them; none before the nodes are known."""
    seals = plan_seals(view, kept)
    if not settled:
        return seals, OpenVolumesPlan((), ())
    sealed = {seal.volume_id for seal in seals.seals}
    rest = tuple(volume for volume in view.volumes if volume.volume_id not in sealed)
    after = CellView(view.nodes, rest, view.unwritable)
    return seals, plan_volumes(after, targets, rng)


def _write_pass(
    connection: Connection,
    change: _Change,
    targets: tuple[StockTarget, ...],
    kept: frozenset[Scheme],
    rng: random.Random,
    now: float,
    settled: bool,
) -> _Pass:
    """Steps 2 to 4 over the rows as they are, whatever the service remembers of them."""
    nodes = {view.node_id: view for view in map_rows.read_nodes(connection)}
    moves = [
        (node_id, nodes[node_id].state, transition(nodes[node_id].state, event), detail)
        for node_id, (event, detail) in change.events.items()
        if may_happen(nodes[node_id].state, event)
    ]
    ahead = {
        node_id: incarnation
        for node_id, incarnation in change.ahead.items()
        if incarnation > nodes[node_id].incarnation
    }
    map_rows.save_reports(connection, change.reports)
    save_disk_reports(connection, change.disk_reports, now)
    disks = {
        node_id: failed
        for node_id, failed in change.disks.items()
        if nodes[node_id].disk_failed != failed
    }
    if moves or ahead or disks:
        version = map_rows.next_version(connection)
        for node_id, _, state, detail in moves:
            map_rows.set_node_state(connection, node_id, state, now, detail, version)
        for node_id, incarnation in ahead.items():
            map_rows.skip_incarnations(connection, node_id, incarnation + 1, version)
        for node_id, failed in disks.items():
            map_rows.set_disk_failed(connection, node_id, failed, version)
    current = tuple(map_rows.read_nodes(connection))
    view = CellView(current, tuple(map_rows.read_open_volumes(connection)), change.unwritable)
    seals, opens = _plan(view, targets, kept, rng, settled)
    if seals.seals or opens.openings:
        version = map_rows.next_version(connection)
        for seal in seals.seals:
            map_rows.seal_volume(connection, seal.volume_id, version)
        map_rows.insert_volumes(
            connection,
            [(opening.scheme, opening.slots) for opening in opens.openings],
            now,
            version,
        )
    _record(connection, now, moves, seals)
    moved = tuple((node_id, before, after) for node_id, before, after, _ in moves)
    return _Pass(current, moved, seals.seals, opens.openings)


def _record(
    connection: Connection,
    now: float,
    moves: Sequence[tuple[NodeId, NodeState, NodeState, str]],
    seals: SealPlan,
) -> None:
    """For people who ask afterwards what happened to a node or a volume."""
    for node_id, before, after, detail in moves:
        said = f"{before} -> {after}" + (f": {detail}" if detail else "")
        record_event(connection, now, EventKind.NODE_STATE, node_id, said)
    for seal in seals.seals:
        record_event(connection, now, EventKind.VOLUME_SEALED, seal.volume_id, str(seal.reason))


def _tell(done: _Pass) -> None:
    for node_id, before, after in done.moved:
        log.info("node state", node=str(node_id), before=str(before), after=str(after))
    for seal in done.seals:
        log.info("volume sealed", volume=str(seal.volume_id), reason=str(seal.reason))
    if done.openings:
        log.info(
            "volumes opened",
            count=len(done.openings),
            vacant_slots=sum(opening.slots.count(None) for opening in done.openings),
        )
