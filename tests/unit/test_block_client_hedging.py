"""The share of reads that may be hedged."""

from __future__ import annotations

from cluster.hedging import HEDGES_PER_READ, HEDGES_SAVED_MAX, HedgeBudget


def test_a_quiet_gateway_may_hedge_for_each_node_it_can_lose_and_no_further() -> None:
    budget = HedgeBudget()
    assert [budget.spend() for _ in range(int(HEDGES_SAVED_MAX) + 1)] == [
        *[True] * int(HEDGES_SAVED_MAX),
        False,
    ]


def test_under_constant_lateness_hedges_are_a_fixed_share_of_reads() -> None:
    budget = HedgeBudget()
    reads, hedges = 10_000, 0
    for _ in range(reads):
        budget.earn()
        hedges += budget.spend()
    assert abs(hedges - reads * HEDGES_PER_READ) <= HEDGES_SAVED_MAX + 1


def test_savings_are_bounded() -> None:
    budget = HedgeBudget()
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100_000)) == int(HEDGES_SAVED_MAX)
