"""Connections to storage nodes, and which of them to keep away from for a while.

Step 4 of the life of a put and step 3 of the life of a get: `put_path` and `get_path` reach every
node through this pool.  It may not import SQL, the block index, Ray, or a concrete port: how to
connect is a parameter.

Suspicion, per node and per direction (a full disk refuses writes and serves reads)
------------------------------------------------------------------------------------

    trusted --failure--> suspected --probe answered--> on trial --success--> trusted
                             ^  \\--probe failed (back-off doubles)--/   |
                             \\-----------------failure----------------/

Nobody's request is the probe: a task of the pool asks for the node's summary after each back-off,
so a stopped node costs one deadline, once.  A new endpoint or incarnation is a new life, which
starts trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
from collections.abc import Callable, Sequence

from cluster.latency import LatencyTable, size_class
from cluster.topology import NodeView
from cluster.volume_map import VolumeMap
from protocol.clock import Clock
from protocol.errors import (
    DatabaseBusy,
    HandshakeRefused,
    HaversackError,
    NodeFull,
    NodeRefuses,
    NodeUnavailable,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.ids import NodeId
from protocol.messages import PutPurpose, SummaryReply
from storage_node.interface import FragmentKey, NodePort, PutOutcome, StoredRecord
from storage_node.service_state import ServiceState

BACKOFF_FIRST_S = 0.25
"""Before the first probe of a suspected node; doubles with every failure, then jittered by half."""

BACKOFF_MAX_S = 15.0
"""A node that came back is noticed within this, if no new incarnation announced it before."""

PROBE_DEADLINE_S = 1.0
"""A healthy node answers a summary within milliseconds, also under load."""

HEDGE_FLOOR_S = 0.015
"""Never hedge sooner: below this a second read costs more than it can save."""

HEDGE_COLD_S = 0.25
"""When to hedge before enough answers were seen to know better."""

HEDGE_SAMPLES_MIN = 16
"""Answers before an estimate is believed."""

HEDGE_MEDIAN_FACTOR = 8.0
"""A node is late beyond this multiple of the pool's median, however slow it usually is itself:
otherwise a node that is always slow would teach us to wait for it."""

LOST_RACES_MAX = 3
"""Hedges lost in a row, without any answer for `SILENCE_S`, after which a node is suspected."""

SILENCE_S = 1.0
"""See `LOST_RACES_MAX`: a burst of late answers alone is no reason to suspect."""


class Direction(enum.Enum):
    """What a request does to the node's disk."""

    READ = "read"
    WRITE = "write"


_SUSPICIOUS = (NodeUnavailable, UnknownOutcome, NodeRefuses, NodeFull, HandshakeRefused)
"""Failures that speak of the node; a stale incarnation or epoch speaks of our map."""

_READABLE_STATES = (ServiceState.SERVING, ServiceState.FAILED)

_Life = tuple[int, str]


def _life_of(view: NodeView) -> _Life:
    return view.incarnation, view.endpoint


def _check_service(node_id: NodeId, reply: SummaryReply, direction: Direction) -> None:
    """Raise `NodeRefuses` or `NodeFull` if a node that answers would still refuse requests."""
    if direction is Direction.READ:
        serves = reply.state in _READABLE_STATES
    else:
        serves = reply.state == ServiceState.SERVING and reply.counters.get("lease", True)
    if not serves:
        raise NodeRefuses(f"{node_id} is {reply.state} {reply.detail}".rstrip())
    if direction is Direction.WRITE and reply.disk_free_bytes <= 0:
        raise NodeFull(f"{node_id} is full: puts are refused, reads and deletes go on")


class _Breaker:
    """Suspicion in one direction.  `failures` outlives it until a request succeeds."""

    __slots__ = ("failures", "life", "probe", "reason")

    def __init__(self) -> None:
        self.failures = 0
        self.life: _Life | None = None
        self.reason = ""
        self.probe: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self.probe is not None


class _NodeRecord:
    """What the pool knows of one node."""

    __slots__ = ("answered_at", "breakers", "life", "lost_races", "port", "read_at")

    def __init__(self, now: float) -> None:
        self.port: NodePort | None = None
        self.life: _Life | None = None
        self.answered_at = now
        self.read_at = float("-inf")
        self.lost_races = 0
        self.breakers = {Direction.READ: _Breaker(), Direction.WRITE: _Breaker()}


class NodePool:
    """All storage nodes of the cell as seen from one event loop."""

    def __init__(
        self,
        volume_map: VolumeMap,
        connect: Callable[[NodeView], NodePort],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._map = volume_map
        self._connect = connect
        self._clock = clock
        self._rng = rng
        self._nodes: dict[NodeId, _NodeRecord] = {}
        self._latency = LatencyTable()
        self._closing: dict[asyncio.Task[None], None] = {}
        self._closed = False
        self._on_suspicion: Callable[[], None] = lambda: None

    # -- requests ------------------------------------------------------------------------------

    def port(self, node_id: NodeId) -> NodePort:
        """The port to a node's present life; reconnects when the map names a new one.

        Raises `NodeUnavailable` for a node that is unknown or has never registered.
        """
        view = self._map.node(node_id)
        if not view.endpoint:
            raise NodeUnavailable(
                f"{node_id} has not registered an endpoint yet", {"node": str(node_id)}
            )
        assert not self._closed, "the node pool is closed"
        record = self._record(node_id)
        life = _life_of(view)
        if record.port is None or record.life != life:
            self._retire(record)
            record.port, record.life = self._connect(view), life
        return record.port

    async def write(
        self,
        node_id: NodeId,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        """`NodePort.put`, remembering whether the node can be written to."""
        record = self._record(node_id)
        try:
            outcome = await self.port(node_id).put(
                incarnation, records, deadline_s, purpose=purpose
            )
        except _SUSPICIOUS as error:
            self._failed(node_id, Direction.WRITE, error)
            raise
        self._succeeded(record, Direction.WRITE)
        return outcome

    async def read(
        self,
        node_id: NodeId,
        keys: Sequence[FragmentKey],
        expected_bytes: int,
        deadline_s: float,
    ) -> list[StoredRecord]:
        """`NodePort.get`, remembering how long it took and whether the node answers at all."""
        record = self._record(node_id)
        started = self._clock.monotonic()
        try:
            answer = await self.port(node_id).get(keys, deadline_s)
        except _SUSPICIOUS as error:
            self._failed(node_id, Direction.READ, error)
            raise
        self._succeeded(record, Direction.READ)
        self._latency.observe(node_id, size_class(expected_bytes), record.answered_at - started)
        return answer

    # -- hedging -------------------------------------------------------------------------------

    def hedge_delay_s(self, node_id: NodeId, expected_bytes: int) -> float:
        """Seconds after which a read of this size from this node is late."""
        answer_class = size_class(expected_bytes)
        delay = HEDGE_COLD_S
        median = self._latency.median(answer_class)
        if median is not None and median.samples >= HEDGE_SAMPLES_MIN:
            delay = median.value * HEDGE_MEDIAN_FACTOR
        p95 = self._latency.p95(node_id, answer_class)
        if p95 is not None and p95.samples >= HEDGE_SAMPLES_MIN:
            delay = min(delay, p95.value)
        return max(delay, HEDGE_FLOOR_S)

    def lost_race(self, node_id: NodeId, expected_bytes: int, waited_s: float) -> None:
        """A read of this node was given up after `waited_s` because others were faster.

        Counts as a sample of at least that long; repeated, and with no answer in between, as
        a failure of the node.
        """
        self._latency.observe(node_id, size_class(expected_bytes), waited_s)
        record = self._record(node_id)
        record.lost_races += 1
        silent_s = self._clock.monotonic() - record.answered_at
        if record.lost_races >= LOST_RACES_MAX and silent_s >= SILENCE_S:
            self._failed(
                node_id,
                Direction.READ,
                NodeUnavailable(
                    f"{node_id} gave no answer for {silent_s:.1f} s and lost "
                    f"{record.lost_races} reads to faster nodes",
                    {"node": str(node_id)},
                ),
            )

    # -- suspicion -----------------------------------------------------------------------------

    def is_suspected(self, node_id: NodeId, direction: Direction) -> bool:
        """Whether requests of this direction should go elsewhere if they can."""
        record = self._nodes.get(node_id)
        if record is None:
            return False
        breaker = record.breakers[direction]
        if not breaker.is_open:
            return False
        if self._has_new_life(node_id, breaker):
            self._trust(breaker)
            breaker.failures = 0
            return False
        return True

    def is_trusted(self, node_id: NodeId, direction: Direction) -> bool:
        """Whether to send requests of this direction to a node before all others: its state in
        the map is a good one, and nothing has failed lately."""
        try:
            view = self._map.node(node_id)
        except NodeUnavailable:
            return False
        in_service = view.takes_writes if direction is Direction.WRITE else view.serves_reads
        return in_service and not self.is_suspected(node_id, direction)

    def suspected(self, direction: Direction) -> tuple[NodeId, ...]:
        """All suspected nodes, in id order."""
        return tuple(
            node_id for node_id in sorted(self._nodes) if self.is_suspected(node_id, direction)
        )

    def reason(self, node_id: NodeId, direction: Direction) -> str:
        """Why a node was suspected last; empty if it never was."""
        record = self._nodes.get(node_id)
        return "" if record is None else record.breakers[direction].reason

    def has_read(self, node_id: NodeId, within_s: float) -> bool:
        """Whether a read of a node was answered within the last so many seconds."""
        record = self._nodes.get(node_id)
        return record is not None and self._clock.monotonic() - record.read_at < within_s

    def tell_suspicion(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever suspicion begins or ends."""
        self._on_suspicion = callback

    async def ask(self, node_id: NodeId, direction: Direction) -> None:
        """Ask a node whether it would serve.  Raises what a request would raise if it does not;
        nobody is suspected for it."""
        reply = await self.port(node_id).summary(PROBE_DEADLINE_S)
        _check_service(node_id, reply, direction)

    def suspicions(self, direction: Direction) -> dict[NodeId, str]:
        """Why each suspected node is suspected, in id order."""
        return {
            node_id: self._nodes[node_id].breakers[direction].reason
            for node_id in self.suspected(direction)
        }

    def _failed(self, node_id: NodeId, direction: Direction, error: HaversackError) -> None:
        """Suspect a node; one that cannot be reached, in both directions."""
        record = self._record(node_id)
        if isinstance(error, NodeFull | NodeRefuses):
            self._suspect(node_id, record, direction, error)
            return
        for each in Direction:
            self._suspect(node_id, record, each, error)

    def _suspect(
        self, node_id: NodeId, record: _NodeRecord, direction: Direction, error: HaversackError
    ) -> None:
        """Open a breaker.  The failures of one burst count once: all found the same thing out."""
        breaker = record.breakers[direction]
        if breaker.is_open or self._closed:
            return
        breaker.failures += 1
        breaker.reason = str(error)
        try:
            breaker.life = _life_of(self._map.node(node_id))
        except NodeUnavailable:
            breaker.life = None
        breaker.probe = asyncio.get_running_loop().create_task(
            self._probe(node_id, breaker, direction), name=f"probe-{node_id}"
        )
        self._on_suspicion()

    async def _probe(self, node_id: NodeId, breaker: _Breaker, direction: Direction) -> None:
        """Ask a suspected node for its summary, more and more rarely, until it serves again."""
        while True:
            backoff = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(breaker.failures - 1, 16))
            await self._clock.sleep(backoff * (0.5 + self._rng.random()))
            with contextlib.suppress(DatabaseBusy):  # the map we have will do for a probe
                await self._map.refresh(max_age_s=BACKOFF_FIRST_S)
            try:
                await self.ask(node_id, direction)
            except HaversackError as error:
                breaker.failures += 1
                breaker.reason = str(error)
                continue
            breaker.probe = None  # on trial: `failures` is kept until a request succeeds
            self._on_suspicion()
            return

    def _trust(self, breaker: _Breaker) -> None:
        if breaker.probe is not None:
            breaker.probe.cancel()
            breaker.probe = None
            self._on_suspicion()

    def _has_new_life(self, node_id: NodeId, breaker: _Breaker) -> bool:
        try:
            return _life_of(self._map.node(node_id)) != breaker.life
        except NodeUnavailable:
            return False

    def _succeeded(self, record: _NodeRecord, direction: Direction) -> None:
        record.answered_at = self._clock.monotonic()
        if direction is Direction.READ:
            record.read_at = record.answered_at
        record.lost_races = 0
        breaker = record.breakers[direction]
        if breaker.failures:
            self._trust(breaker)
            breaker.failures = 0

    # -- bookkeeping ---------------------------------------------------------------------------

    def _record(self, node_id: NodeId) -> _NodeRecord:
        record = self._nodes.get(node_id)
        if record is None:
            record = self._nodes[node_id] = _NodeRecord(self._clock.monotonic())
        return record

    def _retire(self, record: _NodeRecord) -> None:
        """Close a port whose node has a new life; requests still under way on it fail."""
        if record.port is None:
            return
        task = asyncio.get_running_loop().create_task(record.port.close())
        self._closing[task] = None
        task.add_done_callback(self._closing.pop)
        record.port = None

    async def aclose(self) -> None:
        """Stop all probes and close all ports.  Idempotent."""
        self._closed = True
        probes = []
        for record in self._nodes.values():
            for breaker in record.breakers.values():
                if breaker.probe is not None:
                    probes.append(breaker.probe)
                    self._trust(breaker)
            self._retire(record)
        await asyncio.gather(*probes, *self._closing, return_exceptions=True)
