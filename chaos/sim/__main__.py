"""`python -m chaos.sim`: simulate seeds, print what each drew, did and proved.

    python -m chaos.sim --seed 42                      one run
    python -m chaos.sim --seeds 1..200 --jobs 2        many; prints failures and totals
    python -m chaos.sim --seed 42 --scenario kill_m    one kind of trouble
    python -m chaos.sim --seed 42 --hours 24           longer
    python -m chaos.sim --seed 42 --trace 200          with the last lines of the trace

Exit code: 0 all passed, 3 a crash, 4 liveness, 5 safety (the highest of all runs).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from chaos.sim.options import SCENARIOS
from chaos.sim.run import Report, Verdict, simulate

TRACE_LINES_ON_FAILURE = 60


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print."""
    options = _parse(arguments)
    seeds = [options.seed] if options.seeds is None else _range(options.seeds)
    reports = _run_all(seeds, options.scenario, options.hours, options.jobs)
    if len(seeds) == 1:
        report = next(reports)
        _print(format_report(report, options.trace))
        return report.verdict.value
    return _summarise(reports)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos.sim", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", metavar="A..B", help="all seeds from A to B")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), default="mixed")
    parser.add_argument("--hours", type=float, help="virtual hours of faults")
    parser.add_argument("--jobs", type=int, default=1, help="processes, for --seeds")
    parser.add_argument("--trace", type=int, default=0, help="lines of the trace to print")
    return parser.parse_args(arguments)


def _range(text: str) -> list[int]:
    first, _, last = text.partition("..")
    return list(range(int(first), int(last) + 1))


def _run_all(seeds: list[int], scenario: str, hours: float | None, jobs: int) -> Iterator[Report]:
    if jobs == 1 or len(seeds) == 1:
        for seed in seeds:
            yield simulate(seed, scenario, hours)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        count = len(seeds)
        yield from pool.map(simulate, seeds, [scenario] * count, [hours] * count)


def format_report(report: Report, trace_lines: int = 0) -> str:
    """Everything a person needs to judge or repeat a run."""
    simulated_s = report.virtual_s
    lines = [
        f"seed {report.seed}, scenario {report.scenario}",
        *report.options,
        "fired: " + (", ".join(f"{kind} {count}" for kind, count in report.fired.items()) or "-"),
        f"restarts {report.restarts}, fragments destroyed {report.fragments_destroyed}, "
        f"excused failures: {report.excused_reads} reads, {report.excused_puts} puts",
        "operations: " + ", ".join(f"{name} {count}" for name, count in report.operations.items()),
        "checks: " + ", ".join(f"{name} {count}" for name, count in report.checks.items()),
        f"{simulated_s:.0f} s simulated in {report.wall_s:.2f} s "
        f"({simulated_s / report.wall_s:.0f} per second), {report.steps} steps",
        f"trace {report.trace_hash}",
        f"verdict: {report.verdict.name.lower()}",
    ]
    failed = report.verdict is not Verdict.PASSED
    if failed:
        lines += [report.finding, f"repeat it with: {report.command}"]
    shown = trace_lines or (TRACE_LINES_ON_FAILURE if failed else 0)
    if shown:
        lines += ["last lines of the trace:", *report.trace_tail[-shown:]]
    return "\n".join(lines)


def _summarise(reports: Iterator[Report]) -> int:
    verdicts: Counter[str] = Counter()
    fired: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    worst = simulated = wall = 0.0
    for report in reports:
        verdicts[report.verdict.name.lower()] += 1
        fired.update({kind.value: count for kind, count in report.fired.items()})
        checks.update(report.checks)
        simulated += report.virtual_s
        wall += report.wall_s
        worst = max(worst, report.verdict.value)
        if report.verdict is not Verdict.PASSED:
            finding = report.finding.strip().splitlines()[-1]
            _print(f"{report.verdict.name.lower()}: {finding}\n    {report.command}")
    _print(", ".join(f"{name} {count}" for name, count in verdicts.items()))
    _print("fired: " + ", ".join(f"{name} {count}" for name, count in sorted(fired.items())))
    _print("checks: " + ", ".join(f"{name} {count}" for name, count in sorted(checks.items())))
    _print(f"{simulated / 3600:.1f} h simulated in {wall:.0f} s of runs")
    return int(worst)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
