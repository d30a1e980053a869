"""Disks, scrubs, the verifier, strays and canaries, as metrics and status lines show them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from cell_rows import START, HandClock, Rows, empty_database, new_cell
from sqlalchemy import Connection, insert

from api import upkeep_metrics
from api.metrics import Metrics
from cli.upkeep_lines import percent, upkeep_lines
from cluster.disk_reports import DiskReport, save_disk_reports
from cluster.map_rows import set_node_state
from cluster.schema import passes, stray
from cluster.status import CellStatus, status_of
from cluster.topology import NodeState
from cluster.verify.differences import Difference, Tally
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.messages import ScrubProgress, SpaceReport
from sql.database import Database

NODES = 4


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, HandClock(), nodes=NODES)
    Rows(database).register_all()
    yield database
    database.close()


def _tell(db: Database, number: int, **scrub: Any) -> None:
    space = SpaceReport(1_000, 700, 100, 200, 250)
    report = DiskReport(NodeId.numbered(number), space, ScrubProgress(**scrub))
    db.transact(lambda connection: save_disk_reports(connection, [report], START))


def _note(db: Database, kind: str, subject: str, ended: float | None, **body: Any) -> None:
    row = {"kind": kind, "subject": subject, "number": 3, "begun": START, "ended": ended}
    values = {**row, "body": orjson.dumps(body).decode()}
    db.transact(lambda connection: connection.execute(insert(passes).values(values)))


def _verified(db: Database, subject: str, ended: float | None, **found: int) -> None:
    tally = Tally(examples_max=0)
    for name, count in found.items():
        for _ in range(count):
            tally.add(Difference[name.upper()], VolumeId(1), BlockHash(bytes(32)), 0)
    looked = {"deep": True, "blocks": 30, "blocks_total": 120, "unlooked_slots": 2}
    _note(db, "verify", subject, ended, **looked, differences=tally.to_json())


def _status(db: Database) -> CellStatus:
    return db.read_now(lambda connection: status_of(connection, START + 60))


def _exposed(status: CellStatus) -> dict[str, float]:
    metrics = Metrics()
    metrics.cell.set_snapshot(status, START + 60)
    lines = metrics.expose().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def _lines(db: Database) -> dict[str, str]:
    return dict(upkeep_lines(orjson.loads(orjson.dumps(_status(db).to_json()))))


def test_every_series_of_a_cell_that_noted_nothing_is_there_and_zero(db: Database) -> None:
    shown = _exposed(_status(db))
    for difference in Difference:
        assert shown[f'haversack_verify_differences{{difference="{difference.value}"}}'] == 0
    assert shown['haversack_strays{difference="orphan"}'] == 0
    assert shown['haversack_canaries{state="planted"}'] == 0
    assert shown["haversack_watched_blocks"] == 0
    assert not [name for name in shown if name.startswith("haversack_node_")]


def test_scrub_and_space_of_each_node_have_series_until_it_is_gone(db: Database) -> None:
    _tell(db, 1, pass_number=2, running=True, bytes_done=5, bytes_total=50, findings=1)
    _tell(db, 2, ended=START)
    shown = _exposed(_status(db))
    assert shown['haversack_node_used_bytes{node="node-01"}'] == 700
    assert shown['haversack_node_free_bytes{node="node-01",purpose="clients"}'] == 200
    assert shown['haversack_node_scrub_done_bytes{node="node-01"}'] == 5
    assert shown['haversack_node_scrub_findings{node="node-01"}'] == 1
    assert shown['haversack_node_scrub_running{node="node-02"}'] == 0
    assert shown['haversack_node_scrub_ended_timestamp_seconds{node="node-02"}'] == START
    leave = NodeId.numbered(1), NodeState.GONE, START, "", 9
    db.transact(lambda connection: set_node_state(connection, *leave))
    assert not [name for name in _exposed(_status(db)) if '"node-01"' in name]


def test_the_number_of_nodes_with_series_is_bounded(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, NODES + 1):
        _tell(db, number)
    monkeypatch.setattr(upkeep_metrics, "NODES_LABELLED_MAX", 2)
    shown = [name for name in _exposed(_status(db)) if name.startswith("haversack_node_used")]
    assert len(shown) == 2


def test_what_the_verifier_found_is_in_the_metrics_and_in_a_line(db: Database) -> None:
    _verified(db, "cell", None, missing=1)
    _verified(db, "finished", START + 30, missing=2, wrong_bytes=1)

    def add(connection: Connection) -> None:
        row = {"node_id": "node-01", "volume_id": 1, "hash": bytes(32), "slot": 0, "length": 70}
        kept = {**row, "kind": "orphan", "first_seen": START, "pass_number": 1}
        connection.execute(insert(stray).values(kept))

    db.transact(add)
    shown = _exposed(_status(db))
    assert shown["haversack_verify_running"] == 1
    assert shown["haversack_verify_done_blocks"] == 30
    assert shown['haversack_verify_differences{difference="missing"}'] == 2
    assert shown['haversack_stray_bytes{difference="orphan"}'] == 70
    assert shown['haversack_stray_oldest_age_seconds{difference="orphan"}'] == 60
    assert shown['haversack_pass_ended_timestamp_seconds{kind="verify"}'] == START + 30
    lines = _lines(db)
    assert lines["verifying"].endswith("25 % of 120 blocks")
    assert lines["verified"].endswith(
        "every fragment read: 30 blocks, 2 missing, 1 wrong bytes; 2 fragments not looked at"
    )
    assert lines["strays"] == "1 orphan (70 B)"


def test_repair_has_a_line_with_rate_and_eta_only_while_it_works(db: Database) -> None:
    assert "repair" not in _lines(db)
    body = {"left_volumes": 2, "left_bytes": 3_000_000, "bytes_per_s": 1e6, "eta_s": 300.0}
    _note(db, "repair", "cell", None, **body, blocked_slots=1)
    assert _lines(db)["repair"] == (
        "works on 2 volumes, about 3.0 MB to make, 1.0 MB/s, about 5 min to go; "
        "1 slot cannot be made now"
    )
    db.transact(lambda c: c.execute(passes.update().values(ended=START)))
    assert "repair" not in _lines(db)


def test_the_scrub_line_sums_up_the_nodes(db: Database) -> None:
    assert "scrub" not in _lines(db), "no node has told yet"
    _tell(db, 1)
    assert _lines(db)["scrub"] == "no pass under way, none has ended"
    _tell(db, 2, ended=START)
    assert _lines(db)["scrub"].endswith(", 1 node had none")
    _tell(db, 1, running=True, paused=True, bytes_done=5, bytes_total=50, findings=2)
    assert _lines(db)["scrub"] == (
        "1 of 2 nodes in a pass, 10 % of 50 B read, 1 paused; 2 fragments set aside"
    )
    _tell(db, 1, index_damaged=True, ended=START)
    assert _lines(db)["damaged"] == "a part of the index of 1 node is unreadable"


def test_canaries_have_no_line_and_their_alarms_a_series(db: Database) -> None:
    _note(db, "canary", "small", None, state="spoiled", alarmed=True, latest_s=7.0)
    shown = _exposed(_status(db))
    assert shown['haversack_canaries{state="spoiled"}'] == 1
    assert shown["haversack_canaries_unnoticed"] == 1
    assert shown["haversack_canary_notice_seconds"] == 7
    assert not [title for title in _lines(db) if "canar" in title]


def test_nothing_of_nothing_is_all_of_it() -> None:
    assert (percent(0, 0), percent(9, 8), percent(1, 3)) == ("100 %", "100 %", "33 %")
