"""A scoreboard of zeros proves nothing until the same harness has been seen to fail.

Every planted defect must be found, by the checker that is there for it, within a few seeds; the
same seeds pass without the defect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import sim_mutants as mutants

import cluster.block_index
import metadata.batch
from chaos.sim.cell import Parts
from chaos.sim.gateway import GatewayParts
from chaos.sim.run import Report, Verdict, simulate

SEEDS = range(1, 41)
"""How many seeds a defect may hide from."""


class Defect(NamedTuple):
    """Where it is planted, under what trouble it shows, and who must find it."""

    parts: Parts
    scenario: str
    finder: str
    verdict: Verdict = Verdict.SAFETY
    seeds: range = SEEDS


def _gateway(**classes: type) -> Parts:
    return Parts(gateway=GatewayParts(**classes))


DEFECTS = {
    "a store acknowledges before it is durable": Defect(
        Parts(make_store=mutants.AcksBeforeDurable), "calm", "acknowledged_block_is_whole"
    ),
    "a store never syncs": Defect(
        Parts(make_store=mutants.NeverSyncs), "kill_m", "acknowledged_block_is_whole"
    ),
    "a node ignores the incarnation": Defect(
        Parts(node=mutants.IgnoresIncarnation),
        "zombies",
        "writers_hold_their_lease",
        seeds=range(60, 100),  # two lives of a node seldom meet: in about one seed of a hundred
    ),
    "a node ignores its lease": Defect(
        Parts(node=mutants.IgnoresLease), "zombies", "writers_hold_their_lease"
    ),
    "a client counts sends as acknowledgements": Defect(
        _gateway(node_pool=mutants.CountsSends), "kill_m", "acknowledged_block_is_whole"
    ),
    "the index forgets debts": Defect(
        _gateway(block_index=mutants.ForgetsDebts), "kill_m", "acknowledged_block_is_whole"
    ),
    "an unknown commit of the index is taken for a success": Defect(
        _gateway(block_index=mutants.TakesUnknownForSuccess), "sql", "acknowledged_block_is_whole"
    ),
    "an unknown commit of the index is taken for a failure": Defect(
        _gateway(block_index=mutants.TakesUnknownForFailure), "sql", "failed_puts_left_nothing"
    ),
    "a put gives no claim": Defect(
        _gateway(tree=mutants.IgnoresClaims), "calm", "own_blocks_may_be_referenced"
    ),
    "another block's bytes are served": Defect(
        _gateway(block_client=mutants.ServesOldBytes), "calm", "served_bytes_are_the_blocks"
    ),
    "a read gives up although parity is there": Defect(
        _gateway(block_client=mutants.GivesUpOnParity), "bit_rot", "read_is_served_or_excused"
    ),
    "a node that failed once is never read again": Defect(
        _gateway(node_pool=mutants.NeverForgives), "zombies", "read_is_served_or_excused"
    ),
    "a node that failed a write once is never written to again": Defect(
        _gateway(node_pool=mutants.NeverTrustsAgain), "zombies", "put_is_taken_or_excused"
    ),
    "the hash alone authorises": Defect(
        _gateway(tree=mutants.TrustsTheHash), "calm", "references_are_authorised"
    ),
    "the last writer wins": Defect(
        _gateway(tree=mutants.LastWriterWins), "contended", "no_update_is_lost"
    ),
    "a failed commit is answered as made": Defect(
        _gateway(tree=mutants.AcksBeforeCommit), "sql", "paths_hold_a_last_write"
    ),
    "a put waits for ever for a dead node": Defect(
        _gateway(node_pool=mutants.WaitsForEver),
        "lost_disks",
        "requests_are_answered",
        Verdict.LIVENESS,
    ),
    "a node that was down stays down": Defect(
        Parts(placement=mutants.NeverWelcomesBack), "kill_m", "not converged", Verdict.LIVENESS
    ),
    "a node has a bug": Defect(
        Parts(node=mutants.DividesByZero), "calm", "ZeroDivisionError", Verdict.CRASH
    ),
}


def _findings(defect: Defect) -> Iterator[Report]:
    """Failures under seeds, one after the other."""
    for seed in defect.seeds:
        report = simulate(seed, defect.scenario, parts=defect.parts)
        if report.verdict is not Verdict.PASSED:
            yield report


def _assert_found(name: str, defect: Defect) -> None:
    others = []
    for report in _findings(defect):
        if report.verdict is defect.verdict and defect.finder in report.finding:
            return
        others.append(f"{report.verdict.name}: {report.finding[:300]}")
    pytest.fail(
        f"{name}: {defect.finder} did not find it under seeds {defect.seeds.start} to "
        f"{defect.seeds.stop - 1}; "
        f"others found: {others}"
    )


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_by_its_checker(name: str) -> None:
    _assert_found(name, DEFECTS[name])


def test_counters_that_are_not_kept_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata.batch, "add_references", lambda *_: None)
    _assert_found("no counters", Defect(Parts(), "calm", "reference_counts_match"))


def test_an_index_that_does_not_compare_receipts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.block_index, "receipts_hold", lambda *_: True)
    _assert_found("no fence", Defect(Parts(), "laggards", "receipts_are_of_this_life"))
