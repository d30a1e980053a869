"""A real cell for the demo, the bench, probes and the live nemesis: `haversack up` in a child.

It is started and seen as a user would: by its command, its `ready` line, its HTTP API and its
process tree.  Nothing here imports what runs inside a cell.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

START_S_MAX = 120.0
STOP_S_MAX = 90.0
POLL_S = 0.05


class CellFailed(Exception):
    """The cell did not start, stop or reach a state; the message holds the end of its logs."""


class LiveCell:
    """`haversack up --port 0`.  As a context manager it removes its data directory at the end,
    unless the directory was given."""

    def __init__(
        self,
        *,
        nodes: int = 9,
        scheme: str = "rs-6-3",
        data: Path | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self._temporary = data is None
        self.data = data or Path(tempfile.mkdtemp(prefix="haversack-cell-"))
        self._argv = (
            str(Path(sys.executable).with_name("haversack")),
            *("up", "--data", str(self.data), "--port", "0"),
            *("--nodes", str(nodes), "--scheme", scheme),
            *arguments,
        )
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._said: deque[str] = deque(maxlen=50)
        self.url = ""

    # -- what it is ----------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Root of the cell's process tree."""
        assert self._process is not None, "the cell is not running"
        return self._process.pid

    @property
    def host(self) -> str:
        """Address of the HTTP API."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Port of the HTTP API."""
        return urlsplit(self.url).port or 0

    @property
    def token(self) -> str:
        """The admin account's bearer token."""
        return self.token_file.read_text().strip()

    @property
    def token_file(self) -> Path:
        """Where the first start wrote it."""
        return self.data / "admin.token"

    @property
    def gateway_pid(self) -> int:
        """Process that serves HTTP."""
        return int(json.loads((self.data / "gateway.json").read_text())["pid"])

    def processes(self) -> list[psutil.Process]:
        """Everything below `haversack up`."""
        return psutil.Process(self.pid).children(recursive=True)

    def find(self, *words: str) -> psutil.Process:
        """The one process whose command line or title holds one of `words`."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = " ".join(process.cmdline())
                if any(word in command for word in words):
                    return process
        raise CellFailed(f"no process of the cell is called {' or '.join(words)}")

    # -- start and stop ------------------------------------------------------------------------

    def start(self) -> float:
        """Start; seconds from the command to its `ready` line.  Raises `CellFailed`."""
        started = time.monotonic()
        ready = threading.Event()
        self._process = subprocess.Popen(
            self._argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(
            target=self._listen, args=(self._process, ready), daemon=True
        )
        self._reader.start()
        if not ready.wait(START_S_MAX) or not self.url:
            raise CellFailed(f"the cell is not ready: {self.explain()}")
        return time.monotonic() - started

    def _listen(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stdout is not None
        self.url = ""
        with process.stdout:
            for line in process.stdout:
                self._said.append(line.rstrip())
                if line.startswith("ready "):
                    self.url = line.split()[1]
                    ready.set()
        ready.set()

    def stop(self) -> None:
        """SIGTERM, then wait until everything has ended in order.  Raises `CellFailed`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
            self._join_reader()
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise CellFailed(f"the cell did not stop: {self.explain()}") from error

    def _join_reader(self) -> None:
        if self._reader is not None:
            self._reader.join(STOP_S_MAX)

    def kill_everything(self) -> int:
        """SIGKILL of every process of the cell at once; returns how many there were."""
        victims = [psutil.Process(self.pid), *self.processes()]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # so that nobody restarts or cleans up after another
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert self._process is not None
        self._process.wait()
        self._process = None
        self._join_reader()
        psutil.wait_procs(victims, timeout=STOP_S_MAX)
        return len(victims)

    def destroy_nodes(self, count: int) -> list[str]:
        """Remove the directories of `count` nodes that are up and SIGKILL them; their ids."""
        victims = [node for node in self.status()["nodes"] if node["state"] == "up"][:count]
        for node in victims:
            shutil.rmtree(node["directory"])
            os.kill(node["pid"], signal.SIGKILL)
        return [str(node["id"]) for node in victims]

    # -- look ----------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One HTTP request with the admin's token; status and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            headers = {"authorization": f"Bearer {self.token}"}
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """The body of `GET /v1/admin/status`."""
        code, body = self.ask("GET", "/v1/admin/status")
        if code != http.client.OK:
            raise CellFailed(f"status answered {code}: {body[:500]!r}")
        status: dict[str, Any] = json.loads(body)
        return status

    def wait_until(self, what: str, holds: Callable[[], bool], seconds: float) -> float:
        """Poll until `holds()`; seconds it took.  Raises `CellFailed` naming `what`."""
        started = time.monotonic()
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, CellFailed):
                if holds():
                    return time.monotonic() - started
            if time.monotonic() - started > seconds:
                raise CellFailed(f"not within {seconds:.0f} s: {what}; {self.explain()}")
            time.sleep(POLL_S)

    def wait_for_nodes(self, up: int, seconds: float = 60.0) -> float:
        """Wait until exactly `up` nodes are up."""

        def holds() -> bool:
            states = [str(node["state"]) for node in self.status()["nodes"]]
            return states.count("up") == up

        return self.wait_until(f"{up} nodes up", holds, seconds)

    def explain(self) -> str:
        """What it printed, and the end of each log."""
        parts = ["it said:", *self._said]
        for path in sorted((self.data / "logs").glob("*.log")):
            parts += [f"{path.name}:", *path.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(parts)

    def __enter__(self) -> LiveCell:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            if self._temporary:
                shutil.rmtree(self.data, ignore_errors=True)
