"""The processes of a cell in the foreground: start, watch, restart, stop in order.

Used by `haversack up` only.  This process is the ancestor of everything: it is their subreaper,
so that a raylet that dies is reaped (a zombie would keep its actors alive), and whatever a child
leaves behind becomes ours and is ended before the child starts again.  It imports nothing of the
cell and stays small.

State of a child:

    STOPPED --start--> RUNNING --exits--> WAITING (back-off) --delay over--> RUNNING
                          |                   |
                          +----- stop --------+--> STOPPED
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

RESTART_DELAY_S_MIN = 0.2
RESTART_DELAY_S_MAX = 15.0
STABLE_S = 30.0
"""A child that ran this long starts again without delay."""

ORPHANS_S = 5.0
"""For what an ended child leaves behind to die of SIGKILL: a disk may hold a process that long."""


class ChildState(enum.Enum):
    STOPPED = "stopped"
    RUNNING = "running"
    WAITING = "waiting"


@dataclass(slots=True)
class Child:
    """One process that should be running.  `death_signal` is what it gets if we are killed."""

    name: str
    argv: Sequence[str]
    log_path: Path
    environment: dict[str, str]
    death_signal: signal.Signals
    stop_s: float
    state: ChildState = ChildState.STOPPED
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    due_at: float = 0.0
    delay_s: float = RESTART_DELAY_S_MIN
    restarts: int = 0

    def start(self) -> None:
        """Spawn it with its output appended to its log."""
        assert self.state is not ChildState.RUNNING
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                preexec_fn=self._before_exec,  # noqa: PLW1509 - this process has one thread
            )
        self.state = ChildState.RUNNING
        self.started_at = time.monotonic()

    def _before_exec(self) -> None:
        """Own process group (a terminal's Ctrl-C is ours to pass on), default signal mask."""
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(self.death_signal), 0, 0, 0)

    def exited(self, now: float) -> None:
        """It ended without being asked: plan the restart."""
        assert self.state is ChildState.RUNNING
        self.process = None
        if now - self.started_at >= STABLE_S:
            self.delay_s = RESTART_DELAY_S_MIN
        self.due_at = now + self.delay_s
        self.delay_s = min(self.delay_s * 2, RESTART_DELAY_S_MAX)
        self.restarts += 1
        self.state = ChildState.WAITING

    def stop(self) -> bool:
        """SIGTERM, wait `stop_s`, SIGKILL.  True if it ended by itself."""
        process, self.state = self.process, ChildState.STOPPED
        self.process = None
        if process is None:
            return True
        process.terminate()
        try:
            process.wait(self.stop_s)
            ended = True
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = False
        return ended


def become_subreaper() -> None:
    """Orphans below us are ours to reap, not init's."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _adopted(children: Sequence[Child]) -> list[psutil.Process]:
    """Processes that became ours when their parents ended; children proper are left to `Popen`."""
    ours = {child.process.pid for child in children if child.process is not None}
    return [process for process in psutil.Process().children() if process.pid not in ours]


def reap_orphans(children: Sequence[Child]) -> None:
    """Collect adopted processes that have ended."""
    for process in _adopted(children):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue


def end_orphans(children: Sequence[Child]) -> None:
    """SIGKILL and collect what ended children left behind, for `ORPHANS_S` at most.

    Whoever ends hands its children to us, so generation after generation appears here.  A list
    made while they still ran would be old: a Ray that it misses serves on beside its successor.
    """
    give_up_at = time.monotonic() + ORPHANS_S
    while orphans := _adopted(children):
        left_s = give_up_at - time.monotonic()
        if left_s <= 0:
            return
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(orphans, timeout=left_s)


def watch(children: Sequence[Child]) -> list[Child]:
    """One pass: note exits, restart what is due.  Returns the children that exited just now."""
    now = time.monotonic()
    exited: list[Child] = []
    for child in children:
        if child.process is not None and child.process.poll() is not None:
            child.exited(now)
            exited.append(child)
        elif child.state is ChildState.WAITING and now >= child.due_at:
            child.start()
    if exited:
        end_orphans(children)
    else:
        reap_orphans(children)
    return exited
