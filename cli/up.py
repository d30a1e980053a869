"""`haversack up`: one cell on one machine, in the foreground, until Ctrl-C.

    this process (holds DIR/up.lock)
    ├── prepare      runs once: schema, secret, admin account, node directories
    ├── controller   the only Ray driver: GCS, raylet, placement actor, storage-node actors
    └── gateway      HTTP; needs SQL and the data ports only, so it outlives the controller

Walk: lock the directory, prepare it, start controller and gateway, print `ready URL` when the
gateway says so, restart what dies, stop everything in order on SIGINT or SIGTERM.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from cli.children import Child, become_subreaper, watch
from cluster.ray_environment import ray_environment
from protocol.errors import ConfigInvalid, DirectoryInUse

POLL_S = 0.25
"""How often children are looked at; a child that exits wakes us at once (SIGCHLD)."""

POLL_STARTING_S = 0.05
DESCENDANTS_S = 5.0
READY_WARNING_S = 60.0
GATEWAY_STOP_S = 15.0
CONTROLLER_STOP_S = 45.0


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line said; None leaves it to the file, the environment, the default."""

    data: Path
    nodes: int | None = None
    scheme: str | None = None
    host: str | None = None
    port: int | None = None
    config: Path | None = None
    labels: tuple[str, ...] = ()


def lock_directory(data: Path) -> TextIO:
    """Hold `DIR/up.lock` for the life of this process.

    Raises `DirectoryInUse` naming the pid that holds it.
    """
    data.mkdir(parents=True, exist_ok=True)
    path = data / "up.lock"
    handle = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise DirectoryInUse(
            f"{data} is in use by pid {holder}: stop that `haversack up`, or choose another --data",
            {"directory": str(data), "pid": holder},
        ) from error
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def run(options: UpOptions) -> int:
    """Run the cell until a signal; returns the exit code."""
    data = options.data.resolve()
    lock = lock_directory(data)
    become_subreaper()
    (data / "logs").mkdir(exist_ok=True)
    (data / "gateway.json").unlink(missing_ok=True)
    environment = _environment(options, data)
    _prepare(data, environment)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    controller = _child("controller", "cluster.supervisor", data, environment, CONTROLLER_STOP_S)
    gateway = _child("gateway", "api.gateway", data, environment, GATEWAY_STOP_S)
    children = (controller, gateway)
    try:
        for child in children:
            child.start()
        _serve(children, data, signals)
    finally:
        gateway.stop()
        controller.stop()
        lock.close()
    return 0


def _environment(options: UpOptions, data: Path) -> dict[str, str]:
    """What the children read through `protocol.config`."""
    given = {
        "HAVERSACK_DATA": data,
        "HAVERSACK_NODES": options.nodes,
        "HAVERSACK_SCHEME": options.scheme,
        "HAVERSACK_HOST": options.host,
        "HAVERSACK_PORT": options.port,
        "HAVERSACK_CONFIG": options.config and options.config.resolve(),
        "HAVERSACK_NODE_LABELS": json.dumps(options.labels) if options.labels else None,
    }
    chosen = {name: str(value) for name, value in given.items() if value is not None}
    chosen.update(ray_environment(data / "ray.token"))
    return {**os.environ, **chosen}


def _child(name: str, module: str, data: Path, environment: dict[str, str], stop_s: float) -> Child:
    return Child(
        name=name,
        argv=(sys.executable, "-m", module, "--data", str(data)),
        log_path=data / "logs" / f"{name}.log",
        environment=environment,
        death_signal=signal.SIGTERM,
        stop_s=stop_s,
    )


def _prepare(data: Path, environment: dict[str, str]) -> None:
    """Schema, secret, account, node directories: in a process of its own, which then is gone."""
    done = subprocess.run(
        (sys.executable, "-m", "cli.prepare", "--data", str(data)),
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigInvalid(
            (done.stderr.strip() or done.stdout.strip() or "preparation failed").splitlines()[-1],
            {"directory": str(data)},
        )


def _serve(children: tuple[Child, ...], data: Path, signals: tuple[signal.Signals, ...]) -> None:
    """Watch until SIGINT or SIGTERM."""
    started = time.monotonic()
    ready = warned = False
    descendants_at = 0.0
    while True:
        got = signal.sigtimedwait(signals, POLL_S if ready else POLL_STARTING_S)
        if got is not None and got.si_signo in (signal.SIGINT, signal.SIGTERM):
            return
        for child in watch(children):
            print(f"{child.name} ended; starting it again, log: {child.log_path}", file=sys.stderr)
        now = time.monotonic()
        if now >= descendants_at:
            descendants_at = now + DESCENDANTS_S
            for child in children:
                child.remember_descendants()
        if not ready:
            url = _ready_url(data)
            if url is not None:
                ready = True
                print(f"ready {url}", flush=True)
            elif not warned and now - started > READY_WARNING_S:
                warned = True
                print(f"not ready after {READY_WARNING_S:.0f} s: see {data}/logs", file=sys.stderr)


def _ready_url(data: Path) -> str | None:
    """The gateway's address once `/readyz` answers 200, else None."""
    try:
        url = str(json.loads((data / "gateway.json").read_text())["url"])
    except (FileNotFoundError, ValueError):
        return None
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return url if status == http.client.OK else None
