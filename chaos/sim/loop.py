"""A virtual-time asyncio event loop: a simulated day takes seconds and repeats exactly.

When nothing is ready, time jumps to the next timer.  No sockets, no threads.  With a shuffle
generator the order of callbacks that are ready together is drawn, which explores schedules; the
same generator state gives the same schedule.  Used by `chaos/sim/world.py` and unit tests of the
simulation; may not import anything of the product.

Tasks and futures hash by order of creation and not by address, so that a `set` of them is walked
in the same order in every run.  The loop keeps a strong reference to each unfinished task: asyncio
does not, and when the collector finds one would differ from run to run.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from chaos.sim.process import CURRENT, current_process, process_of

T = TypeVar("T")

STEPS_WITHOUT_REST_MAX = 200_000
"""Callbacks, one causing the next without ever waiting for a timer, that count as a livelock."""

_CANCELLED_TIMERS_MIN = 128
"""Cancelled timers that are left in the heap before it is cleaned."""

_TASKS_BETWEEN_SWEEPS = 4_096
"""New tasks between two removals of finished ones from the registry."""

_CLOSE_ATTEMPTS = 100
"""How often a coroutine may await inside its clean-up before we stop closing it."""


class SimulationStuck(Exception):
    """The simulation cannot make progress: a liveness failure, never a correct outcome."""


class Deadlock(SimulationStuck):
    """Nothing is ready and no timer is set; the message names the tasks that wait."""


class Livelock(SimulationStuck):
    """Callbacks run and time does not advance."""


class LimitReached(SimulationStuck):
    """More steps or more virtual time than the run allows."""


class NotSimulated(RuntimeError):
    """Code under simulation asked for a thread or a socket."""


class SimTask(asyncio.Task[T]):
    """A task that hashes by its number."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T],
        loop: SimLoop,
        number: int,
        name: str,
        context: contextvars.Context | None,
    ) -> None:
        self._number = number
        self.process = current_process() if context is None else process_of(context)
        super().__init__(coroutine, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimFuture(asyncio.Future[T]):
    """A future that hashes by the order in which futures were first hashed."""

    _number: int | None = None

    def __hash__(self) -> int:
        if self._number is None:
            loop = self.get_loop()
            assert isinstance(loop, SimLoop)
            self._number = loop.next_number()
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class _SimHandle(asyncio.Handle):
    """A handle without asyncio's debug mode: a run makes hundreds of thousands."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: SimLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class _SimTimer(asyncio.TimerHandle):
    """The same for timers."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: SimLoop,
        context: contextvars.Context | None,
    ) -> None:
        _SimHandle.__init__(self, callback, args, loop, context)  # type: ignore[arg-type]
        self._when = when
        self._scheduled = True


class SimLoop(asyncio.BaseEventLoop):
    """See the module's docstring.

    `start` is the first value of `time()`, in seconds; each callback takes `step_s` of virtual
    time.  It should be zero where a test wants exact instants, and not where code waits for the
    rest of an interval: without it, a rest below the resolution of a float never passes.
    """

    def __init__(
        self,
        *,
        shuffle: random.Random | None = None,
        start: float = 1_000.0,
        step_s: float = 0.0,
        steps_max: float = math.inf,
        seconds_max: float = math.inf,
        inline_executor: bool = False,
    ) -> None:
        super().__init__()
        self._now = start
        self._shuffle = shuffle
        self._steps_max = steps_max
        self._time_max = start + seconds_max
        self._step_s = step_s
        self._inline_executor = inline_executor
        self._queue: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._cancelled_timers = 0
        self._numbers = 0
        self._unfinished: list[SimTask[Any]] = []
        self._failed: list[SimTask[Any]] = []
        self._created_since_sweep = 0
        self._steps_without_rest = 0
        self._burying = False
        self._failure: BaseException | None = None
        self.steps = 0

    # -- time and scheduling -------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def next_number(self) -> int:
        """A number no other object of this loop has."""
        self._numbers += 1
        return self._numbers

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = _SimHandle(callback, args, self, context)
        if not self._burying:
            self._queue.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = _SimTimer(when, callback, args, self, context)
        if not self._burying:
            heapq.heappush(self._timers, (when, self.next_number(), timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Called by `TimerHandle.cancel`."""
        self._cancelled_timers += 1
        if self._cancelled_timers > max(_CANCELLED_TIMERS_MIN, len(self._timers) // 2):
            self._timers = [item for item in self._timers if not item[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled_timers = 0

    def requeue(self, handles: Iterable[asyncio.Handle]) -> None:
        """Make callbacks ready that a paused process held back."""
        self._queue.extend(handles)

    def fail(self, error: BaseException) -> None:
        """End the run with `error` after the callback that runs now; the first call wins."""
        if self._failure is None:
            self._failure = error

    def _run_once(self) -> None:
        """One round: advance time if nothing is ready, then run what is ready."""
        if not self._queue:
            self._advance()
        batch, self._queue = self._queue, []
        if self._shuffle is not None and len(batch) > 1:
            self._shuffle.shuffle(batch)
        for handle in batch:
            if handle._cancelled:
                continue
            process = handle._context.get(CURRENT)  # type: ignore[attr-defined]
            if process is not None and process.hindered and not process.admit(handle):
                continue
            self.steps += 1
            handle._run()
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
        self._steps_without_rest += len(batch)
        if self._steps_without_rest > STEPS_WITHOUT_REST_MAX:
            raise Livelock(
                f"{self._steps_without_rest} callbacks until {self._now:.6f} s without progress: "
                + self.describe_waiting()
            )
        if self._step_s:
            self._now += self._step_s * len(batch)
            self._collect_due()
        if self.steps > self._steps_max:
            raise LimitReached(f"more than {self._steps_max} steps, at {self._now:.3f} s")

    def _advance(self) -> None:
        """Jump to the next timer."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._cancelled_timers -= 1
        if not timers:
            raise Deadlock("nothing is ready and no timer is set: " + self.describe_waiting())
        when = timers[0][0]
        if when > self._now:
            self._now = when
            self._steps_without_rest = 0
        if self._now > self._time_max:
            raise LimitReached(f"more virtual time than {self._time_max:.3f} s")
        self._collect_due()

    def _collect_due(self) -> None:
        """Make the timers of this instant ready."""
        timers = self._timers
        while timers and timers[0][0] <= self._now:
            timer = heapq.heappop(timers)[2]
            if timer.cancelled():
                self._cancelled_timers -= 1
            else:
                self._queue.append(timer)

    # -- tasks ---------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        return SimFuture(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        self._created_since_sweep += 1
        if self._created_since_sweep > _TASKS_BETWEEN_SWEEPS:
            self._created_since_sweep = 0
            self._sweep()
        number = self.next_number()
        task = SimTask(coro, self, number, name or f"task-{number}", context)
        self._unfinished.append(task)
        return task

    def unfinished_tasks(self) -> list[SimTask[Any]]:
        """Tasks that are not done, in order of creation, those of dead processes included."""
        self._sweep()
        return list(self._unfinished)

    def unnoticed_failures(self) -> list[SimTask[Any]]:
        """Tasks that ended with an exception which nobody has looked at."""
        self._sweep()
        return list(self._failed)

    def _sweep(self) -> None:
        failed = [task for task in self._unfinished if task.done() and task._log_traceback]
        self._failed = [task for task in self._failed + failed if task._log_traceback]
        self._unfinished = [task for task in self._unfinished if not task.done()]

    def describe_waiting(self) -> str:
        """Names of unfinished tasks of living processes and the line each waits at."""
        waiting = []
        for task in self.unfinished_tasks():
            if task.process is not None and not task.process.alive:
                continue
            frames = task.get_stack(limit=1)
            place = ""
            if frames:
                place = f" at {frames[0].f_code.co_filename}:{frames[0].f_lineno}"
            waiting.append(task.get_name() + place)
        shown = ", ".join(waiting[:20])
        return f"{len(waiting)} tasks wait: {shown}" + (", …" if len(waiting) > 20 else "")

    # -- what a simulation has not -------------------------------------------------------------

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        raise NotSimulated("call_soon_threadsafe: there are no other threads in a simulation")

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Raise, or run `func` here and now if the loop was created with `inline_executor`."""
        if not self._inline_executor:
            raise NotSimulated("run_in_executor: pass an inline `run` to code under simulation")
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits, as an executor does
            future.set_exception(error)
        return future

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        if not self.is_closed() and not self._burying:
            self.call_soon(self.create_task, agen.aclose())

    def _write_to_self(self) -> None:
        """Nothing sleeps in a selector."""

    # -- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the coroutines that never finished, so that nothing runs after the simulation."""
        if self.is_closed():
            return
        self._burying = True
        for task in self.unfinished_tasks():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _close_coroutine(task.get_coro())
        self._queue.clear()
        self._timers.clear()
        self._unfinished.clear()
        for task in self._failed:
            task._log_traceback = False
        self._failed.clear()
        super().close()


def _close_coroutine(coroutine: Any) -> None:
    """Unwind one suspended coroutine; its clean-up runs after the end of that world."""
    for _ in range(_CLOSE_ATTEMPTS):
        try:
            coroutine.close()
        except RuntimeError:
            continue  # it awaited in a `finally`: unwind the next level
        except Exception:  # noqa: BLE001, S110 - an error of clean-up code after the end of time
            pass
        return
