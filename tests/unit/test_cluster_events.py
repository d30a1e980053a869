"""What happened, kept for people who ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cell_rows import START, HandClock, empty_database, new_cell
from sqlalchemy import Connection, func, select

from cluster import events
from cluster.alarms import read_raised
from cluster.events import CELL, EventKind, read_events, record_event
from cluster.schema import events as table
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, HandClock())
    yield database
    database.close()


def test_events_of_a_subject_come_newest_first(db: Database) -> None:
    node, volume, block = NodeId("node-03"), VolumeId(12), BlockHash.of_digest(bytes(32))
    for at, subject in enumerate((node, volume, block, node, CELL)):
        kind = EventKind.NODE_STATE if subject == node else EventKind.ALARM_RAISED
        db.transact(
            lambda c, at=at, kind=kind, subject=subject: record_event(
                c, float(at), kind, subject, f"number {at}"
            )
        )
    found = db.read_now(lambda c: read_events(c, node))
    assert [(event.at, event.subject, event.detail) for event in found] == [
        (3.0, "node-03", "number 3"),
        (0.0, "node-03", "number 0"),
        (START, "node-03", "rack rack, host host, weight 1"),
    ]
    assert [event.kind for event in found[1:]] == [EventKind.NODE_STATE, EventKind.NODE_ADDED]
    subjects = [event.subject for event in db.read_now(lambda c: read_events(c, limit=4))]
    assert subjects == ["cell", "node-03", str(block), "v12"]


def test_an_event_is_there_exactly_if_its_transaction_is(db: Database) -> None:
    def work(connection: Connection) -> None:
        record_event(connection, 1.0, EventKind.LEADER, CELL)
        raise RuntimeError("the change failed")

    before = db.read_now(read_events)
    with pytest.raises(RuntimeError):
        db.transact(work)
    assert db.read_now(read_events) == before


def test_the_table_stays_bounded_and_keeps_the_newest(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVENTS_KEPT", 300)

    def work(connection: Connection) -> None:
        for at in range(2_000):
            record_event(connection, float(at), EventKind.NODE_STATE, CELL)

    db.transact(work)
    count = db.read_now(lambda c: c.execute(select(func.count()).select_from(table)).scalar_one())
    assert 300 <= count < 300 + 256
    assert [event.at for event in db.read_now(lambda c: read_events(c, limit=300))] == [
        float(at) for at in range(1_999, 1_699, -1)
    ]


def test_an_alarm_outlives_the_noise_around_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVENTS_KEPT", 300)

    def work(connection: Connection) -> None:
        record_event(connection, 1.0, EventKind.ALARM_RAISED, "canary-1", "nobody noticed")
        record_event(connection, 1.0, EventKind.ALARM_RAISED, "canary-2", "nobody noticed")
        record_event(connection, 2.0, EventKind.ALARM_CLEARED, "canary-2")
        for at in range(1_500):
            record_event(connection, float(at), EventKind.NODE_STATE, CELL)

    db.transact(work)
    assert [alarm.subject for alarm in db.read_now(read_raised)] == ["canary-1"]


def test_a_long_detail_is_cut(db: Database) -> None:
    db.transact(lambda c: record_event(c, 1.0, EventKind.ALARM_RAISED, CELL, "x" * 5_000))
    (event,) = db.read_now(lambda c: read_events(c, limit=1))
    assert len(event.detail) == events.DETAIL_CHARACTERS_MAX
    assert event.detail.endswith("…")
