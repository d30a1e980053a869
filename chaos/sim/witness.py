"""What happens inside a simulated cell, watched at the instant it happens.

`chaos/sim/cell.py` has it observe every answer of a node and every transaction that may record a
put, let a slot change hands or move a block.  It compares what was true just before with what is
true just after, through `chaos/sim/inspect.py`, and hands the checkers' verdicts to the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from chaos import checkers
from chaos.budget import FaultAtlas
from chaos.checkers import Violation
from chaos.evidence import LeaseGranted, NodeEvent, Stripe, WriteAcknowledged
from chaos.sim.inspect import Inspector
from chaos.sim.network import Answered
from chaos.sim.node import SimNode
from cluster.block_index import NewBlock, RecordOutcome
from erasure.fragment import peek_key
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey

REMOVAL_S = 60.0
"""A stray is deleted so long after its slot's own fragment was verified, at most."""

Rule = Callable[[str, list[Violation]], None]
"""Told of every check by name, and of what it found."""

Moved = tuple[VolumeId, int, NodeId]


class Witness:
    """One per run."""

    def __init__(
        self, inspector: Inspector, atlas: FaultAtlas, now: Callable[[], float], changes: bool
    ) -> None:
        """`changes`: whether blocks may move from volume to volume."""
        self._inspector = inspector
        self._atlas = atlas
        self._now = now
        self._changes = changes
        self._map_version = -1
        self._verified: dict[NodeId, int] = {}
        self.node_events: list[NodeEvent] = []
        self.rule: Rule = lambda _name, _found: None

    # -- answers of nodes ----------------------------------------------------------------------

    def observe(self, node: SimNode, answered: Answered) -> bool:
        """Who was allowed to write, who said that they did, what was read back and what deleted;
        True if the node took a lease."""
        node_id, now = node.node.node_id, node.clock.monotonic()
        match answered.method:
            case "lease":
                incarnation, lease_s = answered.args
                reply = answered.result
                if reply.state == "serving" and reply.incarnation == incarnation:
                    self.node_events.append(
                        LeaseGranted(node_id, node.life, incarnation, now, lease_s)
                    )
                    return True
            case "put" if ItemStatus.OK in answered.result.statuses:
                incarnation = answered.result.incarnation
                self.node_events.append(WriteAcknowledged(node_id, node.life, incarnation, now))
                self._note_written(node_id, answered)
            case "verify":
                self._verified[node_id] = node.node.incarnation
            case "delete":
                self._judge_removal(node_id, answered)
        return False

    def _note_written(self, node_id: NodeId, answered: Answered) -> None:
        for record, status in zip(answered.args[1], answered.result.statuses, strict=True):
            if status is ItemStatus.OK:
                volume, block, slot, _ = peek_key(record)
                self._atlas.restore(node_id, [FragmentKey(volume, block, slot)])

    def _judge_removal(self, node_id: NodeId, answered: Answered) -> None:
        for key, status in zip(answered.args[1], answered.result, strict=True):
            stripe = self._inspector.stripe(key.block)
            if status is not ItemStatus.OK or stripe is None or stripe.volume != key.volume:
                continue
            holder = stripe.nodes[key.slot] if key.slot < stripe.scheme.n else None
            taken_at = None if holder is None else self._atlas.destroyed_at(holder, key)
            just_taken = taken_at is not None and self._now() - taken_at < REMOVAL_S
            self.rule(
                "removal_keeps_fragments",
                checkers.removal_keeps_fragments(stripe, key.slot, node_id, just_taken),
            )

    # -- transactions --------------------------------------------------------------------------

    def watch_puts(self, entries: Sequence[NewBlock]) -> Callable[[Sequence[RecordOutcome]], None]:
        """Compare the receipts of what gets recorded with the node table as it was before."""
        receipts = {receipt.node_id for entry in entries for receipt in entry.receipts}
        known = {node: self._inspector.node_incarnation(node) for node in sorted(receipts)}

        def judge(outcomes: Sequence[RecordOutcome]) -> None:
            for entry, outcome in zip(entries, outcomes, strict=True):
                if outcome is RecordOutcome.NEW:
                    for _, node_id, incarnation in entry.receipts:
                        self.rule(
                            "receipts_are_of_this_life",
                            checkers.receipts_are_of_this_life(
                                node_id, incarnation, known[node_id]
                            ),
                        )

        return judge

    def watch_map(self) -> Callable[[], None]:
        """Look at what nodes hold after a transaction that changed the map."""

        def judge() -> None:
            version = self._inspector.map_version()
            if version != self._map_version:
                self._map_version = version
                self.judge_layout()

        return judge

    def watch_changes(self) -> Callable[[], None]:
        """Compare every volume of which a slot changes hands, and every block that changes its
        volume, before and after."""
        begun = self._inspector.moves()
        before = {volume: self._inspector.stripes_of(volume) for volume, _, _ in begun}
        incarnations = {node: self._inspector.node_incarnation(node) for _, _, node in begun}
        places = self._inspector.block_volumes() if self._changes else {}
        judge_map = self.watch_map()

        def judge() -> None:
            left = set(self._inspector.moves())
            for move in begun:
                if move not in left:
                    self._judge_published(move, before[move[0]], incarnations[move[2]])
            if self._changes:
                self._judge_relocated(places)
            judge_map()

        return judge

    def _judge_published(
        self, move: Moved, before: dict[BlockHash, Stripe], incarnation: int
    ) -> None:
        volume, slot, target = move
        if self._inspector.holder(volume, slot) != target:
            return  # forgotten
        if before:  # else there was nothing to verify
            verified = self._verified.get(target, 0)
            self.rule(
                "published_in_the_life_that_verified",
                checkers.published_in_the_life_that_verified(target, verified, incarnation),
            )
        for block, stripe in self._inspector.stripes_of(volume).items():
            was = before[block]
            if stripe.nodes[slot] == target != was.nodes[slot]:
                self.rule(
                    "repair_keeps_fragments", checkers.repair_keeps_fragments(was, stripe, slot)
                )

    def _judge_relocated(self, before: dict[BlockHash, VolumeId]) -> None:
        for block, volume in self._inspector.block_volumes().items():
            if before.get(block, volume) != volume:
                stripe = self._inspector.stripe(block)
                assert stripe is not None
                self.rule("transcoded_block_is_whole", checkers.transcoded_block_is_whole(stripe))

    def judge_layout(self) -> None:
        """No two slots of a volume on a node; none on a node that was emptied."""
        self.rule(
            "slots_are_on_distinct_nodes",
            checkers.slots_are_on_distinct_nodes(self._inspector.volume_slots()),
        )
        states = self._inspector.node_states()
        empty = {node for node, state in states.items() if state in ("drained", "gone")}
        if empty:
            found = checkers.emptied_nodes_hold_nothing(empty, self._held(empty))
            self.rule("emptied_nodes_hold_nothing", found)

    def _held(self, nodes: Iterable[NodeId]) -> list[tuple[NodeId, VolumeId]]:
        wanted = set(nodes)
        slots = self._inspector.volume_slots()
        held = [
            (node, volume)
            for volume, holders in slots.items()
            for node in holders
            if node is not None and node in wanted
        ]
        return held + [
            (target, volume) for volume, _, target in self._inspector.moves() if target in wanted
        ]
