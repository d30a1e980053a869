"""The life of a node process, all pairs of states."""

from __future__ import annotations

import itertools

import pytest

from storage_node.service_state import TRANSITIONS, ServiceState, transition

PAIRS = list(itertools.product(ServiceState, ServiceState))


@pytest.mark.parametrize(("current", "target"), PAIRS)
def test_only_the_steps_of_the_table_are_allowed(
    current: ServiceState, target: ServiceState
) -> None:
    if target is current or target in TRANSITIONS[current]:
        assert transition(current, target) is target
    else:
        with pytest.raises(AssertionError):
            transition(current, target)


def test_every_state_has_its_row_and_only_closing_is_final() -> None:
    assert set(TRANSITIONS) == set(ServiceState)
    assert [state for state in ServiceState if not TRANSITIONS[state]] == [ServiceState.CLOSING]
    assert all(
        ServiceState.CLOSING in TRANSITIONS[state]
        for state in ServiceState
        if state is not ServiceState.CLOSING
    )


def test_nothing_serves_without_having_been_opened() -> None:
    into = [state for state in ServiceState if ServiceState.SERVING in TRANSITIONS[state]]
    assert into == [ServiceState.OPENING]
