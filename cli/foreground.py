"""The process that `haversack up` becomes: one cell on one machine, until Ctrl-C.

Entered by `exec` from `cli.up`, so that the settings and the command line, some 15 MB, are not
kept for the life of the cell.  What its children need is in their environment.

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
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from cli.children import Child, become_subreaper, end_orphans, watch
from cli.failures import report_failure
from protocol.errors import ConfigInvalid, DirectoryInUse, HaversackError

POLL_S = 1.0
"""How often children are looked at; a child that exits wakes us at once (SIGCHLD)."""

POLL_STARTING_S = 0.05
READY_WARNING_S = 60.0
GATEWAY_STOP_S = 15.0
CONTROLLER_STOP_S = 45.0

CONTROLLER = "controller"


def lock_directory(data: Path) -> TextIO:
    """Hold `DIR/up.lock` for the life of this process.

    Raises `DirectoryInUse` naming the pid that holds it.
    """
    data.mkdir(parents=True, exist_ok=True)
    path = data / "up.lock"
    handle = path.open("a+", encoding="ascii")
    _lock(handle, data, fcntl.LOCK_EX)
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def keep_stopped(data: Path) -> TextIO | None:
    """Keep `haversack up` away from `data` until the file is closed, without writing anything;
    None if there never was one.  Raises `DirectoryInUse`."""
    try:
        handle = (data / "up.lock").open(encoding="ascii")
    except FileNotFoundError:
        return None
    _lock(handle, data, fcntl.LOCK_SH)
    return handle


def _lock(handle: TextIO, data: Path, how: int) -> None:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise DirectoryInUse(
            f"{data} is in use by pid {holder}: stop that `haversack up`, or choose another --data",
            {"directory": str(data), "pid": holder},
        ) from error


def run(data: Path) -> int:
    """Run the cell until a signal; returns the exit code.

    Raises `DirectoryInUse`, and `ConfigInvalid` if the directory cannot be prepared.
    """
    lock = lock_directory(data)
    become_subreaper()
    (data / "logs").mkdir(exist_ok=True)
    (data / "gateway.json").unlink(missing_ok=True)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    _prepare(data)
    controller = _child(CONTROLLER, "cluster.supervisor", data, CONTROLLER_STOP_S)
    gateway = _child("gateway", "api.gateway", data, GATEWAY_STOP_S)
    children = (controller, gateway)
    try:
        for child in children:
            child.start()
        _serve(children, data, signals)
    finally:
        gateway.stop()
        controller.stop()
        end_orphans(children)
        lock.close()
    return 0


def _child(name: str, module: str, data: Path, stop_s: float) -> Child:
    return Child(
        name=name,
        argv=(sys.executable, "-m", module, "--data", str(data)),
        log_path=data / "logs" / f"{name}.log",
        environment=dict(os.environ),
        death_signal=signal.SIGTERM,
        stop_s=stop_s,
    )


def _prepare(data: Path) -> None:
    """Schema, secret, account, node directories: in a process of its own, which then is gone."""
    done = subprocess.run(
        (sys.executable, "-m", "cli.prepare", "--data", str(data)),
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
    while True:
        got = signal.sigtimedwait(signals, POLL_S if ready else POLL_STARTING_S)
        if got is not None and got.si_signo in (signal.SIGINT, signal.SIGTERM):
            return
        for child in watch(children):
            print(f"{child.name} ended; starting it again, log: {child.log_path}", file=sys.stderr)
            if child.name == CONTROLLER:
                _prepare(data)  # every storage node went with it: the next start is a cold one
        if not ready:
            url = _ready_url(data)
            if url is not None:
                ready = True
                for child in children:  # a gateway that starts again must be where it was
                    child.environment["HAVERSACK_PORT"] = str(urlsplit(url).port)
                print(f"ready {url}", flush=True)
            elif not warned and time.monotonic() - started > READY_WARNING_S:
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


def main() -> int:
    """`python -m cli.foreground DATA`."""
    try:
        return run(Path(sys.argv[1]))
    except HaversackError as error:
        return report_failure(error)


if __name__ == "__main__":
    sys.exit(main())
