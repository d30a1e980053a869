"""Two hundred simulated cells, each broken its own way; then those that ever failed.

A failing seed is named, with the command that repeats it.  `tests/sim/seeds.txt` is the corpus of
seeds that failed once.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from chaos.faults import FaultKind
from chaos.sim.options import SCENARIOS
from chaos.sim.run import Report, Verdict, simulate

SEEDS = range(1, 202)
CHUNK = 10

CHUNKS = [SEEDS[at : at + CHUNK] for at in range(0, len(SEEDS), CHUNK)]
CORPUS = Path(__file__).parent / "seeds.txt"

OPERATIONS_MIN = 20
"""Fewer would show that a run is idle; clients of a gateway that is stopped wait for most of it."""

OPERATIONS_MEAN_MIN = 100

ALL_S = 1200.0
"""Limit of a test that may have to run every seed itself."""


class Runs:
    """Reports by seed, kept in a directory that all processes of a test run share: each seed is
    run once, by whoever wants it first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def reports(self, seeds: range) -> list[Report]:
        """Run those of these that nobody has begun; what others have not ended is run again."""
        for seed in reversed(seeds):
            if self._claim(seed):
                self._run(seed)
        return [self._kept(seed) or self._run(seed) for seed in seeds]

    def _claim(self, seed: int) -> bool:
        try:
            (self._directory / f"{seed}.begun").open("x").close()
        except FileExistsError:
            return False
        return True

    def _run(self, seed: int) -> Report:
        report = simulate(seed)
        part = self._directory / f"{seed}.{os.getpid()}"
        part.write_bytes(pickle.dumps(report))
        part.rename(self._directory / f"{seed}.report")
        return report

    def _kept(self, seed: int) -> Report | None:
        kept = self._directory / f"{seed}.report"
        return pickle.loads(kept.read_bytes()) if kept.exists() else None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Runs:
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "simulated"
    directory.mkdir(exist_ok=True)
    return Runs(directory)


def assert_passed(report: Report) -> None:
    assert report.verdict is Verdict.PASSED, (
        f"{report.verdict.name}: {report.finding}\nrepeat it with: {report.command}"
    )


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: f"{chunk[0]}-{chunk[-1]}")
def test_no_promise_is_broken_under_seeds(chunk: range, runs: Runs) -> None:
    for report in runs.reports(chunk):
        assert_passed(report)
        assert sum(report.operations.values()) >= OPERATIONS_MIN, report.command
        assert report.checks["acknowledged_block_reads_back"] > 0, report.command


@pytest.mark.timeout(ALL_S)
def test_every_kind_of_fault_fires_within_the_seeds(runs: Runs) -> None:
    fired: Counter[FaultKind] = Counter()
    for report in runs.reports(SEEDS):
        fired.update(report.fired)
    assert {kind for kind in FaultKind if fired[kind] < 5} == set()


@pytest.mark.timeout(ALL_S)
def test_every_outcome_is_met_within_the_seeds(runs: Runs) -> None:
    """Seeds in which nothing ever fails, or nothing is ever unknown, would prove little."""
    seen: Counter[str] = Counter()
    for report in runs.reports(SEEDS):
        seen.update(report.operations)
    assert seen.total() >= OPERATIONS_MEAN_MIN * len(SEEDS)
    for operation in ("put", "get", "commit", "delete", "entry"):
        for outcome in ("acknowledged", "failed", "unknown"):
            assert seen[f"{operation} {outcome}"] > 0, f"no {operation} was ever {outcome}"


def _corpus() -> list[tuple[int, str]]:
    lines = [line.split() for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    return [(int(words[0]), words[1]) for words in lines if words and words[0] != "#"]


@pytest.mark.parametrize(("seed", "scenario"), _corpus())
def test_a_seed_that_failed_once_passes(seed: int, scenario: str) -> None:
    assert_passed(simulate(seed, scenario))


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ("mixed", "idle")])
def test_a_scenario_passes(scenario: str) -> None:
    for seed in (501, 502):
        assert_passed(simulate(seed, scenario))


def test_a_cell_left_alone_for_hours_keeps_everything() -> None:
    report = simulate(7, "idle")
    assert_passed(report)
    assert report.virtual_s > 4 * 3600
    assert report.fired == {}


@pytest.mark.parametrize("seed", [3, 35])
def test_a_seed_gives_the_identical_trace_twice(seed: int) -> None:
    first, second = simulate(seed), simulate(seed)
    assert first.trace_tail == second.trace_tail
    assert first.trace_hash == second.trace_hash
    assert (first.steps, first.virtual_s) == (second.steps, second.virtual_s)


def test_a_seed_gives_the_identical_trace_in_another_process() -> None:
    """Hashes of strings and bytes differ from process to process; nothing may rest on them."""
    hashes = {_trace_in_process(11, hash_seed) for hash_seed in ("1", "2")}
    assert hashes == {simulate(11).trace_hash}


def _trace_in_process(seed: int, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "chaos.sim", "--seed", str(seed)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("trace ")]
    return line.split()[1]


def test_different_seeds_give_different_traces(runs: Runs) -> None:
    reports = runs.reports(CHUNKS[0])
    assert len({report.trace_hash for report in reports}) == CHUNK
