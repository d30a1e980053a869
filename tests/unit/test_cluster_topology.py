"""Node states: every pair of state and event is either in the table or refused."""

from __future__ import annotations

from itertools import product

import pytest

from cluster.topology import (
    NODE_TRANSITIONS,
    SERVES_READS,
    TAKES_NEW_VOLUMES,
    TAKES_WRITES,
    NodeEvent,
    NodeState,
    may_happen,
    transition,
)

ALL_PAIRS = list(product(NodeState, NodeEvent))


@pytest.mark.parametrize(("state", "event"), ALL_PAIRS)
def test_every_pair_is_in_the_table_or_refused(state: NodeState, event: NodeEvent) -> None:
    if (state, event) in NODE_TRANSITIONS:
        assert transition(state, event) is NODE_TRANSITIONS[state, event]
        assert may_happen(state, event)
    else:
        assert not may_happen(state, event)
        with pytest.raises(AssertionError, match=state):
            transition(state, event)


def test_every_state_is_reached_from_joining() -> None:
    reached = {NodeState.JOINING}
    while True:
        more = {new for (old, _), new in NODE_TRANSITIONS.items() if old in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(NodeState)


def test_nothing_happens_to_a_node_that_is_gone() -> None:
    assert not [event for event in NodeEvent if may_happen(NodeState.GONE, event)]


def test_every_state_but_gone_can_be_left() -> None:
    assert {state for state, _ in NODE_TRANSITIONS} == set(NodeState) - {NodeState.GONE}


def test_no_event_leaves_a_state_as_it_is() -> None:
    assert all(new is not old for (old, _), new in NODE_TRANSITIONS.items())


def test_silence_passes_through_suspicion_unless_the_node_was_being_emptied() -> None:
    lost = {state for state, event in NODE_TRANSITIONS if event is NodeEvent.LOST}
    assert lost == {NodeState.SUSPECT, NodeState.DRAINING}


def test_a_node_with_new_volumes_takes_writes_and_one_with_writes_serves_reads() -> None:
    assert TAKES_NEW_VOLUMES < TAKES_WRITES < SERVES_READS
    assert not SERVES_READS & {NodeState.JOINING, NodeState.DOWN, NodeState.GONE}
