"""Changes over HTTP: nodes that come, jobs that are asked for, and who may ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_cell import Cell, running_cell

from cluster.controller_plan import read_plan
from storage_node import identity


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    with running_cell(tmp_path, scheme="rs-2-1", nodes=4) as running:
        yield running


@pytest.fixture
def admin(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client() as client:
        yield client


def kind_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["kind"]


def node(admin: httpx.Client, name: str) -> dict[str, Any]:
    (found,) = [n for n in admin.get("/v1/admin/nodes").json()["nodes"] if n["id"] == name]
    return dict(found)


def test_only_administrators_see_and_ask_for_changes(cell: Cell) -> None:
    with cell.client("alice") as alice:
        for method, path in (
            ("GET", "/v1/admin/nodes"),
            ("POST", "/v1/admin/nodes"),
            ("POST", "/v1/admin/nodes/node-01"),
            ("GET", "/v1/admin/jobs"),
            ("POST", "/v1/admin/jobs"),
            ("GET", "/v1/admin/jobs/1"),
            ("POST", "/v1/admin/jobs/1"),
        ):
            assert kind_of(alice.request(method, path)) == (403, "forbidden")


def test_a_directory_becomes_a_joining_node_that_the_controller_will_start(
    cell: Cell, admin: httpx.Client, tmp_path: Path
) -> None:
    disk = tmp_path / "new-disk"
    body = {"directory": str(disk), "rack": "r2", "weight": 2}
    answer = admin.post("/v1/admin/nodes", json=body)
    assert answer.status_code == 201
    made = answer.json()
    assert (made["id"], made["state"], made["rack"]) == ("node-05", "joining", "r2")
    assert identity.load(disk).node_id == "node-05"
    planned = {planned.node_id: planned.directory for planned in read_plan(tmp_path).nodes}
    assert planned["node-05"] == str(disk)
    assert admin.post("/v1/admin/nodes", json=body).json()["id"] == "node-05"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    full = admin.post("/v1/admin/nodes", json={"directory": str(tmp_path / "full")})
    assert kind_of(full) == (500, "directory_foreign")
    relative = admin.post("/v1/admin/nodes", json={"directory": "disks/x"})
    assert kind_of(relative) == (422, "invalid_request")


def test_a_weight_is_changed(admin: httpx.Client) -> None:
    answer = admin.post("/v1/admin/nodes/node-02", json={"weight": 0.5})
    assert (answer.status_code, answer.json()["weight"]) == (200, 0.5)
    assert node(admin, "node-02")["weight"] == 0.5
    assert kind_of(admin.post("/v1/admin/nodes/node-77", json={"weight": 1})) == (
        404,
        "node_not_found",
    )
    assert kind_of(admin.post("/v1/admin/nodes/node-02", json={})) == (422, "invalid_request")


def test_a_dry_run_answers_with_the_plan_and_leaves_the_node_alone(admin: httpx.Client) -> None:
    answer = admin.post(
        "/v1/admin/jobs", json={"kind": "drain", "node": "node-01", "dry_run": True}
    )
    assert answer.status_code == 200
    plan = answer.json()["plan"]
    assert plan["moves"] == []
    assert all("open" in waits["reason"] for waits in plan["waiting"])
    assert plan["blocked"] == []
    assert len(plan["waiting"]) == node(admin, "node-01")["slots"]
    assert node(admin, "node-01")["state"] == "up"
    assert admin.get("/v1/admin/jobs").json() == {"jobs": []}


def test_a_drain_is_asked_for_steered_and_taken_back(admin: httpx.Client) -> None:
    job = admin.post("/v1/admin/jobs", json={"kind": "drain", "node": "node-01"})
    assert job.status_code == 201
    number = job.json()["id"]
    assert node(admin, "node-01")["state"] == "draining"
    twice = admin.post("/v1/admin/jobs", json={"kind": "drain", "node": "node-01"})
    assert kind_of(twice) == (409, "wrong_state")
    path = f"/v1/admin/jobs/{number}"
    assert admin.post(path, json={"action": "pause"}).json()["state"] == "paused"
    assert admin.get(path).json()["state"] == "paused"
    assert kind_of(admin.post(path, json={"action": "pause"})) == (409, "wrong_state")
    assert admin.post("/v1/admin/nodes/node-01", json={"drain": False}).json()["state"] == "up"
    assert admin.get(path).json()["state"] == "cancelled"
    assert [found["id"] for found in admin.get("/v1/admin/jobs").json()["jobs"]] == [number]


def test_what_does_not_exist_or_makes_no_sense_is_refused(admin: httpx.Client) -> None:
    jobs = "/v1/admin/jobs"
    assert kind_of(admin.get(f"{jobs}/99")) == (404, "job_not_found")
    assert kind_of(admin.get(f"{jobs}/x")) == (404, "job_not_found")
    assert kind_of(admin.post(jobs, json={"kind": "paint"})) == (422, "invalid_request")
    assert kind_of(admin.post(jobs, json={"kind": "drain"})) == (422, "invalid_request")
    assert kind_of(admin.post(jobs, json={"kind": "drain", "node": "node-77"})) == (
        404,
        "node_not_found",
    )
    bad = {"kind": "transcode", "from": "rs-2-1", "to": "raid-5"}
    assert kind_of(admin.post(jobs, json=bad)) == (422, "invalid_request")
