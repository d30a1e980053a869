"""The invariants, each written once: what never happens (`docs/architecture.md`, section 13).

Used by the simulation and by property tests, later by the live nemesis.  Every checker is a pure
function from what clients were told (`chaos/ledger.py`) and what is really there
(`chaos/evidence.py`) to violations; none of them asks the cell.  `tests/sim/test_checkers_bite.py`
shows for each that a planted defect makes it fail.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from chaos.evidence import (
    LeaseGranted,
    NodeEvent,
    References,
    SlotState,
    Stripe,
    Version,
    WriteAcknowledged,
)
from chaos.ledger import Kind, Ledger, Operation, Outcome
from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId, VolumeId


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    checker: str
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.checker}: {self.subject}: {self.message}"


# -- blocks ----------------------------------------------------------------------------------------


def served_bytes_are_the_blocks(block: BlockHash, length: int, data: Buffer) -> list[Violation]:
    """Invariant 2: no wrong byte is served.

    The hash is computed here, by nothing of the product.
    """
    name = "served_bytes_are_the_blocks"
    if len(data) != length:
        return [Violation(name, str(block), f"served {len(data)} bytes instead of {length}")]
    if hashlib.sha256(data).digest() != block:
        return [Violation(name, str(block), "served bytes that do not hash to its name")]
    return []


def acknowledged_block_is_whole(
    block: BlockHash, length: int, stripe: Stripe | None
) -> list[Violation]:
    """Invariant 1, at the moment of the acknowledgement and ever after: the row is committed, and
    every slot's fragment is durable and intact, or is a recorded debt, or was taken by a fault.
    At least `write_minimum` slots were durable once.
    """
    name = "acknowledged_block_is_whole"
    if stripe is None:
        return [Violation(name, str(block), "acknowledged and not in the block index")]
    found: list[Violation] = []
    if stripe.plain_bytes != length:
        message = f"the index says {stripe.plain_bytes} bytes; {length} were acknowledged"
        found.append(Violation(name, str(block), message))
    # A debt of a fragment that is there says that a disk could not read it for a while.
    states = enumerate(stripe.slots)
    there = {slot for slot, state in states if state is SlotState.INTACT}
    unwritten = stripe.debts - stripe.destroyed - there
    if stripe.scheme.n - len(unwritten) < stripe.scheme.write_minimum:
        message = f"debts {sorted(unwritten)} leave fewer slots than an acknowledgement needs"
        found.append(Violation(name, str(block), message))
    for slot, state in enumerate(stripe.slots):
        if state is not SlotState.INTACT and slot not in stripe.lost:
            message = (
                f"slot {slot} of {stripe.volume} on {stripe.nodes[slot]} is {state.value}, "
                "no debt says so and no fault explains it"
            )
            found.append(Violation(name, str(block), message))
    return found


def repair_keeps_fragments(before: Stripe, after: Stripe, moved: int) -> list[Violation]:
    """A slot that changes hands is verified first: at the instant of the change the block has no
    fewer good fragments than before, and the slot's new node holds its own, or owes it."""
    name = "repair_keeps_fragments"
    found: list[Violation] = []
    if len(after.intact) < len(before.intact):
        message = (
            f"slots {sorted(before.intact)} were intact before slot {moved} went to "
            f"{after.nodes[moved]}, {sorted(after.intact)} after"
        )
        found.append(Violation(name, str(before.block), message))
    if after.slots[moved] is not SlotState.INTACT and moved not in after.lost:
        message = (
            f"slot {moved} went to {after.nodes[moved]}, where it is {after.slots[moved].value}"
        )
        found.append(Violation(name, str(before.block), message))
    return found


def published_in_the_life_that_verified(
    target: NodeId, verified: int, registered: int
) -> list[Violation]:
    """A slot is published on the word of the life of its node that is registered at that instant:
    one that began since may stand over another disk."""
    if verified == registered:
        return []
    message = f"a slot was verified by incarnation {verified} and published under {registered}"
    return [Violation("published_in_the_life_that_verified", str(target), message)]


def transcoded_block_is_whole(after: Stripe) -> list[Violation]:
    """A block changes its volume with every fragment of the new one on its disk."""
    wrong = {
        slot: state.value
        for slot, state in enumerate(after.slots)
        if state is not SlotState.INTACT and slot not in after.destroyed
    }
    if not wrong:
        return []
    message = f"moved to {after.volume} ({after.scheme}) while slots {wrong} are not there"
    return [Violation("transcoded_block_is_whole", str(after.block), message)]


def removal_keeps_fragments(
    stripe: Stripe, slot: int, node: NodeId, just_taken: bool
) -> list[Violation]:
    """A fragment is deleted only where its slot does not lie, and while the slot's own is there;
    `just_taken`: a fault took that after anybody could have looked."""
    name = "removal_keeps_fragments"
    holder = stripe.nodes[slot] if slot < stripe.scheme.n else None
    if slot < stripe.scheme.n and holder == node:
        message = f"slot {slot} of {stripe.volume} was deleted on {node}, whose slot it is"
        return [Violation(name, str(stripe.block), message)]
    if slot >= stripe.scheme.n or slot in stripe.intact or just_taken:
        return []
    message = (
        f"a copy of slot {slot} of {stripe.volume} was deleted on {node} while {holder}, whose "
        f"slot it is, holds none: {stripe.slots[slot].value}"
    )
    return [Violation(name, str(stripe.block), message)]


def slots_are_on_distinct_nodes(
    volumes: Mapping[VolumeId, Sequence[NodeId | None]],
) -> list[Violation]:
    """No two slots of one volume lie on one node."""
    found = []
    for volume, nodes in volumes.items():
        counts = Counter(node for node in nodes if node is not None)
        twice = sorted(node for node, count in counts.items() if count > 1)
        if twice:
            message = f"more than one slot on {', '.join(twice)}"
            found.append(Violation("slots_are_on_distinct_nodes", str(volume), message))
    return found


def emptied_nodes_hold_nothing(
    nodes: Iterable[NodeId], held: Iterable[tuple[NodeId, VolumeId]]
) -> list[Violation]:
    """No slot lies on, and none is being made on, a node that is called drained or gone."""
    empty = set(nodes)
    return [
        Violation("emptied_nodes_hold_nothing", str(node), f"a slot of {volume} is there")
        for node, volume in held
        if node in empty
    ]


def dry_run_changes_nothing(what: str, before: int, after: int) -> list[Violation]:
    """`before` and `after` differ if anything was committed in between."""
    if before == after:
        return []
    return [Violation("dry_run_changes_nothing", what, "something was written")]


def healed_block_is_whole(
    stripe: Stripe, lost_nodes: frozenset[NodeId], healthy_nodes: frozenset[NodeId]
) -> list[Violation]:
    """Progress, long after the last fault: nothing is owed, and no slot is left on a lost disk
    while another node could have it.  Blocks that lost more than m fragments are excused."""
    name = "healed_block_is_whole"
    if len(stripe.intact) < stripe.scheme.k:
        return []
    held = {node for node in stripe.nodes if node is not None}
    has_room = bool(healthy_nodes - held)
    away = {slot for slot, node in enumerate(stripe.nodes) if node is None or node in lost_nodes}
    found: list[Violation] = []
    owed = stripe.debts - (frozenset() if has_room else away)
    if owed:
        found.append(Violation(name, str(stripe.block), f"slots {sorted(owed)} are still owed"))
    if away and has_room:
        message = f"slots {sorted(away)} of {stripe.volume} are on no disk that works"
        found.append(Violation(name, str(stripe.block), message))
    return found


def nothing_is_under_way(
    moves: Iterable[VolumeId], unrepairable: Iterable[VolumeId], waiting: Collection[VolumeId]
) -> list[Violation]:
    """Progress, long after the last fault: no move is left unfinished and no block is still listed
    as beyond repair, but in volumes that wait for fragments which faults took."""
    name = "nothing_is_under_way"
    left = sorted(set(moves) - set(waiting))
    listed = sorted(set(unrepairable) - set(waiting))
    found = [Violation(name, str(volume), "a move is left unfinished") for volume in left]
    found += [Violation(name, str(volume), "still listed as beyond repair") for volume in listed]
    return found


def scrub_finds_damage(stripe: Stripe, lost_nodes: frozenset[NodeId]) -> list[Violation]:
    """Progress, some scrub periods after the last fault: no record that fails its checksums lies in
    its slot unless a block can no longer be made.  Records that lie in good order are a decode's to
    find, and those that are gone a verifier's."""
    if len(stripe.intact) < stripe.scheme.k:
        return []
    wrong = [
        slot
        for slot, state in enumerate(stripe.slots)
        if state is SlotState.CORRUPT and stripe.nodes[slot] not in lost_nodes
    ]
    if not wrong:
        return []
    message = f"slots {wrong} of {stripe.volume} are corrupt and nobody has mended them"
    return [Violation("scrub_finds_damage", str(stripe.block), message)]


def verifier_misses_nothing(stripe: Stripe, lost_nodes: frozenset[NodeId]) -> list[Violation]:
    """After a deep pass that found nothing: every slot on a disk that works holds an intact record,
    or is owed.  Records that lie in good order are a decode's to find, not a verifier's."""
    wrong = {
        slot: state.value
        for slot, state in enumerate(stripe.slots)
        if state is not SlotState.INTACT
        and slot not in stripe.debts
        and stripe.nodes[slot] is not None
        and stripe.nodes[slot] not in lost_nodes
    }
    if not wrong:
        return []
    message = f"slots {wrong} of {stripe.volume}: a deep pass called them good"
    return [Violation("verifier_misses_nothing", str(stripe.block), message)]


def lost_block_is_excused(block: BlockHash, stripe: Stripe | None, error: str) -> list[Violation]:
    """Invariant 1, after the faults stopped: an acknowledged block that cannot be read has lost
    more than m fragments to faults."""
    name = "lost_block_is_excused"
    if stripe is None:
        return [Violation(name, str(block), f"acknowledged, not in the index, read gives {error}")]
    if len(stripe.lost) <= stripe.scheme.m:
        message = (
            f"unreadable ({error}) although only slots {sorted(stripe.lost)} of "
            f"{stripe.scheme} are lost"
        )
        return [Violation(name, str(block), message)]
    return []


def failed_puts_left_nothing(
    ledger: Ledger, stripes: Mapping[BlockHash, Stripe]
) -> list[Violation]:
    """A put that was answered with "nothing was done" did not make its block known."""
    return [
        Violation("failed_puts_left_nothing", str(block), "in the index; every put of it failed")
        for block, story in ledger.blocks.items()
        if block in stripes and not story.may_exist
    ]


def read_is_served_or_excused(
    operation: Operation, stripe: Stripe | None, serving: frozenset[int]
) -> list[Violation]:
    """Invariant 1, while faults go on: a failed read of an acknowledged block had fewer than k
    intact fragments on nodes that worked throughout (`serving`, slots)."""
    name = "read_is_served_or_excused"
    (block,) = operation.blocks
    if stripe is None:
        return [Violation(name, str(block), f"acknowledged, read gives {operation.error}")]
    usable = stripe.intact & serving
    if len(usable) >= stripe.scheme.k:
        message = (
            f"operation {operation.number} failed ({operation.error}) although slots "
            f"{sorted(usable)} of {stripe.scheme} were intact on working nodes"
        )
        return [Violation(name, str(block), message)]
    return []


def put_is_taken_or_excused(
    operation: Operation, healthy_nodes: int, needed_nodes: int
) -> list[Violation]:
    """Progress: a put fails only while fewer nodes than it needs worked throughout, and for some
    time before.  Not for judging puts that met trouble which nobody in the cell can see."""
    if healthy_nodes < needed_nodes:
        return []
    message = (
        f"operation {operation.number} was refused ({operation.error}) although {healthy_nodes} "
        f"nodes worked and {needed_nodes} suffice"
    )
    return [Violation("put_is_taken_or_excused", str(operation.blocks[0]), message)]


# -- nodes -----------------------------------------------------------------------------------------


def writers_hold_their_lease(events: Iterable[NodeEvent]) -> list[Violation]:
    """Invariant 4: a node acknowledges a write only in a life that holds an unexpired lease of the
    incarnation it answers with, and never in a lower one than it acknowledged before."""
    name = "writers_hold_their_lease"
    found: list[Violation] = []
    leases: dict[tuple[NodeId, int], _Lease] = {}
    highest: dict[tuple[NodeId, int], int] = {}
    for event in events:
        key = (event.node_id, event.life)
        if isinstance(event, LeaseGranted):
            leases[key] = _extended(leases.get(key), event)
            continue
        found.extend(
            Violation(name, str(event.node_id), message)
            for message in _write_faults(event, leases.get(key), highest.get(key, 0))
        )
        highest[key] = max(highest.get(key, 0), event.incarnation)
    return found


@dataclass(frozen=True, slots=True)
class _Lease:
    incarnation: int
    until: float


def _extended(held: _Lease | None, granted: LeaseGranted) -> _Lease:
    until = granted.at + granted.lease_s
    if held is not None and held.incarnation == granted.incarnation:
        until = max(until, held.until)
    return _Lease(granted.incarnation, until)


def _write_faults(event: WriteAcknowledged, lease: _Lease | None, highest: int) -> Iterable[str]:
    if lease is None:
        yield f"life {event.life} acknowledged a write without ever holding a lease"
        return
    if event.at > lease.until:
        yield f"acknowledged a write {event.at - lease.until:.3f} s after its lease ran out"
    if event.incarnation != lease.incarnation:
        yield (
            f"acknowledged a write as incarnation {event.incarnation} under a lease of "
            f"{lease.incarnation}"
        )
    if event.incarnation < highest:
        yield f"acknowledged as incarnation {event.incarnation} after {highest}"


def incarnation_is_durable(
    node_id: NodeId, events: Iterable[NodeEvent], durable: int
) -> list[Violation]:
    """Invariant 4: what a node remembers on its disk is no older than any incarnation it
    acknowledged a write in, or it could be led back to an earlier one by a restart."""
    acknowledged = [
        event.incarnation
        for event in events
        if isinstance(event, WriteAcknowledged) and event.node_id == node_id
    ]
    newest = max(acknowledged, default=0)
    if newest <= durable:
        return []
    message = f"acknowledged writes as incarnation {newest}; its disk says {durable}"
    return [Violation("incarnation_is_durable", str(node_id), message)]


def receipts_are_of_this_life(
    node_id: NodeId, receipt_incarnation: int, table_incarnation: int
) -> list[Violation]:
    """Invariant 4: no receipt counts that was older than the node table before the index
    transaction began."""
    if receipt_incarnation >= table_incarnation:
        return []
    message = (
        f"a put was recorded on the word of incarnation {receipt_incarnation}; the node was "
        f"registered as {table_incarnation} before"
    )
    return [Violation("receipts_are_of_this_life", str(node_id), message)]


# -- references ------------------------------------------------------------------------------------


def versions_reference_present_blocks(
    versions: Iterable[Version], stripes: Mapping[BlockHash, Stripe]
) -> list[Violation]:
    """Invariant 3: every block of every version is in the block index."""
    return [
        Violation(
            "versions_reference_present_blocks",
            f"{version.owner}:{version.path}",
            f"revision {version.rev} references {block}, which is not in the index",
        )
        for version in versions
        for block in version.blocks
        if block not in stripes
    ]


def references_are_authorised(ledger: Ledger, versions: Iterable[Version]) -> list[Violation]:
    """Invariant 5: a namespace references only blocks that its owner sent."""
    found = []
    for version in versions:
        for block in version.blocks:
            story = ledger.blocks.get(block)
            attempts = story.attempts.get(version.owner) if story is not None else None
            if attempts is None or not attempts.may_have_worked:
                found.append(
                    Violation(
                        "references_are_authorised",
                        f"{version.owner}:{version.path}",
                        f"references {block}, which {version.owner} never put",
                    )
                )
    return found


def reference_counts_match(
    versions: Iterable[Version], references: Iterable[References]
) -> list[Violation]:
    """Per namespace, the counter of each block equals its occurrences in all kept versions."""
    counted: Counter[tuple[str, BlockHash]] = Counter()
    for version in versions:
        for block in version.blocks:
            counted[version.owner, block] += 1
    kept = {(item.owner, item.block): item.count for item in references}
    return [
        Violation(
            "reference_counts_match",
            f"{owner}:{block}",
            f"counter says {kept.get((owner, block), 0)}, versions say {counted[owner, block]}",
        )
        for owner, block in sorted({*counted, *kept})
        if counted[owner, block] != kept.get((owner, block), 0)
    ]


def own_blocks_may_be_referenced(
    ledger: Ledger, operation: Operation, missing: Iterable[BlockHash], claim_s: float
) -> list[Violation]:
    """A put gives its sender a claim: a commit may not call a block missing that the same owner
    was told is stored less than `claim_s` before."""
    put_at: dict[BlockHash, float] = {}
    for put in ledger.of_kind(Kind.PUT):
        if put.owner == operation.owner and put.outcome is Outcome.ACKNOWLEDGED:
            put_at[put.blocks[0]] = put.ended
    return [
        Violation(
            "own_blocks_may_be_referenced",
            f"{operation.owner}:{operation.path}",
            f"{block} is called missing; {operation.owner} was told that it is stored",
        )
        for block in missing
        if block in put_at and operation.ended - put_at[block] < claim_s
    ]


# -- histories of paths ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """What a path was seen to hold between two instants; `rev` None means no entry."""

    owner: str
    path: str
    rev: str | None
    blocks: tuple[BlockHash, ...]
    started: float
    ended: float


def paths_hold_a_last_write(ledger: Ledger, seen: Sequence[Seen]) -> list[Violation]:
    """Each path is a register: what is seen was written by an operation that began before the look
    ended, and that no acknowledged operation followed before the look began."""
    writes: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in ledger.of_kind(Kind.COMMIT, Kind.DELETE):
        if operation.outcome is not Outcome.FAILED:
            writes[operation.owner, operation.path].append(operation)
    return [
        Violation("paths_hold_a_last_write", f"{look.owner}:{look.path}", message)
        for look in seen
        if (message := _register_fault(look, writes[look.owner, look.path]))
    ]


def _register_fault(look: Seen, writes: Sequence[Operation]) -> str:
    """Why no order of the writes explains the look; empty if one does."""
    sources = [write for write in writes if write.started <= look.ended and _wrote(write, look)]
    acknowledged = [write for write in writes if write.outcome is Outcome.ACKNOWLEDGED]
    begin = [write.started for write in acknowledged if write.ended < look.started]
    newest = max(begin, default=None)
    if look.rev is None and newest is None:
        return ""
    if not sources:
        return f"holds revision {look.rev}, which no operation wrote"
    if newest is None or any(_ended(source) >= newest for source in sources):
        return ""
    return f"holds revision {look.rev} although an acknowledged later operation replaced it"


def _ended(write: Operation) -> float:
    """When a write must have taken effect; an unknown one may still be on its way."""
    return write.ended if write.outcome is Outcome.ACKNOWLEDGED else float("inf")


def _wrote(write: Operation, look: Seen) -> bool:
    if write.kind is Kind.DELETE:
        return look.rev is None
    if look.rev is None:
        return False
    if write.outcome is Outcome.ACKNOWLEDGED:
        return write.rev == look.rev
    return write.blocks == look.blocks


def no_update_is_lost(ledger: Ledger) -> list[Violation]:
    """Compare-and-swap: of all commits that name one parent revision, one revision came."""
    children: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for operation in ledger.of_kind(Kind.COMMIT):
        if operation.outcome is Outcome.ACKNOWLEDGED and operation.parent_rev is not None:
            assert operation.rev is not None
            if operation.rev != operation.parent_rev:
                key = (operation.owner, operation.path, operation.parent_rev)
                children[key].add(operation.rev)
    return [
        Violation(
            "no_update_is_lost",
            f"{owner}:{path}",
            f"revision {parent} was replaced {len(revs)} times: {sorted(revs)}",
        )
        for (owner, path, parent), revs in children.items()
        if len(revs) > 1
    ]


# -- progress --------------------------------------------------------------------------------------


def requests_are_answered(
    ledger: Ledger, deadline_s: float, excused: Callable[[Operation], bool]
) -> list[Violation]:
    """Liveness: a client waits for its whole deadline in vain only while the gateway, or the
    network in front of it, was in trouble (`excused`)."""
    return [
        Violation(
            "requests_are_answered",
            f"operation {operation.number}",
            f"{operation.kind.value} by {operation.client} was not answered: {operation.error}",
        )
        for operation in ledger.operations
        if operation.outcome is Outcome.UNKNOWN
        and operation.finished
        and operation.ended - operation.started >= deadline_s
        and not excused(operation)
    ]


def operations_end(ledger: Ledger, seconds_max: float) -> list[Violation]:
    """Liveness: every operation is answered or given up within its bound."""
    return [
        Violation(
            "operations_end",
            f"operation {operation.number}",
            f"{operation.kind.value} by {operation.client} took "
            f"{operation.ended - operation.started:.1f} s; the bound is {seconds_max:.1f} s",
        )
        for operation in ledger.operations
        if operation.ended - operation.started > seconds_max
    ]
