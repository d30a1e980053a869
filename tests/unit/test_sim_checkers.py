"""Every checker accepts what may happen and names what may not."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from chaos import checkers
from chaos.checkers import Seen
from chaos.evidence import (
    LeaseGranted,
    References,
    SlotState,
    Stripe,
    Version,
    WriteAcknowledged,
)
from chaos.ledger import Kind, Ledger, Operation, Outcome
from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId

DATA = b"some bytes"
BLOCK = BlockHash(hashlib.sha256(DATA).digest())
OTHER = BlockHash(hashlib.sha256(b"others").digest())
NODE = NodeId("node-01")
SCHEME = Scheme.parse("rs-2-2")
INTACT, ABSENT, CORRUPT = SlotState.INTACT, SlotState.ABSENT, SlotState.CORRUPT


class Time:
    """A ledger's clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def ledger(time: Time) -> Ledger:
    return Ledger(time)


def stripe(
    *slots: SlotState,
    debts: tuple[int, ...] = (),
    destroyed: tuple[int, ...] = (),
) -> Stripe:
    nodes = tuple(NodeId.numbered(number + 1) for number in range(4))
    states = slots or (INTACT,) * 4
    return Stripe(
        BLOCK, VolumeId(1), SCHEME, len(DATA), nodes, states, frozenset(debts), frozenset(destroyed)
    )


def put(ledger: Ledger, owner: str, outcome: Outcome, block: BlockHash = BLOCK) -> Operation:
    operation = ledger.begin_put("client", owner, block, len(DATA))
    ledger.end(operation, outcome)
    return operation


def write(
    ledger: Ledger,
    time: Time,
    span: tuple[float, float],
    *,
    rev: str | None = None,
    parent: str | None = None,
    kind: Kind = Kind.COMMIT,
    outcome: Outcome = Outcome.ACKNOWLEDGED,
    blocks: tuple[BlockHash, ...] = (),
) -> None:
    time.now = span[0]
    operation = ledger.begin("c", "ann", kind, path="p", parent_rev=parent, blocks=blocks)
    time.now = span[1]
    ledger.end(operation, outcome, rev=rev)


def test_served_bytes_must_be_the_blocks() -> None:
    assert checkers.served_bytes_are_the_blocks(BLOCK, len(DATA), DATA) == []
    assert checkers.served_bytes_are_the_blocks(BLOCK, len(DATA), b"Some bytes")
    assert checkers.served_bytes_are_the_blocks(BLOCK, len(DATA), DATA[:-1])


@pytest.mark.parametrize(
    "evidence",
    [
        stripe(),
        stripe(INTACT, ABSENT, INTACT, INTACT, debts=(1,)),
        stripe(INTACT, INTACT, INTACT, INTACT, debts=(1,)),
        stripe(ABSENT, CORRUPT, INTACT, INTACT, destroyed=(0, 1)),
        stripe(ABSENT, ABSENT, CORRUPT, INTACT, destroyed=(0, 2), debts=(1,)),
    ],
)
def test_a_stripe_whose_gaps_are_debts_or_faults_is_whole(evidence: Stripe) -> None:
    assert checkers.acknowledged_block_is_whole(BLOCK, len(DATA), evidence) == []


@pytest.mark.parametrize(
    "evidence",
    [
        None,
        stripe(INTACT, ABSENT, INTACT, INTACT),
        stripe(INTACT, INTACT, INTACT, CORRUPT),
        stripe(INTACT, ABSENT, ABSENT, INTACT, debts=(1, 2)),
        dataclasses.replace(stripe(), plain_bytes=len(DATA) + 1),
    ],
)
def test_a_stripe_with_a_gap_that_nothing_explains_is_not_whole(evidence: Stripe | None) -> None:
    assert checkers.acknowledged_block_is_whole(BLOCK, len(DATA), evidence)


def test_a_lost_block_is_excused_only_beyond_m_losses() -> None:
    gone = stripe(ABSENT, ABSENT, ABSENT, INTACT, destroyed=(0, 1, 2))
    held = stripe(ABSENT, ABSENT, INTACT, INTACT, destroyed=(0, 1))
    assert checkers.lost_block_is_excused(BLOCK, gone, "unreadable") == []
    assert checkers.lost_block_is_excused(BLOCK, held, "unreadable")
    assert checkers.lost_block_is_excused(BLOCK, None, "not found")


def test_a_put_that_failed_left_nothing(ledger: Ledger) -> None:
    put(ledger, "ann", Outcome.FAILED)
    assert checkers.failed_puts_left_nothing(ledger, {}) == []
    assert checkers.failed_puts_left_nothing(ledger, {BLOCK: stripe()})
    put(ledger, "bob", Outcome.UNKNOWN)
    assert checkers.failed_puts_left_nothing(ledger, {BLOCK: stripe()}) == []


def test_a_running_put_may_have_worked(ledger: Ledger) -> None:
    put(ledger, "ann", Outcome.FAILED)
    ledger.begin_put("client", "ann", BLOCK, len(DATA))
    assert checkers.failed_puts_left_nothing(ledger, {BLOCK: stripe()}) == []


def test_a_failed_read_needs_an_excuse(ledger: Ledger) -> None:
    read = ledger.begin("c", "ann", Kind.GET, blocks=(BLOCK,))
    ledger.end(read, Outcome.FAILED, error="unreadable")
    damaged = stripe(CORRUPT, INTACT, INTACT, INTACT, destroyed=(0,))
    assert checkers.read_is_served_or_excused(read, damaged, frozenset({0, 1})) == []
    assert checkers.read_is_served_or_excused(read, damaged, frozenset({0, 1, 2}))
    assert checkers.read_is_served_or_excused(read, None, frozenset())
    lying = stripe(INTACT, INTACT, CORRUPT, INTACT, destroyed=(0, 2))
    assert checkers.read_is_served_or_excused(read, lying, frozenset({0, 1})) == []


def granted(at: float, incarnation: int, life: int = 1) -> LeaseGranted:
    return LeaseGranted(NODE, life, incarnation, at, 10.0)


def acked(at: float, incarnation: int, life: int = 1) -> WriteAcknowledged:
    return WriteAcknowledged(NODE, life, incarnation, at)


def test_writes_under_a_live_lease_are_fine() -> None:
    events = [granted(0, 3), acked(9, 3), granted(9, 3), acked(18, 3), granted(20, 4), acked(21, 4)]
    assert checkers.writers_hold_their_lease(events) == []


@pytest.mark.parametrize(
    "events",
    [
        [acked(1, 1)],
        [granted(0, 1), acked(10.5, 1)],
        [granted(0, 2), acked(1, 1)],
        [granted(0, 2), acked(1, 3)],
        [granted(0, 2, life=1), acked(1, 2, life=2)],
        [granted(0, 2), acked(1, 2), granted(2, 1), acked(3, 1)],
    ],
)
def test_a_write_without_its_own_live_lease_is_not(
    events: list[LeaseGranted | WriteAcknowledged],
) -> None:
    assert checkers.writers_hold_their_lease(events)


def test_receipts_of_an_earlier_life_do_not_count() -> None:
    assert checkers.receipts_are_of_this_life(NODE, 4, 4) == []
    assert checkers.receipts_are_of_this_life(NODE, 3, 4)


def version(owner: str = "ann", *blocks: BlockHash) -> Version:
    return Version(owner, "p", "r1", blocks or (BLOCK,), True)


def test_a_version_references_only_what_is_there() -> None:
    assert checkers.versions_reference_present_blocks([version()], {BLOCK: stripe()}) == []
    assert checkers.versions_reference_present_blocks([version()], {})


def test_only_who_sent_a_block_may_reference_it(ledger: Ledger) -> None:
    put(ledger, "ann", Outcome.ACKNOWLEDGED)
    put(ledger, "bob", Outcome.FAILED)
    assert checkers.references_are_authorised(ledger, [version("ann")]) == []
    assert checkers.references_are_authorised(ledger, [version("bob")])
    assert checkers.references_are_authorised(ledger, [version("cat")])
    assert checkers.references_are_authorised(ledger, [version("ann", OTHER)])


def test_counters_equal_a_recount() -> None:
    versions = [version("ann", BLOCK, BLOCK, OTHER), version("ann", BLOCK)]
    right = [References("ann", BLOCK, 3), References("ann", OTHER, 1)]
    assert checkers.reference_counts_match(versions, right) == []
    assert checkers.reference_counts_match(versions, right[:1])
    assert checkers.reference_counts_match(versions, [*right, References("bob", BLOCK, 1)])
    assert checkers.reference_counts_match(versions[:1], right)


def test_a_claim_lasts(ledger: Ledger, time: Time) -> None:
    put(ledger, "ann", Outcome.ACKNOWLEDGED)
    time.now = 50.0
    commit = ledger.begin("c", "ann", Kind.COMMIT, path="p", blocks=(BLOCK,))
    ledger.end(commit, Outcome.FAILED)
    assert checkers.own_blocks_may_be_referenced(ledger, commit, [BLOCK], claim_s=100.0)
    assert checkers.own_blocks_may_be_referenced(ledger, commit, [BLOCK], claim_s=49.0) == []
    assert checkers.own_blocks_may_be_referenced(ledger, commit, [OTHER], claim_s=100.0) == []


def look(rev: str | None, at: float, blocks: tuple[BlockHash, ...] = ()) -> Seen:
    return Seen("ann", "p", rev, blocks, at, at)


def test_a_path_shows_its_last_acknowledged_write(ledger: Ledger, time: Time) -> None:
    write(ledger, time, (1, 2), rev="a")
    write(ledger, time, (3, 4), rev="b", parent="a")
    check = checkers.paths_hold_a_last_write
    assert check(ledger, [look(None, 0.5), look("a", 2.5), look("b", 5)]) == []
    assert check(ledger, [look("a", 3.5)]) == []
    assert check(ledger, [look("b", 3.5)]) == []
    assert check(ledger, [look("a", 5)])
    assert check(ledger, [look(None, 5)])
    assert check(ledger, [look("b", 2.5)])
    assert check(ledger, [look("c", 5)])


def test_an_unknown_write_may_show_at_any_later_time_or_never(ledger: Ledger, time: Time) -> None:
    write(ledger, time, (1, 2), rev="a")
    write(ledger, time, (3, 4), outcome=Outcome.UNKNOWN, blocks=(BLOCK,), parent="a")
    check = checkers.paths_hold_a_last_write
    assert check(ledger, [look("a", 9), look("x", 9, (BLOCK,))]) == []
    assert check(ledger, [look("x", 9, (OTHER,))])
    assert check(ledger, [look("x", 2.5, (BLOCK,))])


def test_a_deleted_path_is_empty(ledger: Ledger, time: Time) -> None:
    write(ledger, time, (1, 2), rev="a")
    write(ledger, time, (3, 4), kind=Kind.DELETE, parent="a")
    check = checkers.paths_hold_a_last_write
    assert check(ledger, [look(None, 5)]) == []
    assert check(ledger, [look("a", 5)])


def test_one_parent_has_one_child(ledger: Ledger, time: Time) -> None:
    write(ledger, time, (1, 2), rev="a")
    write(ledger, time, (3, 4), rev="b", parent="a")
    write(ledger, time, (3, 4), rev="b", parent="a")
    write(ledger, time, (5, 6), rev="c", parent="b")
    assert checkers.no_update_is_lost(ledger) == []
    write(ledger, time, (3, 7), rev="d", parent="a")
    assert checkers.no_update_is_lost(ledger)


def test_an_operation_that_never_ends_is_found(ledger: Ledger, time: Time) -> None:
    write(ledger, time, (0, 5), rev="a")
    assert checkers.operations_end(ledger, 10.0) == []
    assert checkers.operations_end(ledger, 4.0)
    ledger.begin("c", "ann", Kind.GET, blocks=(BLOCK,))
    assert checkers.operations_end(ledger, 10.0)


def test_the_ledger_counts_a_lost_answer_as_neither_success_nor_failure(ledger: Ledger) -> None:
    put(ledger, "ann", Outcome.UNKNOWN)
    assert ledger.acknowledged_blocks() == []
    assert ledger.blocks[BLOCK].may_exist
    assert ledger.counts() == {"put unknown": 1}
    put(ledger, "ann", Outcome.ACKNOWLEDGED)
    assert ledger.acknowledged_blocks() == [BLOCK]


def test_a_slot_is_published_in_the_life_that_verified_it() -> None:
    assert not checkers.published_in_the_life_that_verified(NODE, 3, 3)
    assert checkers.published_in_the_life_that_verified(NODE, 3, 4)


def test_a_transcoded_block_is_whole_but_for_what_faults_took() -> None:
    assert not checkers.transcoded_block_is_whole(stripe())
    assert not checkers.transcoded_block_is_whole(
        stripe(INTACT, ABSENT, INTACT, INTACT, destroyed=(1,))
    )
    assert checkers.transcoded_block_is_whole(stripe(INTACT, ABSENT, INTACT, INTACT, debts=(1,)))


def test_only_copies_of_what_is_safe_elsewhere_are_removed() -> None:
    holder, elsewhere = NodeId.numbered(2), NodeId.numbered(9)
    assert not checkers.removal_keeps_fragments(stripe(), 1, elsewhere, just_taken=False)
    assert checkers.removal_keeps_fragments(stripe(), 1, holder, just_taken=False)
    lacking = stripe(INTACT, ABSENT, INTACT, INTACT)
    assert checkers.removal_keeps_fragments(lacking, 1, elsewhere, just_taken=False)
    assert not checkers.removal_keeps_fragments(lacking, 1, elsewhere, just_taken=True)


def test_slots_of_a_volume_share_no_node() -> None:
    one, two = NodeId.numbered(1), NodeId.numbered(2)
    assert not checkers.slots_are_on_distinct_nodes({VolumeId(1): [one, two, None, None]})
    assert checkers.slots_are_on_distinct_nodes({VolumeId(1): [one, two, one]})


def test_an_emptied_node_holds_nothing() -> None:
    one, two = NodeId.numbered(1), NodeId.numbered(2)
    assert not checkers.emptied_nodes_hold_nothing([one], [(two, VolumeId(1))])
    assert checkers.emptied_nodes_hold_nothing([one], [(one, VolumeId(1))])


def test_a_dry_run_changes_nothing() -> None:
    assert not checkers.dry_run_changes_nothing("drain", 7, 7)
    assert checkers.dry_run_changes_nothing("drain", 7, 8)


def test_nothing_is_under_way_but_what_waits_for_lost_fragments() -> None:
    first, second = VolumeId(1), VolumeId(2)
    assert not checkers.nothing_is_under_way([first], [first], {first})
    assert len(checkers.nothing_is_under_way([first, second], [second], {first})) == 2


def test_damage_that_a_checksum_tells_is_mended_by_and_by() -> None:
    assert not checkers.scrub_finds_damage(stripe(), frozenset())
    rotten = stripe(INTACT, CORRUPT, INTACT, INTACT, destroyed=(1,))
    assert checkers.scrub_finds_damage(rotten, frozenset())
    assert not checkers.scrub_finds_damage(rotten, frozenset({NodeId.numbered(2)}))


def test_a_debt_of_a_fragment_that_is_there_was_written_once() -> None:
    owed = dataclasses.replace(stripe(), debts=frozenset({0, 1, 2}))
    assert not checkers.acknowledged_block_is_whole(BLOCK, len(DATA), owed)
    absent = stripe(ABSENT, ABSENT, INTACT, INTACT, debts=(0, 1))
    assert checkers.acknowledged_block_is_whole(BLOCK, len(DATA), absent)
