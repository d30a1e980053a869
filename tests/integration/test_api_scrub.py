"""Scrub over HTTP and on the command line: who may ask, what is answered, what is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_cell import Cell, running_cell


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    with running_cell(tmp_path, scheme="rs-2-1", nodes=4) as running:
        yield running


@pytest.fixture
def admin(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client() as client:
        yield client


def by_node(answer: httpx.Response) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {node["node"]: node for node in answer.json()["nodes"]}


def test_only_administrators_see_and_order_scrubs(cell: Cell) -> None:
    with cell.client("alice") as alice:
        for method in ("GET", "POST"):
            answer = alice.request(method, "/v1/admin/scrub", json={"action": "start"})
            assert (answer.status_code, answer.json()["error"]["kind"]) == (403, "forbidden")


def test_every_node_tells_where_it_stands_and_takes_orders(admin: httpx.Client) -> None:
    nodes = by_node(admin.get("/v1/admin/scrub"))
    assert sorted(nodes) == [f"node-0{number}" for number in range(1, 5)]
    assert all(node["scrub"]["findings"] == 0 for node in nodes.values())
    body = {"action": "pause", "nodes": ["node-02"]}
    assert by_node(admin.post("/v1/admin/scrub", json=body))["node-02"]["scrub"]["paused"]
    paused = {
        name for name, n in by_node(admin.get("/v1/admin/scrub")).items() if n["scrub"]["paused"]
    }
    assert paused == {"node-02"}
    started = by_node(
        admin.post("/v1/admin/scrub", json={"action": "start", "bytes_per_s": 1_000_000})
    )
    assert all(node["scrub"]["bytes_per_s"] == 1_000_000 for node in started.values())
    assert all(node["scrub"]["asked_for"] for node in started.values())


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"action": "start", "nodes": ["node-77"]}, 404, "node_not_found"),
        ({"action": "stop"}, 422, "invalid_request"),
        ({"action": "pause", "bytes_per_s": 5}, 422, "invalid_request"),
        ({"action": "start", "bytes_per_s": -1}, 422, "invalid_request"),
    ],
)
def test_an_order_that_means_nothing_is_refused(
    admin: httpx.Client, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = admin.post("/v1/admin/scrub", json=body)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)
    assert json.loads(answer.text)["error"]["message"]
