"""Why, what if, what happened: over HTTP, against nodes that answer and nodes that do not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_cell import Cell, block_of, running_cell
from api_server import DEADLINE_S
from sqlalchemy import text

from cli import explain
from cli.connection import ServerOptions
from cli.failures import Exit
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import FragmentKey


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    with running_cell(tmp_path, scheme="rs-6-3", nodes=12, racks=4) as cell:
        yield cell


def _why(client: httpx.Client, subject: str) -> dict[str, Any]:
    answer = client.get(f"/v1/admin/why/{subject}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _store(client: httpx.Client, seed: int, size: int = 200_000) -> str:
    name, data = block_of(seed, size)
    assert client.put(f"/v1/blocks/{name}", content=data).status_code == 201
    return name


def _sql(cell: Cell, statement: str, **values: Any) -> None:
    database = Database(sqlite_url(cell.directory / "cell.db"), inline=True)
    database.transact(lambda connection: connection.execute(text(statement), values))
    database.close()


def test_a_whole_block_is_shown_with_its_slots_checked_and_who_references_it(cell: Cell) -> None:
    with cell.client() as admin, cell.client("alice") as alice:
        name = _store(alice, 1)
        entry = {"path": "a", "size": 200_000, "mtime": 0, "block_list": [name]}
        assert alice.post("/v1/metadata/commit", json=entry).status_code == 201
        found = _why(admin, name)
        assert found["summary"] == "readable, 3 of 3 spare fragments"
        assert found["next"] == ["nothing to do"]
        assert found["references"]["total"] == 1
        assert [row["account"] for row in found["references"]["namespaces"]] == ["alice"]
        assert found["owner_name"] == "alice"
        assert [slot["check"] for slot in found["slots"]] == ["intact"] * 9
        assert {slot["epoch"] for slot in found["slots"]} == {found["volume"]["epoch"]}
        assert len({slot["node"] for slot in found["slots"]}) == 9
        assert (found["risk"]["spare"], found["risk"]["fatal"]) == (3, [])
        volume = _why(admin, found["volume"]["id"])
        assert (volume["kind"], volume["volume"]["blocks"]) == ("volume", 1)
        assert volume["summary"] == "readable, 3 of 3 spare fragments"


def test_what_was_lost_shows_in_the_check_and_in_what_comes_next(cell: Cell) -> None:
    with cell.client() as admin:
        name = _store(admin, 2)
        slots = _why(admin, name)["slots"]
        gone, corrupt, missing = (NodeId(slots[slot]["node"]) for slot in (0, 1, 2))
        cell.kill(gone)
        block, volume = BlockHash.parse(name), VolumeId.parse(_why(admin, name)["volume"]["id"])
        assert cell.disks[corrupt].corrupt(FragmentKey(volume, block, 1))
        del cell.disks[missing].entries[FragmentKey(volume, block, 2).pack()]
        found = _why(admin, name)
        checks = [slot["check"] for slot in found["slots"]]
        assert checks[0].startswith("no answer")
        assert checks[1:] == ["corrupt", "missing", *["intact"] * 6]
        assert found["summary"].startswith("readable, 0 of 3 spare fragments")
        assert any(f"slot 1: {corrupt} holds bytes that fail" in said for said in found["next"])
        assert any(f"slot 2: {missing} does not hold it" in said for said in found["next"])
        fatal = {(row["level"], row["name"]) for row in found["risk"]["fatal"]}
        assert {("node", slot["node"]) for slot in found["slots"][3:]} <= fatal
        _until(lambda: _why(admin, str(gone))["node"]["state"] == "down")
        after = _why(admin, name)["next"]
        assert any(f"{gone} is down since" in said and "placed anew in" in said for said in after)
        assert any(event["kind"] == "node state" for event in _why(admin, gone)["events"])


def test_debts_moves_and_blocks_given_up_are_named(cell: Cell) -> None:
    with cell.client() as admin:
        name = _store(admin, 3)
        volume = _why(admin, name)["volume"]["id"]
        number, raw = int(volume[1:]), bytes.fromhex(name)
        debt = "INSERT INTO debts VALUES (:v, 4, :h, :now, 'corrupt')"
        move = "INSERT INTO slot_moves VALUES (:v, 5, 'node-11', 2, 'drain', NULL, :now)"
        lost = "INSERT INTO unrepairable VALUES (:h, :v, 'no good copy', :now, :now)"
        for statement in (debt, move, lost):
            _sql(cell, statement, **_used(statement, v=number, h=raw, now=time.time() - 300))
        found = _why(admin, name)
        assert any("slot 4 owes its fragment (corrupt), since 5 min" in s for s in found["next"])
        assert any("slot 5 is being made on node-11 (drain)" in s for s in found["next"])
        assert found["unrepairable"]["reason"] == "no good copy"
        assert found["slots"][4]["debt"]["reason"] == "corrupt"
        of_volume = _why(admin, volume)
        assert of_volume["owing_blocks"] == [name]
        assert any("no good copy" in said for said in of_volume["next"])
        target = _why(admin, "node-11")
        assert target["moves"]["arriving_total"] == 1
        status = admin.get("/v1/admin/status").json()
        assert status["redundancy"]["blocks_by_spare"]["2"] == 1
        assert {alarm["kind"] for alarm in status["alarms"]} == {"blocks_unrepairable"}
        working = """INSERT INTO passes VALUES
            ('repair', 'cell', 1, 0, NULL, '{"bytes_per_s": 5e6, "eta_s": 60.0}')"""
        _sql(cell, working.replace(":", r"\:"))
        metrics = admin.get("/metrics").text
        assert "haversack_repair_bytes_per_second 5e+06" in metrics
        assert "haversack_repair_eta_seconds 60.0" in metrics
        assert 'haversack_blocks_by_spare_fragments{spare="2"} 1.0' in metrics
        assert 'haversack_alarms{kind="blocks_unrepairable"} 1.0' in metrics
        assert re.search(r"haversack_debt_oldest_age_seconds 3\d\d\.", metrics)


def _used(statement: str, **values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if f":{name}" in statement}


def test_a_node_tells_what_it_holds_and_what_is_at_risk(cell: Cell) -> None:
    with cell.client() as admin:
        name = _store(admin, 4)
        node = _why(admin, name)["slots"][0]["node"]
        found = _why(admin, node)
        assert found["kind"] == "node"
        assert found["live"]["answers"]
        assert found["live"]["fragments"] >= 1
        assert found["slots"]["all"] >= 1
        assert found["at_risk"] == []
        assert found["next"] == ["nothing to do"]
        assert [event["kind"] for event in found["events"]][-2:] == [
            "node registered",
            "node added",
        ]


def test_at_risk_counts_debts_and_a_block_tells_its_place_in_the_order_of_repair(
    cell: Cell,
) -> None:
    with cell.client() as admin:
        names = [_store(admin, seed) for seed in range(20, 60)]
        found = {name: _why(admin, name) for name in names}
        first = names[0]
        other = next(n for n in names if found[n]["volume"]["id"] != found[first]["volume"]["id"])
        owe = "INSERT INTO debts VALUES (:v, :s, :h, :now, 'missing')"
        for name, slots in ((first, (3,)), (other, (4, 5))):
            number = int(found[name]["volume"]["id"][1:])
            for slot in slots:
                _sql(cell, owe, v=number, s=slot, h=bytes.fromhex(name), now=time.time() - 60)
                node = found[name]["slots"][slot]["node"]
                cell.disks[NodeId(node)].entries.pop(
                    FragmentKey(VolumeId(number), BlockHash.parse(name), slot).pack()
                )
        holder = found[first]["slots"][0]["node"]
        (risk,) = (r for r in _why(admin, holder)["at_risk"] if r["spare"] == 2)
        assert found[first]["volume"]["id"] in risk["examples"]
        assert _why(admin, other)["repaired_after_volumes"] == 0
        assert _why(admin, other)["summary"].endswith("; repair takes it next")
        assert _why(admin, first)["repaired_after_volumes"] == 1
        assert _why(admin, first)["summary"].endswith("; 1 volume is repaired before it")
        whole = next(n for n in names if n not in (first, other))
        assert _why(admin, whole)["repaired_after_volumes"] is None


def test_a_draining_node_tells_what_its_drain_waits_for(cell: Cell) -> None:
    with cell.client() as admin:
        _sql(cell, "UPDATE nodes SET state = 'draining' WHERE node_id = 'node-02'")
        blocked = """INSERT INTO jobs VALUES (7, 'drain', 'node-02', '{}', 'running', 0, 0, 3, 9,
            0, 0, 0, '', :b)"""
        waits = [{"volume": f"v{number}", "reason": "add a node"} for number in range(1, 6)]
        _sql(cell, blocked, b=json.dumps([{**blocker, "blocks": []} for blocker in waits]))
        found = _why(admin, "node-02")
        assert "job-7 (drain) gets no further with v1: add a node" in found["next"]
        assert "job-7 waits for 2 more volumes: haversack jobs show 7" in found["next"]
        assert [job["id"] for job in found["jobs"]] == [7]
        _sql(cell, "UPDATE jobs SET state = 'paused'")
        assert any(
            "is paused: haversack jobs resume 7" in s for s in _why(admin, "node-02")["next"]
        )


def test_subjects_that_are_nothing_are_told_so(cell: Cell) -> None:
    with cell.client() as admin, cell.client("alice") as alice:
        for subject, status, kind in (
            ("ab" * 32, 404, "entry_not_found"),
            ("v999999", 404, "entry_not_found"),
            ("node-99", 404, "node_not_found"),
            ("AB" * 32, 422, "malformed_id"),
            ("a_b", 422, "malformed_id"),
        ):
            answer = admin.get(f"/v1/admin/why/{subject}")
            assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind), subject
        for path in ("why/node-01", "what-if?lose=node-01", "events"):
            assert alice.get(f"/v1/admin/{path}").status_code == 403


def test_losing_a_rack_takes_three_fragments_of_a_block_at_most_and_everything_reads(
    cell: Cell,
) -> None:
    with cell.client() as admin:
        blocks = [block_of(seed, 150_000 if seed % 2 else 900) for seed in range(100, 160)]
        for name, data in blocks:
            assert admin.put(f"/v1/blocks/{name}", content=data).status_code == 201
        for rack in ("rack-1", "rack-2", "rack-3", "rack-4"):
            report = admin.get("/v1/admin/what-if", params={"lose": rack}).json()
            assert len(report["nodes"]) == 3
            assert report["fragments_of_one_block_max"] <= 3
            assert report["unreadable"]["blocks"] == 0
            assert sum(row["blocks"] for row in report["after"].values()) == len(blocks)
        worst = admin.get("/v1/admin/what-if", params={"any_one": "rack"}).json()
        assert worst["unreadable"]["blocks"] == 0
        assert {row["domain"] for row in worst["worst"]} == {f"rack:rack-{n}" for n in range(1, 5)}
        two = admin.get("/v1/admin/what-if", params={"lose": "rack-1,rack-2"}).json()
        assert two["unreadable"]["blocks"] > 0, "six of nine fragments are too many"
        cell.kill(*(NodeId.numbered(number) for number in (2, 6, 10)))
        for name, data in blocks:
            assert admin.get(f"/v1/blocks/{name}").content == data


def test_a_question_that_means_nothing_is_refused(cell: Cell) -> None:
    with cell.client() as admin:
        for params in (
            {},
            {"lose": "node-01", "any_one": "rack"},
            {"lose": "node-77"},
            {"lose": ""},
            {"any_one": "planet"},
            {"lose": ",".join(["node-01"] * 101)},
        ):
            answer = admin.get("/v1/admin/what-if", params=params)
            assert answer.json()["error"]["kind"] == "invalid_request", params


def test_events_are_listed_for_the_cell_and_for_one_subject(cell: Cell) -> None:
    with cell.client() as admin:
        everything = admin.get("/v1/admin/events", params={"limit": 500}).json()["events"]
        assert {"node added", "node registered", "leader"} <= {row["kind"] for row in everything}
        times = [row["at"] for row in everything]
        assert times == sorted(times, reverse=True)
        one = admin.get("/v1/admin/events", params={"subject": "node-05"}).json()["events"]
        assert {row["subject"] for row in one} == {"node-05"}


def test_the_page_brings_all_it_needs_and_may_load_nothing_else(cell: Cell) -> None:
    with cell.client(None) as anybody:
        answer = anybody.get("/admin")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", page)
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in page
    assert not re.search(r"\son\w+\s*=", page), "handlers in attributes are not let run"
    assert " style=" not in page
    assert "localStorage" not in page


# -- the command line --------------------------------------------------------------------------


def test_commands_show_the_answers_to_people_and_to_scripts(
    cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(cell.tokens["admin"])
    options = ServerOptions(cell.running.url, token)

    def said(code: Exit) -> str:
        assert code is Exit.OK
        return capsys.readouterr().out

    with cell.client() as admin:
        name = _store(admin, 7)
        slots = _why(admin, name)["slots"]
        volume = _why(admin, name)["volume"]["id"]
    block = said(explain.why(options, name, False))
    assert "is          readable, 3 of 3 spare fragments" in block
    assert "next        nothing to do" in block
    assert len(re.findall(r"node-\d\d +up +rack-\d/host-node-\d\d +intact", block)) == 9
    assert json.loads(said(explain.why(options, name, True)))["risk"]["spare"] == 3
    assert f"volume {volume}" in said(explain.why(options, volume, False))
    node = said(explain.why(options, slots[0]["node"], False))
    assert "it answers: serving" in node
    assert "node registered" in node
    loss = said(explain.what_if(options, ("rack-1", "node-02"), None, False))
    assert "without rack:rack-1, node:node-02 (4 nodes)" in loss
    assert "to rebuild" in loss
    worst = json.loads(said(explain.what_if(options, (), "rack", True)))
    assert len(worst["worst"]) == 4
    assert "the worst of each kind" in said(explain.what_if(options, (), "rack", False))
    assert "node added" in said(explain.events(options, "node-03", 50, False))
    assert explain.why(options, "no such/thing", False) is Exit.REFUSED
    assert explain.what_if(options, ("nowhere",), None, False) is Exit.REFUSED
    assert "no node, host or rack" in capsys.readouterr().err
