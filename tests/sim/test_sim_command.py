"""`python -m chaos.sim`: what it prints and how it exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

import chaos.sim.__main__ as command
from chaos.sim.run import Report, Verdict, simulate


@pytest.fixture(scope="module")
def passed() -> Report:
    return simulate(3, "calm")


def _fake(monkeypatch: pytest.MonkeyPatch, reports: list[Report]) -> None:
    answers: Iterator[Report] = iter(reports)
    monkeypatch.setattr(command, "simulate", lambda *_: next(answers))


def test_one_run_prints_what_it_drew_did_and_proved(
    passed: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake(monkeypatch, [passed])
    assert command.main(["--seed", "3", "--scenario", "calm"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "seed 3, scenario calm",
        "cell: ",
        "faults: none",
        "put acknowledged",
        "acknowledged_block_reads_back",
        "per second",
        f"trace {passed.trace_hash}",
        "verdict: passed",
    ):
        assert expected in printed
    assert "repeat it" not in printed


@pytest.mark.parametrize(
    ("verdict", "code"), [(Verdict.CRASH, 3), (Verdict.LIVENESS, 4), (Verdict.SAFETY, 5)]
)
def test_a_failure_prints_the_command_that_repeats_it_and_its_kind_is_the_exit_code(
    passed: Report,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verdict: Verdict,
    code: int,
) -> None:
    failed = dataclasses.replace(passed, verdict=verdict, finding="what broke", hours=2.0)
    _fake(monkeypatch, [failed])
    assert command.main(["--seed", "3", "--scenario", "calm", "--hours", "2"]) == code
    printed = capsys.readouterr().out
    assert "what broke" in printed
    assert "python -m chaos.sim --seed 3 --scenario calm --hours 2\n" in printed
    assert passed.trace_tail[-1] in printed


def test_many_seeds_give_totals_and_the_worst_verdict(
    passed: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stuck = dataclasses.replace(passed, verdict=Verdict.LIVENESS, finding="stuck")
    _fake(monkeypatch, [passed, stuck, passed])
    assert command.main(["--seeds", "3..5", "--scenario", "calm"]) == 4
    printed = capsys.readouterr().out
    assert "liveness: stuck" in printed
    assert "passed 2, liveness 1" in printed


def test_many_seeds_run_in_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seeds", "3..4", "--scenario", "contended", "--jobs", "2"]) == 0
    assert "passed 2" in capsys.readouterr().out


def test_hours_say_how_long_faults_go_on() -> None:
    report = simulate(4, "kill_m", hours=0.25)
    assert report.verdict is Verdict.PASSED, report.finding
    assert report.virtual_s > 900
