"""Drains, rebalances and transcodes under load and kills: done, and nothing is lost by them."""

from __future__ import annotations

from collections import Counter

from chaos.sim.run import Verdict, simulate


def test_changes_come_to_their_end_under_load_and_kills_and_every_block_is_whole() -> None:
    done: Counter[str] = Counter()
    for seed in (501, 502, 503):
        report = simulate(seed, "changes")
        assert report.verdict is Verdict.PASSED, f"{report.command}: {report.finding}"
        done.update(report.checks)
    for kind in ("drain", "rebalance", "transcode"):
        assert done[f"{kind}_was_done"] > 0, f"no {kind} came to its end: {done}"
    assert done["repair_keeps_fragments"] > 100
