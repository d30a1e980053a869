"""Simulated processes: what SIGKILL, SIGSTOP and SIGCONT do to tasks of one event loop.

Every task and every callback runs in a `contextvars` context, and a task created by a process
inherits that process's context.  So the loop knows whose callback it is about to run, and asks
the process first.  A killed process is *frozen for ever*: no `finally`, no `except
CancelledError`, nothing of it runs again, exactly as after SIGKILL.  (Cancelling its tasks would
run their clean-up code, which no dying process runs.)  Created by `chaos/sim/world.py`; may not
import anything of the product.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from chaos.sim.loop import SimLoop

T = TypeVar("T")


class ProcessState(enum.Enum):
    """RUNNING <-> PAUSED; both -> DEAD, which is final: a restart is a new `SimProcess`."""

    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


class ProcessDied(Exception):
    """The process that was asked died before it answered: what it did is unknown."""


class SimProcess:
    """One life of one process.  `name` is the role it plays (`node-03`), the same in each life."""

    __slots__ = (
        "_backlog",
        "_context",
        "_fuse",
        "_loop",
        "_on_fuse",
        "_waiting",
        "hindered",
        "name",
        "state",
    )

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.name = name
        self.state = ProcessState.RUNNING
        self.hindered = False
        """Whether the loop must ask `admit`."""
        self._loop = loop
        self._backlog: list[asyncio.Handle] = []
        self._waiting: dict[asyncio.Future[Any], None] = {}
        self._fuse: int | None = None
        self._on_fuse: Callable[[], None] | None = None
        self._context = contextvars.copy_context()
        self._context.run(CURRENT.set, self)

    def __repr__(self) -> str:
        return f"SimProcess({self.name}, {self.state.value})"

    @property
    def alive(self) -> bool:
        """Not killed; a paused process is alive."""
        return self.state is not ProcessState.DEAD

    def _note(self) -> None:
        self.hindered = self.state is not ProcessState.RUNNING or self._fuse is not None

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task of this process.  A task started in a dead process never takes a step."""
        return self._loop.create_task(
            coroutine, name=f"{self.name}/{name}", context=self._context.copy()
        )

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` now, as this process: what it schedules belongs to the process."""
        assert self.state is ProcessState.RUNNING
        return self._context.copy().run(function, *args)

    async def ask(self, coroutine: Coroutine[Any, Any, T], name: str) -> T:
        """Run `coroutine` in this process and wait for it from outside.

        Raises `ProcessDied` as soon as the process is killed: what a client sees of a server whose
        connections were reset.  A caller that gives up does not stop the work.
        """
        answer: asyncio.Future[T] = self._loop.create_future()
        if not self.alive:
            coroutine.close()
            raise ProcessDied(f"{self.name} is not running")
        self._waiting[answer] = None

        def deliver(done: asyncio.Task[T]) -> None:
            self._waiting.pop(answer, None)
            error = None if done.cancelled() else done.exception()
            if answer.done():
                return  # the caller gave up
            if done.cancelled():
                answer.set_exception(ProcessDied(f"{name} was cancelled inside {self.name}"))
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())

        self.spawn(coroutine, name).add_done_callback(deliver)
        return await answer

    def pause(self) -> None:
        """SIGSTOP: callbacks that become ready are kept; timers go on, as time does."""
        if self.state is ProcessState.RUNNING:
            self.state = ProcessState.PAUSED
            self._note()

    def resume(self) -> None:
        """SIGCONT: everything that became ready meanwhile runs now, in that order."""
        if self.state is ProcessState.PAUSED:
            self.state = ProcessState.RUNNING
            self._note()
            self._loop.requeue(self._backlog)
            self._backlog = []

    def kill(self) -> None:
        """SIGKILL: from now on nothing of this process runs, and who waits for it learns so."""
        if self.state is ProcessState.DEAD:
            return
        self.state = ProcessState.DEAD
        self._fuse = self._on_fuse = None
        self._note()
        self._backlog = []
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(ProcessDied(f"{self.name} was killed"))
        self._waiting = {}

    def light_fuse(self, steps: int, burnt: Callable[[], None]) -> None:
        """Call `burnt` before the callback of this process that comes after `steps` more.

        This is how a process is killed at any await: the fuse counts scheduling points, also those
        that take no time.
        """
        assert steps >= 0
        self._fuse, self._on_fuse = steps, burnt
        self._note()

    def defuse(self) -> None:
        """Take back `light_fuse`."""
        self._fuse = self._on_fuse = None
        self._note()

    def admit(self, handle: asyncio.Handle) -> bool:
        """Asked by the loop before each callback of this process; False keeps it from running."""
        if self.state is ProcessState.DEAD:
            return False
        if self.state is ProcessState.PAUSED:
            self._backlog.append(handle)
            return False
        if self._fuse is not None:
            self._fuse -= 1
            if self._fuse < 0:
                burnt, self._fuse, self._on_fuse = self._on_fuse, None, None
                self._note()
                assert burnt is not None
                burnt()
                return self.state is ProcessState.RUNNING
        return True


CURRENT: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar(
    "haversack_sim_process", default=None
)
"""The process that a callback belongs to; None for the simulation itself."""


def process_of(context: contextvars.Context) -> SimProcess | None:
    """The process that a context belongs to; None for the simulation itself."""
    return context.get(CURRENT)


def current_process() -> SimProcess | None:
    """The process that is running now; None for the simulation itself."""
    return CURRENT.get()
