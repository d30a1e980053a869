"""The gateway as a process: start, announce, serve without a control plane, stop, die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cli.prepare import prepare
from protocol.config import load

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory as `haversack up` leaves it, without a node running."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "logs").mkdir()
    prepare(load(data=directory, scheme="rs-2-1", nodes=3))
    return directory


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def _gateway(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-m", "api.gateway", "--data", str(directory), *options)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _announced(directory: Path, process: subprocess.Popen[str]) -> str:
    path = directory / "gateway.json"
    _until(lambda: path.exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    content = json.loads(path.read_text())
    assert content["pid"] == process.pid
    return content["url"]


def test_gateway_announces_its_address_serves_and_stops_on_sigterm(prepared: Path) -> None:
    with _gateway(prepared, "--port", "0") as process:
        url = _announced(prepared, process)
        token = (prepared / "admin.token").read_text().strip()
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/healthz").json() == {"alive": True}
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["sql"]) == (
                503,
                {"cell": "ok", "metadata": "ok"},
            )
            client.headers["Authorization"] = f"Bearer {token}"
            assert client.get("/v1/account").json()["is_admin"] is True
            assert len(client.get("/v1/admin/status").json()["nodes"]) == 3
            body = {"path": "a", "size": 1, "mtime": 0, "content": "YQ=="}
            assert client.post("/v1/metadata/commit", json=body).status_code in (200, 201)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
    assert not (prepared / "gateway.json").exists()
    lines = [json.loads(line) for line in (prepared / "logs/gateway.log").read_text().splitlines()]
    assert [line["event"] for line in lines if line["level"] == "info"][-1] == "stopped"
    assert token not in str(lines)


def test_gateway_dies_with_its_parent(prepared: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'api.gateway', '--port', '0', '--data', sys.argv[1]]\n"
        "child = subprocess.Popen(command)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        (sys.executable, "-c", script, str(prepared)), stdout=subprocess.PIPE, text=True
    )
    with parent:
        child = psutil.Process(int(parent.stdout.readline()))
        _until((prepared / "gateway.json").exists)
        os.kill(parent.pid, signal.SIGKILL)
    _until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_gateway_drains_the_request_it_works_on(prepared: Path) -> None:
    with _gateway(prepared, "--port", "0") as process:
        url = _announced(prepared, process)
        host, port = url.removeprefix("http://").split(":")
        token = (prepared / "admin.token").read_text().strip()
        body = b'{"path": "drained", "size": 1, "mtime": 0, "content": "YQ=="}'
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as peer:
            peer.sendall(
                f"POST /v1/metadata/commit HTTP/1.1\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            assert peer.recv(1000).startswith(b"HTTP/1.1 100")  # the request has begun
            peer.sendall(body[:10])
            process.send_signal(signal.SIGTERM)
            _until(lambda: _refuses(host, int(port)))
            peer.sendall(body[10:])
            assert peer.recv(1000).startswith((b"HTTP/1.1 201", b"HTTP/1.1 200"))
        assert process.wait(DEADLINE_S) == 0


def _refuses(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return True
    return False


def test_port_that_is_taken_is_told_in_one_line(prepared: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with _gateway(prepared, "--port", port) as process:
            assert process.wait(DEADLINE_S) == 1
            (line,) = process.stderr.read().splitlines()
            assert f"cannot listen on 127.0.0.1:{port}" in line


def test_directory_without_a_cell_is_told_in_one_line(tmp_path: Path) -> None:
    with _gateway(tmp_path, "--port", "0") as process:
        assert process.wait(DEADLINE_S) == 1
        (line,) = process.stderr.read().splitlines()
        assert "cell.db does not exist" in line


def test_misspelt_setting_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAVERSACK_PROT", "1")
    with _gateway(tmp_path) as process:
        assert process.wait(DEADLINE_S) == 1
        assert "HAVERSACK_PROT is not a setting; did you mean port?" in process.stderr.read()
