"""What fragments that contradict each other are taken to say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.debts import DebtReason
from cluster.fsck.rules import ClaimCount, Fragment, Health, Seal, Standing, judge_block
from erasure.scheme import Scheme

RS = Scheme.parse("rs-6-3")
SEAL = Seal(1, 6_000, 5_900)
OTHER = Seal(2, 6_000, 5_900)
HOME = tuple(range(9))
NONE: frozenset[int] = frozenset()


def intact(slot: int, node: int | None = None, seal: Seal = SEAL) -> Fragment:
    return Fragment(slot, slot if node is None else node, 1_096, Health.INTACT, seal)


def unread(slot: int, length: int = 1_096) -> Fragment:
    return Fragment(slot, slot, length)


def test_whole_block_is_readable_and_owes_nothing() -> None:
    verdict = judge_block([intact(0), *map(unread, range(1, 9))], HOME, NONE, 6)
    assert (verdict.standing, verdict.seal) == (Standing.READABLE, SEAL)
    assert verdict.present == set(range(9))
    assert verdict.owed == verdict.misplaced == ()


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        (Health.CORRUPT, DebtReason.CORRUPT),
        (Health.NO_RECORD, DebtReason.CORRUPT),
        (Health.IO_ERROR, DebtReason.UNREADABLE),
    ],
)
def test_bad_fragment_is_owed_for_what_it_is(health: Health, reason: DebtReason) -> None:
    bad = Fragment(8, 8, 1_096, health)
    verdict = judge_block([*map(intact, range(8)), bad], HOME, NONE, 6)
    assert verdict.owed == ((8, reason),)


def test_fragments_of_two_seals_never_add_up() -> None:
    mixed = [*(intact(slot) for slot in range(5)), *(intact(s, seal=OTHER) for s in range(5, 9))]
    verdict = judge_block(mixed, HOME, NONE, 6)
    assert verdict.standing is Standing.UNREADABLE
    assert verdict.seal == SEAL
    assert verdict.present == set(range(5))
    assert verdict.seals == 2
    assert set(verdict.owed) == {(slot, DebtReason.LYING) for slot in range(5, 9)}


def test_unread_fragment_of_another_length_is_not_counted() -> None:
    verdict = judge_block([intact(0), unread(1), unread(2, 2_000)], (0, 1, 2), NONE, 2)
    assert verdict.present == {0, 1}


def test_remains_of_a_failed_put_are_incomplete_and_the_same_with_a_lost_node_are_not() -> None:
    few = [intact(slot) for slot in range(5)]
    assert judge_block(few, HOME, NONE, 6).standing is Standing.INCOMPLETE
    lost = frozenset({8})
    assert judge_block(few, (*HOME[:8], None), lost, 6).standing is Standing.UNREADABLE


def test_fragment_elsewhere_keeps_a_block_but_does_not_make_it_readable() -> None:
    fragments = [*map(intact, range(5)), intact(5, node=20)]
    verdict = judge_block(fragments, HOME, NONE, 6)
    assert verdict.standing is Standing.UNREADABLE
    assert verdict.misplaced == (fragments[5],)


def test_unfinished_move_does_not_win_by_its_epoch() -> None:
    count = ClaimCount(RS)
    for block in range(10):
        count.add([*((slot, slot) for slot in range(9)), *([(8, 20)] if block else [])])
    holders = count.holders(lambda node: 5 if node == 20 else 1)
    assert holders.slots == HOME
    assert [(claim.node, claim.held) for claim in holders.rejected] == [(20, 9)]


def test_node_that_returns_with_deleted_blocks_does_not_win_by_their_number() -> None:
    small = Scheme.parse("replica-3")
    count = ClaimCount(small)
    for _ in range(10):
        count.add([(0, 0), (1, 1), (2, 2), (2, 20)])
    for _ in range(50):
        count.add([(2, 20)])  # deleted while it was away
    assert count.holders(lambda node: 1 if node == 20 else 2).slots == (0, 1, 2)


fragments_of_any_kind = st.lists(
    st.builds(
        Fragment,
        slot=st.integers(0, 4),
        node=st.integers(0, 5),
        length=st.sampled_from([100, 200]),
        health=st.just(Health.INTACT),
        seal=st.builds(Seal, st.integers(0, 2), st.just(7), st.just(7)),
    )
    | st.builds(
        Fragment,
        slot=st.integers(0, 4),
        node=st.integers(0, 5),
        length=st.sampled_from([100, 200]),
        health=st.sampled_from([h for h in Health if h is not Health.INTACT]),
    ),
    max_size=12,
    unique_by=lambda fragment: (fragment.slot, fragment.node),
)


@given(
    fragments_of_any_kind,
    st.lists(st.none() | st.integers(0, 5), min_size=4, max_size=4),
    st.integers(1, 3),
)
def test_verdict_agrees_with_counting_by_hand(
    fragments: list[Fragment], slots: list[int | None], k: int
) -> None:
    vacant = frozenset(slot for slot, node in enumerate(slots) if node is None)
    verdict = judge_block(fragments, slots, vacant, k)
    home = {f.slot: f for f in fragments if f.slot < 4 and slots[f.slot] == f.node}
    by_seal: dict[tuple[Seal, int], set[int]] = {}
    for f in fragments:
        if f.health is Health.INTACT and f.seal is not None:
            by_seal[f.seal, f.length] = {
                slot
                for slot, g in home.items()
                if g.length == f.length and (g.seal == f.seal or g.health is Health.UNREAD)
            }
    readable = any(len(present) >= k for present in by_seal.values())
    if by_seal:
        assert (verdict.standing is Standing.READABLE) == readable
        assert len(verdict.present) == max(map(len, by_seal.values()), default=0) or not readable
    seen = {f.slot for f in fragments if f.slot < 4}
    if verdict.standing is Standing.INCOMPLETE:
        assert len(seen | vacant) < k, "nothing is given up that might still be read"
    assert {slot for slot, _ in verdict.owed} | verdict.present == set(range(4))
    assert {id(f) for f in verdict.misplaced} == {id(f) for f in fragments} - set(
        map(id, home.values())
    )
    again = judge_block(random.Random(1).sample(fragments, len(fragments)), slots, vacant, k)
    assert (again.standing, again.seal, again.present) == (
        verdict.standing,
        verdict.seal,
        verdict.present,
    )


@given(
    st.integers(1, 8),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
    st.sampled_from(["rs-2-2", "replica-3", "rs-3-1"]),
)
def test_published_moves_are_found_again_whatever_was_left_behind(
    blocks: int, moves: int, rng: random.Random, scheme_name: str
) -> None:
    """A volume's life: each move copies every live block of a slot to a new node and raises the
    epoch; deletes reach the holders only; the last move may not have ended.  One slot never
    moved."""
    scheme = Scheme.parse(scheme_name)
    slots = list(range(scheme.n))
    epochs = dict.fromkeys(slots, 1)
    disks: dict[tuple[int, int], set[int]] = {
        (slot, slot): set(range(blocks + 3)) for slot in slots
    }
    alive = set(range(blocks + 3))
    for move in range(moves):
        slot = rng.randrange(scheme.n - 1)
        target = scheme.n + move
        disks[slot, target] = set(alive)
        epochs[target] = move + 2
        slots[slot] = target
        gone = {block for block in alive - {0} if rng.random() < 0.2}
        alive -= gone
        for number, node in enumerate(slots):
            disks[number, node] -= gone
    if rng.random() < 0.5 and len(alive) > 1:
        part = set(sorted(alive)[1:])
        disks[0, 99] = part
        epochs[99] = moves + 2
    by_block = [
        sorted(claim for claim, names in disks.items() if block in names)
        for block in range(blocks + 3)
    ]
    first = ClaimCount(scheme)
    for held in filter(None, by_block):
        first.add(held)
    count = ClaimCount(scheme, first.uncontested)
    for held in filter(None, by_block):
        count.add(held)
    assert scheme.n - 1 in first.uncontested
    assert list(count.holders(epochs.__getitem__).slots) == slots
