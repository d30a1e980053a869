"""Defects of healing, planted one at a time: each is found by the checker that is there for it.

As `test_checkers_bite.py`, for what moves, repairs, scrubs and removes.  A defect is a function of
the product replaced by `tests/support/sim_mutants.py`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import pytest
import sim_mutants as mutants

import cluster.change.requests
import cluster.members
import cluster.placement_service
from chaos.sim.run import Verdict, simulate
from cluster.repair.volume_run import VolumeRun
from storage_node.scrub import Scrubber


class Defect(NamedTuple):
    """What is replaced by what, under what trouble it shows, and who must find it."""

    place: ModuleType | type
    name: str
    replacement: Any
    scenario: str
    finder: str
    verdict: Verdict = Verdict.SAFETY
    seeds: int = 12
    """How many seeds it may hide from."""


DEFECTS = {
    "repair counts what it sent": Defect(
        VolumeRun,
        "_verify_made",
        mutants.counts_sent_fragments,
        "healing",
        "repair_keeps_fragments",
    ),
    "debts are struck out without a look": Defect(
        VolumeRun,
        "_look_at_targets",
        mutants.believes_debts_repaid,
        "kill_m",
        "acknowledged_block_is_whole",
    ),
    "a scrub sets nothing aside": Defect(
        Scrubber,
        "_set_aside",
        mutants.sets_nothing_aside,
        "bit_rot",
        "scrub_finds_damage",
        Verdict.LIVENESS,
    ),
    "a node is called drained before it is empty": Defect(
        cluster.members,
        "begin_drain",
        mutants.drains_at_once,
        "changes",
        "emptied_nodes_hold_nothing",
    ),
    "a volume is opened with two slots on one node": Defect(
        cluster.placement_service,
        "plan_volumes",
        mutants.opens_on_one_node_twice,
        "calm",
        "slots_are_on_distinct_nodes",
    ),
    "a dry run writes": Defect(
        cluster.change.requests,
        "preview",
        mutants.previews_by_writing,
        "changes",
        "dry_run_changes_nothing",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_of_healing_is_found_by_its_checker(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect = DEFECTS[name]
    monkeypatch.setattr(defect.place, defect.name, defect.replacement)
    _assert_found(name, defect)


def _assert_found(name: str, defect: Defect) -> None:
    others = []
    for seed in range(1, defect.seeds + 1):
        report = simulate(seed, defect.scenario)
        if report.verdict is defect.verdict and defect.finder in report.finding:
            return
        if report.verdict is not Verdict.PASSED:
            others.append(f"{seed} {report.verdict.name}: {report.finding[-300:]}")
    pytest.fail(
        f"{name}: {defect.finder} did not find it under seeds 1 to {defect.seeds}; others: {others}"
    )
