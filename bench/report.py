"""What a run of the bench found: targets, the table for people, the file that is committed."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.measures import Figure

RESULTS = Path(__file__).parent / "results"

PEERS = """\
Other stores, each measured in another run on the same kind of machine, fsync on, 8 clients: an
orientation, not a race.  OpenStack Swift 2.38, EC 6+3: PUT 67 MB/s, GET 176, degraded GET 166,
1 KiB PUT 21/s, 1 KiB GET 75/s.  SeaweedFS 4.48, three copies: PUT 61 MB/s, GET 460, 1 KiB PUT
402/s, 1 KiB GET 2,053/s; from its 10+4 shards GET 328, degraded 171 MB/s."""


class Target(msgspec.Struct, frozen=True):
    """One row of the table of what must be reached."""

    measure: str
    value: float
    unit: str
    bound: float
    at_least: bool
    basis: str

    @property
    def reached(self) -> bool:
        """Whether the value is on the right side of its bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Report(msgspec.Struct, frozen=True):
    """A whole run."""

    when: str
    machine: str
    figures: list[Figure]
    targets: list[Target]


def machine() -> str:
    """What the run was made on, without naming it."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}"
    )


def now() -> str:
    """UTC date and minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def show(report: Report) -> None:
    """Print every figure, then the targets, then the orientation."""
    console = Console(width=118)
    table = Table(title=f"Figures ({report.machine}, {report.when})")
    for column in ("measure", "clients", "MB/s", "op/s", "p50 ms", "p99 ms", "CPU ms/op"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for figure in report.figures:
        table.add_row(
            figure.name,
            str(figure.clients),
            f"{figure.mb_s:.1f}",
            f"{figure.operations_s:,.0f}",
            f"{figure.p50_ms:.2f}",
            f"{figure.p99_ms:.2f}",
            f"{figure.cpu_ms:.3f}",
        )
    console.print(table)
    goals = Table(title="Targets")
    for column in ("measure", "got", "must be", "", "basis"):
        goals.add_column(column)
    for target in report.targets:
        goals.add_row(
            target.measure,
            f"{target.value:,.3g} {target.unit}",
            f"{'>=' if target.at_least else '<='} {target.bound:,.3g} {target.unit}",
            "reached" if target.reached else "[bold red]MISSED[/]",
            target.basis,
        )
    console.print(goals)
    console.print(PEERS)


def save(report: Report) -> Path:
    """Write the run under `bench/results/`, named by its time."""
    RESULTS.mkdir(exist_ok=True)
    stamp = report.when.replace(" UTC", "").replace(" ", "T").replace(":", "")
    path = RESULTS / f"{stamp}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return path
