"""The gateway process: `python -m api.gateway --data DIR`.

Started and watched by `haversack up`; dies with it.  Walk: settings, memory, log; open the
services; bind; serve; write `DIR/gateway.json` once it serves; on SIGTERM stop accepting, finish
what runs, close.  Writes nothing to standard output.  Needs SQL and the data ports only: the
control plane may be away for as long as it likes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import structlog
import uvicorn
import uvloop

from api.app import create_app
from api.http_listener import Listener, Patience
from api.services import Services, open_services
from api.watcher import WATCH_POLICY, Watcher
from client.api import HaversackClient
from protocol.allocator import (
    release_free_memory,
    reuse_large_buffers,
    share_one_arena,
    trim_free_memory,
)
from protocol.clock import SystemClock
from protocol.config import Settings, load
from protocol.errors import ConfigInvalid, HaversackError
from protocol.logs import open_log

BACKLOG: Final = 1024
OPEN_FILES_WANTED: Final = 16_384
IDLE_S: Final = 15.0
"""Without a request for this long, the memory of the last burst is given back."""

OPEN_FILES_KEPT: Final = 256
"""Descriptors left for databases, logs and storage nodes."""

_PR_SET_PDEATHSIG: Final = 1


class GatewayServer(uvicorn.Server):
    """uvicorn without its signal handling, which ends the process before anything is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `serve`'s."""
        yield


def die_with_parent() -> None:
    """SIGTERM to this process when its parent ends, however that happens (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        return
    parent = os.getppid()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGTERM)


def allow_connections() -> int:
    """Raise the limit of open files as far as it goes; returns connections to take at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(OPEN_FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - OPEN_FILES_KEPT, wanted // 2)


def bind(host: str, port: int) -> socket.socket:
    """A listening address.  Raises `ConfigInvalid` if it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            stack.pop_all()
    except OSError as error:
        raise ConfigInvalid(
            f"cannot listen on {host}:{port}: {error.strerror or error}", {"port": port}
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a client on this machine reaches a socket; wildcards become loopback."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(path: Path, url: str) -> None:
    """Write `gateway.json`, complete or not at all: `haversack up` waits for it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="ascii")
    partial.replace(path)


def withdraw(path: Path) -> None:
    """Remove `gateway.json` if it is ours."""
    try:
        if json.loads(path.read_text(encoding="ascii"))["pid"] == os.getpid():
            path.unlink()
    except (OSError, ValueError, KeyError, TypeError):
        return  # absent, or somebody else's


def patience_of(settings: Settings, connections_max: int) -> Patience:
    """The settings that concern connections."""
    return Patience(
        header_s=settings.header_s,
        keep_alive_s=settings.keep_alive_s,
        transfer_grace_s=settings.transfer_grace_s,
        transfer_rate_min=settings.transfer_rate_min,
        connections_max=connections_max,
    )


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    log = structlog.get_logger()
    clock = SystemClock()
    async with open_services(settings, clock) as services:
        listening = bind(settings.host, settings.port)
        listener = Listener(
            patience_of(settings, allow_connections()),
            on_refused=services.metrics.http.refused,
            clock=clock,
        )
        server = GatewayServer(
            uvicorn.Config(
                create_app(services),
                http=cast(Any, listener),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=max(1, int(settings.drain_s)),
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _stop, server)
        running = loop.create_task(server.serve(sockets=[listening]))
        while not server.started and not running.done():  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.005)
        path, url = settings.data / "gateway.json", url_of(listening)
        if server.started:
            release_free_memory()
            announce(path, url)
            log.info("serving", url=url, pid=os.getpid())
        beside = [
            loop.create_task(trim_when_idle(server)),
            loop.create_task(watch(services, url)),
            loop.create_task(services.canaries.run()),
            loop.create_task(services.lookout.run()),
        ]
        try:
            await running
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
            with contextlib.suppress(HaversackError):  # what it said is soon stale
                await services.lookout.withdraw()
            withdraw(path)
    log.info("stopped", pid=os.getpid())


async def watch(services: Services, url: str) -> None:
    """Read acknowledged blocks again through this gateway's own API.  Runs until cancelled."""
    async with HaversackClient(url, services.watcher_token, policy=WATCH_POLICY) as client:
        watcher = Watcher(
            services.cell_db,
            services.clock,
            services.sample,
            client.get_block,
            services.metrics.watch.looked,
        )
        await watcher.run()


async def trim_when_idle(server: uvicorn.Server) -> None:
    """Give memory back once after each burst of requests.  Runs until it is cancelled."""
    seen = trimmed = 0
    while True:
        await asyncio.sleep(IDLE_S)
        total = server.server_state.total_requests
        if total == seen and total != trimmed and not server.server_state.tasks:
            trim_free_memory()
            trimmed = total
        seen = total


def _stop(server: uvicorn.Server) -> None:
    """First signal: drain.  Second: at once."""
    server.force_exit = server.should_exit
    server.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after a signal; 1 with one line on standard error if it could not start."""
    parser = argparse.ArgumentParser(prog="python -m api.gateway")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    given = parser.parse_args(arguments)
    die_with_parent()
    try:
        settings = load(config=given.config, data=given.data, host=given.host, port=given.port)
        reuse_large_buffers(settings.gateway_keep_bytes)
        share_one_arena()
        open_log(settings.data / "logs" / "gateway.log")
        uvloop.run(serve(settings))
    except HaversackError as error:
        sys.stderr.write(f"gateway: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
