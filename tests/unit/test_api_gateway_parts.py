"""Parts of the gateway process: addresses, the announcement, memory after a burst."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api import gateway
from api.gateway import announce, bind, trim_when_idle, url_of, withdraw
from protocol.errors import ConfigInvalid


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:"),
        ("localhost", "http://"),
        ("0.0.0.0", "http://127.0.0.1:"),
    ],
)
def test_bound_address_is_one_that_a_client_can_use(host: str, url: str) -> None:
    with bind(host, 0) as listening:
        listening.listen()
        found = url_of(listening)
        assert found.startswith(url)
        port = int(found.rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_ipv6_address_is_written_in_brackets() -> None:
    class Bound:
        """A socket where IPv6 is: not every machine has it."""

        def getsockname(self) -> tuple[str, int, int, int]:
            return ("::1", 8123, 0, 0)

    assert url_of(Bound()) == "http://[::1]:8123"  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["256.0.0.1", "no.such.host.invalid", "192.0.2.1"])
def test_address_that_is_not_ours_is_refused_with_its_name(host: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"cannot listen on {host}:0"):
        bind(host, 0)


def test_announcement_is_complete_and_only_its_author_withdraws_it(tmp_path: Path) -> None:
    path = tmp_path / "gateway.json"
    announce(path, "http://127.0.0.1:1")
    assert json.loads(path.read_text()) == {"url": "http://127.0.0.1:1", "pid": os.getpid()}
    assert os.listdir(tmp_path) == ["gateway.json"]
    withdraw(path)
    assert not path.exists()
    path.write_text(json.dumps({"url": "x", "pid": os.getpid() + 1}))
    withdraw(path)
    assert path.exists()
    for damaged in ("", "{}", "[]", "null"):
        path.write_text(damaged)
        withdraw(path)
        assert path.exists()


async def test_memory_is_given_back_once_after_each_burst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trims: list[int] = []
    state = SimpleNamespace(total_requests=0, tasks=set())
    server: Any = SimpleNamespace(server_state=state)
    monkeypatch.setattr(gateway, "IDLE_S", 0)
    monkeypatch.setattr(gateway, "trim_free_memory", lambda: trims.append(state.total_requests))
    task = asyncio.create_task(trim_when_idle(server))

    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    await turns()
    assert trims == []
    state.total_requests = 5
    await turns()
    assert trims == [5]
    state.total_requests, state.tasks = 7, {"busy"}
    await turns()
    assert trims == [5]
    state.tasks = set()
    await turns()
    assert trims == [5, 7]
    task.cancel()
