"""A cell of the bench's own: started as a user would, measured from outside, then removed."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

START_S_MAX = 120.0
STOP_S_MAX = 60.0


class Cell:
    """`haversack up` on a free port with its data in a temporary directory."""

    def __init__(self, nodes: int = 9, scheme: str = "rs-6-3") -> None:
        self.data = Path(tempfile.mkdtemp(prefix="haversack-bench-"))
        self._argv = (
            str(Path(sys.executable).with_name("haversack")),
            *("up", "--data", str(self.data), "--port", "0"),
            *("--nodes", str(nodes), "--scheme", scheme),
        )
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Root of the cell's process tree."""
        assert self._process is not None
        return self._process.pid

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    @property
    def token(self) -> str:
        return (self.data / "admin.token").read_text().strip()

    @property
    def gateway_pid(self) -> int:
        return int(json.loads((self.data / "gateway.json").read_text())["pid"])

    def start(self) -> float:
        """Start; seconds from the command to its `ready` line."""
        started = time.monotonic()
        self._process = subprocess.Popen(
            self._argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ready "):
                self.url = line.split()[1]
                return time.monotonic() - started
        raise RuntimeError(f"the cell ended with {self._process.wait()}: see {self.data}/logs")

    def stop(self) -> None:
        """SIGTERM, then wait for everything in order."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_S_MAX)
            self._process = None

    def status(self) -> dict[str, Any]:
        """The body of `GET /v1/admin/status`."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.request(
            "GET", "/v1/admin/status", headers={"authorization": f"Bearer {self.token}"}
        )
        status: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return status

    def destroy_nodes(self, count: int) -> list[str]:
        """SIGKILL of `count` storage nodes and removal of their directories; returns their ids."""
        victims = self.status()["nodes"][:count]
        for node in victims:
            shutil.rmtree(node["directory"])
            os.kill(node["pid"], signal.SIGKILL)
        return [node["id"] for node in victims]

    def __enter__(self) -> Cell:
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
            shutil.rmtree(self.data, ignore_errors=True)
