"""CPU and memory of a tree of processes: what the cell as a whole costs."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Memory:
    """Sums over processes, in bytes: private (USS) and proportional (PSS)."""

    processes: int
    uss: int
    pss: int


def tree(pid: int) -> list[psutil.Process]:
    """The process and everything below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time of the tree so far, with that of ended children that were waited for.

    Ray's raylet waits for none: between two calls the death of an actor takes its time away.
    """
    total = 0.0
    for process in tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += sum(times[:4])  # user, system, and both of ended children
    return total


def memory(pid: int) -> Memory:
    """Memory of the tree now."""
    count = uss = pss = 0
    for process in tree(pid):
        try:
            info = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        count += 1
        uss += info.uss
        pss += info.pss
    return Memory(count, uss, pss)


def reset_peak(pid: int) -> None:
    """Make `peak_bytes` start from now."""
    with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as file:
        file.write("5\n")


def peak_bytes(pid: int) -> int:
    """Largest resident size of one process since `reset_peak`."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmHWM line")
