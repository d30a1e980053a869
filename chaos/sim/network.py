"""The simulated network: calls between processes with delay, loss, duplicates and partitions.

`Network.call` carries every request of a simulated cell: a gateway's to a node (through
`chaos/sim/port.py`), a node's registration, a client's request to a gateway.  What a caller sees
is what a TCP connection would show it: refused before anything was sent (`NotSent`), or sent and
not answered (`Unanswered`), in which case the work may be done now, later, or never.

A message that meets a partition is held and, by a draw, delivered when the partition heals: TCP
sends again.  So a node may act on a request long after its caller has given up.  May not import
anything of the product but the error tree.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos.sim.loop import SimLoop
from chaos.sim.process import SimProcess
from chaos.sim.trace import Trace
from protocol.errors import HaversackError

HELD_MESSAGES_DELIVERED = 0.5
"""Probability that a message held by a partition arrives after it heals; else it is gone."""

DUPLICATE_DELAY_S_MAX = 30.0
"""How late the second copy of a duplicated request may arrive."""


class NotSent(Exception):
    """Nothing reached the other end: refused, unreachable, or no handshake before the deadline."""


class Unanswered(Exception):
    """The request was sent and no answer came: it may have been carried out."""


@dataclass(frozen=True, slots=True)
class LinkQuality:
    """One direction of one link.  Probabilities are per message, times in seconds."""

    latency_min_s: float = 0.0001
    latency_mean_s: float = 0.0004
    """Mean of the exponential part on top of the minimum."""
    slow: float = 0.0
    slow_s: float = 0.0
    """A share of messages takes up to this much longer."""
    request_loss: float = 0.0
    reply_loss: float = 0.0
    duplicate: float = 0.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What an observer learns when a process has finished with a request."""

    process: SimProcess
    target: object
    method: str
    args: tuple[Any, ...]
    result: Any
    error: BaseException | None


@dataclass(slots=True)
class Listener:
    """One address that one life of a process answers at, by calling methods of `target`."""

    address: str
    process: SimProcess
    target: object
    connections: dict[Connection, None] = field(default_factory=dict)
    open: bool = True


class Connection:
    """What one caller keeps between calls to one address."""

    __slots__ = ("address", "greeting", "idempotent", "listener", "source", "waiting")

    def __init__(
        self,
        source: SimProcess,
        address: str,
        greeting: tuple[Any, ...] = (),
        *,
        idempotent: bool = False,
    ) -> None:
        self.idempotent = idempotent
        """Whether a request may be carried out twice: then duplicates are simulated."""
        self.source = source
        self.address = address
        self.greeting = greeting
        """Passed to the target's `greet` when the connection opens; empty for no handshake."""
        self.listener: Listener | None = None
        self.waiting: dict[asyncio.Future[Any], None] = {}


class _Broken(Exception):
    """The connection was reset while a request was under way."""


class _Refused(Exception):
    """Nobody listens at the address."""


class _Expired(Exception):
    """The deadline passed."""


class Network:
    """All links of one simulated cell.  Endpoints are named by `SimProcess.name`."""

    def __init__(
        self, loop: SimLoop, rng: random.Random, trace: Trace, quality: LinkQuality
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._quality = quality
        self._link_quality: dict[tuple[str, str], LinkQuality] = {}
        self._listeners: dict[str, Listener] = {}
        self._blocked: dict[tuple[str, str], int] = {}
        self._held: list[tuple[tuple[str, str], Callable[[], None]]] = []
        self._context = contextvars.Context()
        self.observer: Callable[[Answered], None] | None = None
        self.fired: dict[str, int] = {}

    # -- who listens ---------------------------------------------------------------------------

    def listen(self, address: str, process: SimProcess, target: object) -> Listener:
        """Answer calls to `address` with the coroutine methods of `target`, run in `process`."""
        assert address not in self._listeners, f"{address} is taken"
        listener = Listener(address, process, target)
        self._listeners[address] = listener
        return listener

    def hang_up(self, process: SimProcess) -> None:
        """`process` ended: its addresses refuse, and callers with open requests are told."""
        gone = [item for item in self._listeners.values() if item.process is process]
        for listener in gone:
            del self._listeners[listener.address]
            listener.open = False
            for connection in listener.connections:
                connection.listener = None
                for answer in connection.waiting:
                    self._pass(process.name, connection.source.name, _breaker(answer))
            listener.connections.clear()

    def disconnect(self, connection: Connection) -> None:
        """The caller closes its end; what is under way fails at once."""
        if connection.listener is not None:
            connection.listener.connections.pop(connection, None)
            connection.listener = None
        for answer in list(connection.waiting):
            _settle(answer, _Broken())

    # -- faults --------------------------------------------------------------------------------

    def set_quality(self, quality: LinkQuality, source: str = "", target: str = "") -> None:
        """Change the quality of all links, or of the one direction named."""
        if source or target:
            self._link_quality[source, target] = quality
        else:
            self._quality = quality
            self._link_quality.clear()

    def block(self, source: str, target: str) -> None:
        """Messages from `source` to `target` no longer arrive.  Nests; `unblock` undoes one."""
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def unblock(self, source: str, target: str) -> None:
        """Undo one `block`; held messages that survive are delivered soon."""
        count = self._blocked.get((source, target), 0)
        if count > 1:
            self._blocked[source, target] = count - 1
            return
        self._blocked.pop((source, target), None)
        held, self._held = self._held, []
        for link, deliver in held:
            if link != (source, target):
                self._held.append((link, deliver))
            elif self._rng.random() < HELD_MESSAGES_DELIVERED:
                self._count("late_message")
                self._later(self._delay(source, target), deliver)

    def unblock_all(self) -> None:
        """Heal every partition."""
        for source, target in list(self._blocked):
            self._blocked[source, target] = 1
            self.unblock(source, target)

    def reachable(self, source: str, target: str) -> bool:
        """No partition in either direction."""
        return (source, target) not in self._blocked and (target, source) not in self._blocked

    # -- calls ---------------------------------------------------------------------------------

    async def call(
        self, connection: Connection, method: str, args: tuple[Any, ...], deadline_s: float
    ) -> Any:
        """Call `method` of whatever listens at the connection's address.

        Raises what the target raised if it is a `HaversackError`, `NotSent` or `Unanswered`.
        """
        answer: asyncio.Future[Any] = self._loop.create_future()
        timer = self._later(max(deadline_s, 0.0), lambda: _settle(answer, _Expired()))
        sent = False
        try:
            if connection.listener is None:
                opened: asyncio.Future[Any] = self._loop.create_future()
                answer.add_done_callback(lambda done: _settle(opened, _Expired()))
                self._dial(connection, opened)
                await opened
            if connection.listener is None:
                raise _Broken  # lost again before this process, stopped perhaps, could use it
            if not answer.done():
                sent = True
                self._send(connection, connection.listener, method, args, answer)
            return await answer
        except (_Expired, _Broken, _Refused) as error:
            what = f"{method} to {connection.address}"
            if sent:
                raise Unanswered(f"{what}: {type(error).__name__[1:].lower()}") from None
            raise NotSent(f"{what}: {type(error).__name__[1:].lower()}") from None
        finally:
            timer.cancel()
            connection.waiting.pop(answer, None)
            if not answer.done():
                answer.cancel()

    def _dial(self, connection: Connection, opened: asyncio.Future[Any]) -> None:
        """Three-way handshake and greeting."""
        source, address = connection.source.name, connection.address
        target = host_of(address)

        def arrive() -> None:
            listener = self._listeners.get(address)
            if listener is None:
                self._pass(target, source, lambda: _settle(opened, _Refused()))
                return

            def accept(error: BaseException | None) -> None:
                if error is not None or not listener.open:
                    self._pass(target, source, lambda: _settle(opened, error or _Refused()))
                    return
                self._pass(target, source, establish)

            def establish() -> None:
                if not listener.open:
                    _settle(opened, _Refused())
                elif not opened.done():
                    connection.listener = listener
                    listener.connections[connection] = None
                    opened.set_result(None)

            if connection.greeting:
                self._serve(listener, "greet", connection.greeting, lambda _, e: accept(e))
            else:
                accept(None)

        self._pass(source, host_of(address), arrive)

    def _send(
        self,
        connection: Connection,
        listener: Listener,
        method: str,
        args: tuple[Any, ...],
        answer: asyncio.Future[Any],
    ) -> None:
        source, target = connection.source.name, listener.process.name
        quality = self._quality_of(source, target)
        connection.waiting[answer] = None

        def finished(result: Any, error: BaseException | None) -> None:
            if self._rng.random() < quality.reply_loss:
                self._count("reply_lost")
                self._trace.record(target, "reply-lost", method)
                return
            self._pass(target, source, lambda: _settle(answer, error, result))

        def arrive() -> None:
            if listener.open:
                self._serve(listener, method, args, finished)

        if self._rng.random() < quality.request_loss:
            self._count("request_lost")
            self._trace.record(source, "request-lost", f"{method} {target}")
            return
        self._pass(source, target, arrive)
        if connection.idempotent and self._rng.random() < quality.duplicate:
            self._count("duplicate")
            self._later(self._rng.uniform(0, DUPLICATE_DELAY_S_MAX), arrive)

    def _serve(
        self,
        listener: Listener,
        method: str,
        args: tuple[Any, ...],
        finished: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Run one request in the listener's process.  The observer is told in the same step in
        which the answer is made: nothing else happens in between."""

        async def carry_out() -> None:
            result: Any = None
            failure: HaversackError | None = None
            try:
                result = await getattr(listener.target, method)(*args)
            except HaversackError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - a bug of the product ends the run
                if listener.process.alive:  # else it is how a fault ended a dead process's code
                    self._loop.fail(error)
                return
            outcome = "ok" if failure is None else failure.kind
            self._trace.record(listener.process.name, method, outcome)
            if self.observer is not None:
                answered = Answered(
                    listener.process, listener.target, method, args, result, failure
                )
                self.observer(answered)
            finished(result, failure)

        listener.process.spawn(carry_out(), method)

    # -- messages ------------------------------------------------------------------------------

    def _pass(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """Carry one message."""

        def arrive() -> None:
            if (source, target) in self._blocked:
                self._count("held")
                self._held.append(((source, target), deliver))
            else:
                deliver()

        self._later(self._delay(source, target), arrive)

    def _delay(self, source: str, target: str) -> float:
        quality = self._quality_of(source, target)
        delay = quality.latency_min_s + self._rng.expovariate(1.0) * quality.latency_mean_s
        if quality.slow and self._rng.random() < quality.slow:
            self._count("slow_message")
            delay += self._rng.random() * quality.slow_s
        return delay

    def _quality_of(self, source: str, target: str) -> LinkQuality:
        return self._link_quality.get((source, target), self._quality)

    def _later(self, delay: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        """Outside every process: the network does not stop when a process does."""
        return self._loop.call_later(delay, action, context=self._context)

    def _count(self, fault: str) -> None:
        self.fired[fault] = self.fired.get(fault, 0) + 1


def host_of(address: str) -> str:
    """The process name in an address like `node-03:7001`."""
    return address.partition(":")[0]


def _breaker(answer: asyncio.Future[Any]) -> Callable[[], None]:
    return lambda: _settle(answer, _Broken())


def _settle(answer: asyncio.Future[Any], error: BaseException | None, result: Any = None) -> None:
    """Complete a future that may be complete already.  Errors cross the wire as copies."""
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
        return
    if isinstance(error, HaversackError):
        rebuild, parts = error.__reduce__()
        error = rebuild(*parts)
    answer.set_exception(error)
    answer._log_traceback = False  # who waited may be dead by now
