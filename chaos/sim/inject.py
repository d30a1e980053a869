"""Carries faults out on a simulated cell, ends them, and counts those that did something.

Told by `chaos/sim/run.py` what the nemesis drew.  A fault counts as fired when it had an effect
(a process died, a message was held, a read met damage), not when it was asked for.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from chaos import faults
from chaos.budget import spare_after_loss
from chaos.faults import Fault, FaultKind
from chaos.sim.cell import SimCell
from chaos.sim.network import LinkQuality
from protocol.ids import NodeId
from storage_node.interface import FragmentKey

ARMED_S = 30.0
"""How long a fault waits for the write it is to hit before it is taken back."""

SKEW_MAX_S = 3_600.0
"""Wall clocks are not set further from the truth than this."""

REPLACEMENT_S = 20.0
"""Until an operator has put a new disk in the place of a lost one."""

KEYS_TRIED_MAX = 25
"""Records looked at before a fault that needs one with a spare gives up."""

WRITES_TO = "writes to "
"""Before a node's name: the impairment of its writes alone."""

_NETWORK_EFFECTS = {
    FaultKind.PARTITION: ("held",),
    FaultKind.LOSSY_NETWORK: ("request_lost", "reply_lost", "duplicate"),
    FaultKind.SLOW_NETWORK: ("slow_message",),
}
_SQL_EFFECTS = {
    "kill_before": FaultKind.KILL_AT_COMMIT,
    "kill_after": FaultKind.KILL_AT_COMMIT,
    "busy": FaultKind.SQL_BUSY,
    "lost_after": FaultKind.SQL_REPLY_LOST,
    "lost_instead": FaultKind.SQL_REPLY_LOST,
}
_DISK_EFFECTS = {
    "disk_full": FaultKind.DISK_FULL,
    "sync_fails": FaultKind.SYNC_FAILS,
    "kill_at_disk": FaultKind.KILL_AT_DISK,
    "read_error": FaultKind.READ_ERRORS,
}


class Injector:
    """The hand of the nemesis; also its eyes (`CellView`)."""

    def __init__(self, cell: SimCell, rng: random.Random) -> None:
        self._cell = cell
        self._rng = rng
        self._fired: Counter[FaultKind] = Counter()
        self._writes_hindered: Counter[str] = Counter()
        self._link_faults: dict[int, LinkQuality] = {}
        self._next_link_fault = 0
        self._skew: Counter[str] = Counter()

    # -- CellView ------------------------------------------------------------------------------

    def nodes(self) -> Sequence[NodeId]:
        """See `CellView.nodes`."""
        out = {*self._cell.atlas.lost_disks(), *self._cell.gone_nodes()}
        return [node for node in self._cell.disks if node not in out]

    def gateways(self) -> Sequence[str]:
        """See `CellView.gateways`."""
        return list(self._cell.gateways)

    def impaired_nodes(self) -> Sequence[str]:
        """See `CellView.impaired_nodes`."""
        active = [name for name in self._cell.impairments.active() if NodeId(name) in self._disks]
        hindered = [name for name, count in self._writes_hindered.items() if count > 0]
        lost = [str(node) for node in self._cell.atlas.lost_disks()]
        gone = self._cell.gone_nodes()
        return [name for name in dict.fromkeys([*active, *hindered, *lost]) if name not in gone]

    def spare_after_loss(self, node: NodeId) -> int:
        """See `CellView.spare_after_loss`."""
        stripes = self._cell.inspector.stripes(read_disks=False)
        return spare_after_loss(stripes.values(), node)

    def seconds_since_loss(self) -> float:
        """See `CellView.seconds_since_loss`."""
        return self._cell.loop.time() - self._cell.atlas.last_loss()

    @property
    def _disks(self) -> dict[NodeId, object]:
        return dict(self._cell.disks)

    # -- counting ------------------------------------------------------------------------------

    def fired(self) -> dict[FaultKind, int]:
        """Effects so far, by kind."""
        total = Counter(self._fired)
        for kind, names in _NETWORK_EFFECTS.items():
            total[kind] += sum(self._cell.network.fired.get(name, 0) for name in names)
        return {kind: total[kind] for kind in FaultKind if total[kind]}

    def arm(self) -> None:
        """Have every host and disk report what their faults did."""
        for host in self._cell.hosts.values():
            host.sql_faults.on_fired = self._sql_fired
        for disk in self._cell.disks.values():
            disk.faults.on_fired = self._disk_fired

    def _sql_fired(self, effect: str) -> None:
        self._fired[_SQL_EFFECTS[effect]] += 1
        now = self._cell.loop.time()
        number = self._cell.impairments.begin("sql", effect, now)
        self._cell.impairments.finish(number, now)

    def _disk_fired(self, effect: str) -> None:
        kind = _DISK_EFFECTS.get(effect)
        if kind is not None:
            self._fired[kind] += 1

    # -- carrying out --------------------------------------------------------------------------

    def inject(self, fault: Fault) -> None:
        """Begin a fault; its end is arranged here."""
        self._cell.trace.record("nemesis", "inject", fault)
        _ACTIONS[fault.kind](self, fault)

    def kill(self, fault: faults.Kill) -> None:
        self._kill(fault.process, fault.down_s, fault.kind)

    def _kill(self, process: str, down_s: float, kind: FaultKind) -> None:
        if self._cell.hosts[process].alive:
            self._fired[kind] += 1
            self._cell.kill(process, down_s, kind)

    def kill_at_step(self, fault: faults.KillAtStep) -> None:
        life = self._cell.hosts[fault.process].life
        if life is not None and self._cell.hosts[fault.process].running:
            life.process.light_fuse(
                fault.steps, lambda: self._kill(fault.process, fault.down_s, fault.kind)
            )

    def kill_at_commit(self, fault: faults.KillAtCommit) -> None:
        sql = self._cell.hosts[fault.process].sql_faults
        sql.on_kill = lambda: self._cell.kill_running(fault.down_s, fault.kind)
        sql.kill = fault.after

    def kill_at_disk(self, fault: faults.KillAtDisk) -> None:
        disk = self._cell.disks[fault.node].faults
        disk.on_kill = lambda: self._cell.kill_running(fault.down_s, fault.kind)
        disk.kill = fault.moment
        self._cell.later(ARMED_S, lambda: setattr(disk, "kill", None))

    def pause(self, fault: faults.Pause) -> None:
        if self._cell.pause(fault.process, fault.kind):
            self._fired[fault.kind] += 1
            self._cell.later(fault.for_s, lambda: self._cell.resume(fault.process))

    def power_cut(self, fault: faults.PowerCut) -> None:
        self._fired[fault.kind] += 1
        for name, host in list(self._cell.hosts.items()):
            if host.alive:
                self._cell.kill(name, fault.down_s + self._rng.random() * 10, fault.kind)

    def double_start(self, fault: faults.DoubleStart) -> None:
        if self._cell.replace_stopped(fault.process, fault.for_s, fault.together_s):
            self._fired[fault.kind] += 1

    # -- disks ---------------------------------------------------------------------------------

    def lose_disk(self, fault: faults.LoseDisk) -> None:
        self._fired[fault.kind] += 1
        self._cell.retire(fault.node, fault.kind)
        self._cell.lose_disk(fault.node)
        if fault.replaced:
            self._cell.later(REPLACEMENT_S, self._replace_disk)

    def _replace_disk(self) -> None:
        self._cell.add_node()
        self.arm()

    def empty_disk(self, fault: faults.EmptyDisk) -> None:
        self._fired[fault.kind] += 1
        self._cell.end_zombies(self._cell.hosts[fault.node])
        self._cell.kill(fault.node, 1.0, fault.kind)
        self._cell.lose_disk(fault.node, reformatted=fault.reformatted)

    def corrupt_record(self, fault: faults.CorruptRecord) -> None:
        key = self._spare_record(fault.node, fault.pick)
        if key is not None:
            self._damaged(fault.kind, fault.node, key)
            self._cell.disks[fault.node].damage(key, fault.damage, noticed=fault.noticed)

    def swap_records(self, fault: faults.SwapRecords) -> None:
        disk = self._cell.disks[fault.node]
        key = self._spare_record(fault.node, fault.pick)
        others = [
            other for other in disk.stored_keys() if other != key and disk.peek(other) is not None
        ]
        if key is not None and others:
            self._damaged(fault.kind, fault.node, key)
            disk.swap(key, self._rng.choice(others))

    def drop_record(self, fault: faults.DropRecord) -> None:
        key = self._spare_record(fault.node, fault.pick)
        if key is not None:
            self._damaged(fault.kind, fault.node, key)
            self._cell.disks[fault.node].drop(key)

    def _damaged(self, kind: FaultKind, node: NodeId, key: FragmentKey) -> None:
        self._fired[kind] += 1
        self._cell.atlas.destroy(node, [key], self._cell.loop.time())

    def _spare_record(self, node: NodeId, pick: float) -> FragmentKey | None:
        """An intact fragment of a stripe that can lose one more."""
        keys = self._cell.disks[node].stored_keys()
        start = int(pick * len(keys))
        for key in (keys[start:] + keys[:start])[:KEYS_TRIED_MAX]:
            stripe = self._cell.inspector.stripe(key.block)
            if (
                stripe is not None
                and stripe.volume == key.volume
                and stripe.nodes[key.slot] == node
                and key.slot in stripe.intact - stripe.lost
                and len(stripe.lost) < stripe.scheme.m
            ):
                return key
        return None

    def read_errors(self, fault: faults.ReadErrors) -> None:
        disk = self._cell.disks[fault.node].faults
        disk.read_error_share = fault.share
        self._impair_for(
            [fault.node], fault, fault.for_s, lambda: setattr(disk, "read_error_share", 0.0)
        )

    def slow_disk(self, fault: faults.SlowDisk) -> None:
        disk = self._cell.disks[fault.node].faults
        disk.slow_factor = fault.factor
        self._fired[fault.kind] += 1
        self._impair_for(
            [fault.node], fault, fault.for_s, lambda: setattr(disk, "slow_factor", 1.0)
        )

    def disk_full(self, fault: faults.DiskFull) -> None:
        disk = self._cell.disks[fault.node].disk
        disk.full = True
        self._hinder_writes(fault.node, fault.for_s, lambda: setattr(disk, "full", False))

    def sync_fails(self, fault: faults.SyncFails) -> None:
        disk = self._cell.disks[fault.node].faults
        disk.sync_fails = True
        self._hinder_writes(
            fault.node, max(fault.for_s, ARMED_S), lambda: setattr(disk, "sync_fails", False)
        )

    # -- network, clocks, SQL ------------------------------------------------------------------

    def partition(self, fault: faults.Partition) -> None:
        network = self._cell.network
        pairs = [(one, two) for one in fault.side for two in fault.other]
        if not fault.one_way:
            pairs += [(two, one) for one, two in pairs]

        def end() -> None:
            for source, target in pairs:
                network.unblock(source, target)

        for source, target in pairs:
            network.block(source, target)
        self._impair_for(fault.side, fault, fault.for_s, end)

    def lossy_network(self, fault: faults.LossyNetwork) -> None:
        self._change_links(
            fault,
            dataclasses.replace(
                self._cell.options.link,
                request_loss=fault.loss,
                reply_loss=fault.loss,
                duplicate=fault.duplicate,
            ),
            fault.for_s,
        )

    def slow_network(self, fault: faults.SlowNetwork) -> None:
        slow = dataclasses.replace(self._cell.options.link, slow=fault.share, slow_s=fault.slow_s)
        self._change_links(fault, slow, fault.for_s)

    def _change_links(self, fault: Fault, quality: LinkQuality, for_s: float) -> None:
        """The newest of the conditions that last decides."""
        self._next_link_fault += 1
        number = self._next_link_fault
        self._link_faults[number] = quality
        self._cell.network.set_quality(quality)

        def end() -> None:
            self._link_faults.pop(number, None)
            left = list(self._link_faults.values())
            self._cell.network.set_quality(left[-1] if left else self._cell.options.link)

        self._impair_for(["network"], fault, for_s, end)

    def clock_jump(self, fault: faults.ClockJump) -> None:
        skew = self._skew[fault.process] + fault.seconds
        if math.fabs(skew) <= SKEW_MAX_S:
            self._fired[fault.kind] += 1
            self._skew[fault.process] = skew  # type: ignore[assignment]
            self._cell.hosts[fault.process].clock.jump(fault.seconds)

    def sql_busy(self, fault: faults.SqlBusy) -> None:
        self._cell.hosts[fault.process].sql_faults.busy += fault.times

    def sql_reply_lost(self, fault: faults.SqlReplyLost) -> None:
        self._cell.hosts[fault.process].sql_faults.lose_reply = fault.committed

    # -- lasting conditions --------------------------------------------------------------------

    def _impair_for(
        self, names: Sequence[str], fault: Fault, for_s: float, end: Callable[[], object]
    ) -> None:
        """These are excused until the condition ends."""
        now = self._cell.loop.time
        numbers = [self._cell.impairments.begin(str(name), fault.kind, now()) for name in names]

        def over() -> None:
            end()
            for number in numbers:
                self._cell.impairments.finish(number, now())

        self._cell.later(for_s, over)

    def _hinder_writes(self, node: NodeId, for_s: float, end: Callable[[], object]) -> None:
        """Counts against the budget; reads are not excused."""
        self._writes_hindered[node] += 1
        impairments, now = self._cell.impairments, self._cell.loop.time
        number = impairments.begin(f"{WRITES_TO}{node}", "hindered", now())

        def over() -> None:
            end()
            impairments.finish(number, now())
            self._writes_hindered[node] -= 1

        self._cell.later(for_s, over)

    def heal(self) -> None:
        """End every condition now, and start whatever is dead: damage stays."""
        cell = self._cell
        cell.trace.record("nemesis", "heal")
        for disk in cell.disks.values():
            disk.disk.full = disk.faults.sync_fails = False
            disk.faults.read_error_share, disk.faults.slow_factor = 0.0, 1.0
            disk.faults.kill = None
        self._link_faults.clear()
        cell.network.set_quality(cell.options.link)
        cell.network.unblock_all()
        for name, host in cell.hosts.items():
            host.sql_faults.busy, host.sql_faults.kill = 0, None
            host.sql_faults.lose_reply = None
            cell.end_zombies(host)
            if host.life is not None:
                host.life.process.defuse()
            cell.resume(name)
            cell.start(name)


_ACTIONS: dict[FaultKind, Callable[[Injector, Any], None]] = {
    kind: getattr(Injector, kind.value) for kind in FaultKind
}
