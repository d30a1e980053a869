"""`python -m bench` (`make bench`): the data path against limits taken in the same run.

Order: limits, a fresh cell, PUT, GET, small blocks, check, memory, idle, limits again, restart,
three of nine nodes destroyed, degraded GET beside healthy GET.  Takes some four minutes.
"""

from __future__ import annotations

import argparse
import os
import sys

from bench import processes, report
from bench.measures import (
    PUT_BLOCKS,
    SMALL,
    Bench,
    Figure,
    idle_cpu_share,
    measure_h,
    measure_limits,
    settle,
)
from bench.report import Report, Target
from chaos.live.cell import LiveCell
from protocol.limits import BATCH_BLOCKS_MAX, BLOCK_BYTES_MAX, MIB

IDLE_S = 20.0
SMALL_PUTS = 6_000
BATCH = 1_000
BATCHED = 40_000
CHECKS = 40
GET_ROUNDS = 4
STARTS = 5


class Run:
    """One run: figures and targets as they come."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.targets: list[Target] = []

    def note(self, figure: Figure) -> Figure:
        """Keep a figure and say that it is done."""
        self.figures.append(figure)
        print(f"{figure.name:44} {figure.clients:3} clients {figure.mb_s:9.1f} MB/s", flush=True)
        return figure

    def need(self, measure: str, value: float, unit: str, bound: float, basis: str = "") -> None:
        """A value that must be at least `bound`."""
        self.targets.append(Target(measure, value, unit, bound, True, basis))

    def allow(self, measure: str, value: float, unit: str, bound: float, basis: str = "") -> None:
        """A value that must be at most `bound`."""
        self.targets.append(Target(measure, value, unit, bound, False, basis))

    def limits(self) -> dict[str, Figure]:
        """P and H with one client and with eight; returns those with eight."""
        for figure in measure_limits(1).values():
            self.note(figure)
        eight = measure_limits(8)
        for figure in eight.values():
            self.note(figure)
        return eight

    def blocks(self, bench: Bench, gateway_pid: int) -> tuple[Figure, Figure, int]:
        """PUT and GET of 4 MiB; returns the figures with eight clients and the first block."""
        size = BLOCK_BYTES_MAX
        first, figure = bench.write("PUT 4 MiB, durable", "put", 1, PUT_BLOCKS // 2, size)
        self.note(figure)
        processes.reset_peak(gateway_pid)
        first, put = bench.write("PUT 4 MiB, durable", "put", 8, PUT_BLOCKS, size)
        self.note(put)
        peak = processes.peak_bytes(gateway_pid) / MIB
        self.allow("gateway's peak memory, 8 parallel PUTs", peak, "MiB", 300, "VmHWM")
        self.note(bench.read("GET 4 MiB", "get", 1, first, PUT_BLOCKS, size))
        return put, self.note(bench.read("GET 4 MiB", "get", 8, first, PUT_BLOCKS, size)), first

    def small(self, bench: Bench) -> None:
        """1 KiB blocks, one by one and in batches; check."""
        first, figure = bench.write("PUT 1 KiB one by one", "put", 64, SMALL_PUTS, SMALL)
        self.note(figure)
        self.need("PUT 1 KiB one by one, 64 clients", figure.operations_s, "/s", 1_000)
        figure = self.note(bench.read("GET 1 KiB one by one", "get", 64, first, SMALL_PUTS, SMALL))
        self.need("GET 1 KiB one by one, 64 clients", figure.operations_s, "/s", 2_053, "peer")
        name = f"PUT 1 KiB, batches of {BATCH:,}"
        first, figure = bench.write(name, "batch", 8, BATCHED, SMALL, BATCH)
        self.note(figure)
        self.need("PUT 1 KiB through /v1/blocks/batch", figure.operations_s, "/s", 8_000)
        name = f"fetch 1 KiB, batches of {BATCH:,}"
        self.note(bench.read(name, "fetch", 8, first, BATCHED, SMALL, BATCH))
        count = BATCHED - BATCHED % BATCH_BLOCKS_MAX
        name = f"check of {BATCH_BLOCKS_MAX:,} hashes"
        rounds = [
            bench.read(name, "check", 1, first, count, SMALL, BATCH_BLOCKS_MAX)
            for _ in range(CHECKS * BATCH_BLOCKS_MAX // count)
        ]
        self.note(rounds[-1])
        p50 = sorted(figure.p50_ms for figure in rounds)[len(rounds) // 2]
        self.allow(f"{name}, p50", p50, "ms", 25)

    def idle(self, cell: LiveCell) -> None:
        """Memory and CPU of a cell that nobody uses."""
        settled_s = settle(cell.pid)
        share = idle_cpu_share(cell.pid, IDLE_S)
        used = processes.memory(cell.pid)
        basis = f"{used.processes} processes, PSS {used.pss / 1e9:.2f} GB"
        self.allow("idle cell, USS of all processes", used.uss / 1e9, "GB", 1.0, basis)
        basis = f"over {IDLE_S:.0f} s, {settled_s:.0f} s after it was ready"
        self.allow("idle cell, CPU", share * 100, "% of a core", 10, basis)

    def get(self, cell: LiveCell, bench: Bench) -> None:
        """GET of 4 MiB beside H, several times in turn; then with nodes gone."""
        size = BLOCK_BYTES_MAX
        first, put = bench.write("PUT 4 MiB, durable", "put", 8, PUT_BLOCKS, size)
        self.note(put)
        for _ in range(GET_ROUNDS):
            h = self.note(measure_h(8)).mb_s
            got = self.note(bench.read("GET 4 MiB", "get", 8, first, PUT_BLOCKS, size))
            self.need("GET 4 MiB, 8 clients", got.mb_s / h, "H", 0.2, f"{got.cpu_ms:.1f} ms CPU")
        self.degraded(cell, bench, first)

    def start(self, cell: LiveCell) -> None:
        """`up` on an existing directory, several times, with the CPU until `ready`."""
        for _ in range(STARTS):
            cell.stop()
            self.restart(cell)

    def restart(self, cell: LiveCell) -> None:
        """`up` on the directory of a cell that was stopped."""
        seconds = cell.start()
        basis = f"{processes.cpu_seconds(cell.pid):.1f} s of CPU"
        self.allow("up to ready on an existing directory", seconds, "s", 10, basis)

    def degraded(self, cell: LiveCell, bench: Bench, first: int) -> None:
        """GET of 4 MiB with three of nine nodes destroyed, beside GET with all of them."""
        size = BLOCK_BYTES_MAX
        healthy = self.note(bench.read("GET 4 MiB, healthy", "get", 8, first, PUT_BLOCKS, size))
        lost = cell.destroy_nodes(3)
        name = f"GET 4 MiB, {len(lost)} of 9 nodes gone"
        degraded = self.note(bench.read(name, "get", 8, first, PUT_BLOCKS, size))
        basis = f"{degraded.mb_s:.0f} / {healthy.mb_s:.0f} MB/s"
        ratio = degraded.mb_s / healthy.mb_s
        self.need("GET 4 MiB, 3 of 9 nodes gone", ratio, "healthy", 0.6, basis)

    def everything(self, cell: LiveCell, bench: Bench) -> None:
        """All measures, in the order of the module's docstring."""
        self.idle(cell)
        before = self.limits()
        put, get, first = self.blocks(bench, cell.gateway_pid)
        after = self.limits()
        p = (before["P"].mb_s + after["P"].mb_s) / 2
        h = (before["H"].mb_s + after["H"].mb_s) / 2
        self.need("PUT 4 MiB, 8 clients", put.mb_s / p, "P", 0.35, f"{put.mb_s:.0f} / {p:.0f} MB/s")
        self.need("GET 4 MiB, 8 clients", get.mb_s / h, "H", 0.2, f"{get.mb_s:.0f} / {h:.0f} MB/s")
        self.small(bench)
        cell.stop()
        self.restart(cell)
        self.degraded(cell, bench, first)


def main() -> int:
    """Run everything; exit code 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/")
    parts = ("idle", "get", "small", "start")
    parser.add_argument("--only", choices=parts, help="one part, not to be kept")
    arguments = parser.parse_args()
    if arguments.save and arguments.only:
        parser.error("only a whole run is kept: without --only")
    run = Run()
    with LiveCell() as cell:
        print(f"a new cell was ready after {cell.start():.1f} s", flush=True)
        bench = Bench(cell, int.from_bytes(os.urandom(4)))
        match arguments.only:
            case "idle":
                run.idle(cell)
            case "get":
                run.get(cell, bench)
            case "start":
                run.start(cell)
            case "small":
                run.small(bench)
            case _:
                run.everything(cell, bench)
    result = Report(report.now(), report.machine(), run.figures, run.targets)
    report.show(result)
    if arguments.save:
        print(f"kept in {report.save(result)}")
    return 0 if all(target.reached for target in run.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
