"""What the connections of one gateway share: the read buffer, the clock's hand, the count.

uvicorn calls the listener as its protocol class, once per accepted socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.server import ServerState

from api.http_connection import HttpConnection
from api.http_exchange import Exchange
from protocol.clock import Clock, SystemClock
from protocol.errors import HaversackError
from protocol.limits import KIB

READ_BUFFER_BYTES: Final = 256 * KIB
"""Most bytes taken from a socket at once, while no body is received directly."""

CHECK_S: Final = 1.0
"""How often connections are looked at for patience that has run out."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long peers may take; see `protocol.config` for the meaning of each."""

    header_s: float = 15.0
    keep_alive_s: float = 75.0
    transfer_grace_s: float = 15.0
    transfer_rate_min: int = 8 * KIB
    linger_s: float = 5.0
    connections_max: int = 4096


class Listener:
    """Factory and registry of connections.  One per uvicorn server, one event loop."""

    def __init__(
        self,
        patience: Patience,
        *,
        on_refused: Callable[[HaversackError], None] = lambda error: None,
        check_s: float = CHECK_S,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self.patience = patience
        self.refused = on_refused
        self.read_buffer = memoryview(bytearray(READ_BUFFER_BYTES))
        """Shared: its bytes are consumed before the loop reads from another socket."""
        self._check_s = check_s
        self._app: Callable[..., Any] | None = None
        self._state = ServerState()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._checking = False
        self._date = b""
        self._date_until = 0.0

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> HttpConnection:
        """uvicorn: a protocol for a new socket."""
        self._app = config.loaded_app
        self._state = server_state
        self._loop = _loop or asyncio.get_running_loop()
        return HttpConnection(self, self._loop)

    def opened(self, connection: HttpConnection) -> bool:
        """Register; False if there are too many."""
        connections: set[Any] = self._state.connections
        if len(connections) >= self.patience.connections_max:
            return False
        connections.add(connection)
        if not self._checking:
            self._checking = True
            self._schedule()
        return True

    def closed(self, connection: HttpConnection) -> None:
        """Forget a connection."""
        connections: set[Any] = self._state.connections
        connections.discard(connection)

    def start(self, exchange: Exchange) -> None:
        """Run the application for a request, in a task that uvicorn waits for when it stops."""
        assert self._loop is not None, "a request before the first connection"
        assert self._app is not None, "a request before the first connection"
        task = self._loop.create_task(exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def count_request(self) -> None:
        """uvicorn's own total."""
        self._state.total_requests += 1

    def date_line(self) -> bytes:
        """`date: ...` with its line end, made once a second."""
        assert self._loop is not None, "an answer before the first connection"
        now = self._loop.time()
        if now >= self._date_until:
            self._date = b"date: %s\r\n" % formatdate(self._clock.wall(), usegmt=True).encode(
                "ascii"
            )
            self._date_until = now + 1.0
        return self._date

    def _schedule(self) -> None:
        assert self._loop is not None, "scheduled by the first connection"
        self._loop.call_later(self._check_s, self._check)

    def _check(self) -> None:
        connections: list[Any] = list(self._state.connections)
        if not connections:
            self._checking = False
            return
        assert self._loop is not None, "scheduled by the first connection"
        now = self._loop.time()
        for connection in connections:
            connection.check(now)
        self._schedule()
