"""Tables of `cell.db`: what the cell is made of and where every block lies.

Read by `map_rows`, `block_index`, `cell`, `leadership` and `status`, which hold all of the SQL on
them.  Imports SQLAlchemy only.  Changes go through `cluster/migrations` (`docs/design/008`).

| table        | one row per                    | written by                                    |
|--------------|--------------------------------|-----------------------------------------------|
| cell         | cell (exactly one)             | `cell.create_cell`                            |
| map_version  | cell (exactly one)             | every change that a client's map must see     |
| nodes        | storage node                   | `cell.add_nodes`, the placement service       |
| disk_reports | node that told of its disk     | the placement service                         |
| volumes      | volume                         | the placement service; counters: block index  |
| volume_slots | slot of a volume               | the placement service                         |
| blocks       | live block                     | the block index                               |
| claims       | (account, block)               | the block index                               |
| debts        | fragment known to be missing   | the block index                               |
| slot_moves   | slot being rebuilt or moved    | repair                                        |
| unrepairable | block that repair gave up on   | repair                                        |
| stray        | fragment in no row's slot      | the verifier                                  |
| passes       | pass of a verifier or scrubber | the verifier, repair                          |
| watched      | write that will be read again  | the watchers of gateways                      |
| jobs         | change that somebody asked for | the API, repair                               |
| events       | thing that happened            | placement, repair, the verifier               |
| sightings    | (gateway, node in trouble)     | the lookouts of gateways; pruned: placement   |
| leaders      | role that one process may hold | `leadership`                                  |
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData()

cell = Table(
    "cell",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("cluster_id", String, nullable=False),
    Column("scheme", String, nullable=False),
    Column("format", Integer, nullable=False),
    Column("fingerprint", String, nullable=False),
    Column("created", Float, nullable=False),
    # Null in cells that were made before schemes could change: they still have the first one.
    Column("created_scheme", String, nullable=True),
)

map_version = Table(
    "map_version",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    # Volume numbers are part of fragment keys on disks, so one is never given out twice.
    Column("next_volume", BigInteger, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String, primary_key=True),
    Column("store_id", String, nullable=False),
    Column("directory", String, nullable=False),
    Column("host", String, nullable=False),
    Column("rack", String, nullable=False),
    Column("weight", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("state_since", Float, nullable=False),
    Column("incarnation", BigInteger, nullable=False),
    Column("endpoint", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("capacity_bytes", BigInteger, nullable=False),
    Column("free_bytes", BigInteger, nullable=False),
    Column("used_bytes", BigInteger, nullable=False),
    Column("fragments", BigInteger, nullable=False),
    Column("detail", String, nullable=False),
    # The node says itself that its disk is bad: its slots are placed anew without waiting.
    Column("disk_failed", Boolean, nullable=False, server_default=text("false")),
    # Until no new volume should be placed on it; -1 until it says so.
    Column("placement_free_bytes", BigInteger, nullable=False, server_default=text("-1")),
    # Map version of the row's last change; bytes, fragments and detail do not count as one.
    Column("changed", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

disk_reports = Table(
    "disk_reports",
    metadata,
    Column("node_id", String, primary_key=True),
    Column("at", Float, nullable=False),
    # JSON: a `SpaceReport` and a `ScrubProgress` of `protocol.messages`, as arrays.
    Column("space", Text, nullable=False),
    Column("scrub", Text, nullable=False),
    sqlite_with_rowid=False,
)

volumes = Table(
    "volumes",
    metadata,
    Column("volume_id", BigInteger, primary_key=True, autoincrement=False),
    Column("scheme", String, nullable=False),
    Column("state", String, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("plain_bytes", BigInteger, nullable=False),
    Column("blocks", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    # Map version of the last change of state, epoch or slots; the counters do not count as one.
    Column("changed", BigInteger, nullable=False),
    Index(
        "volumes_open",
        "volume_id",
        sqlite_where=text("state = 'open'"),
        postgresql_where=text("state = 'open'"),
    ),
    Index("volumes_changed", "changed"),
    sqlite_with_rowid=False,
)

volume_slots = Table(
    "volume_slots",
    metadata,
    Column("volume_id", BigInteger, ForeignKey("volumes.volume_id"), primary_key=True),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("node_id", String, ForeignKey("nodes.node_id"), nullable=True),
    Index("volume_slots_node", "node_id"),
    sqlite_with_rowid=False,
)

blocks = Table(
    "blocks",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    # No foreign key: the inserting transaction has compared volume, epoch and slots already.
    Column("volume_id", BigInteger, nullable=False),
    Column("stored_bytes", Integer, nullable=False),
    Column("plain_bytes", Integer, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("created", Float, nullable=False),
    # Account whose put made this row: its claim lasts from `created`, without a row in `claims`.
    Column("owner", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

claims = Table(
    "claims",
    metadata,
    Column("owner", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, primary_key=True),
    Column("expires", Float, nullable=False),
    sqlite_with_rowid=False,
)

debts = Table(
    "debts",
    metadata,
    Column("volume_id", BigInteger, primary_key=True, autoincrement=False),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, primary_key=True),
    Column("since", Float, nullable=False),
    # `DebtReason`: never written, or lost since and how that showed.
    Column("reason", String, nullable=False, server_default=text("'not written'")),
    sqlite_with_rowid=False,
)

leaders = Table(
    "leaders",
    metadata,
    Column("role", String, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", String, nullable=False),
    Column("since", Float, nullable=False),
    sqlite_with_rowid=False,
)

slot_moves = Table(
    "slot_moves",
    metadata,
    Column("volume_id", BigInteger, primary_key=True, autoincrement=False),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    # Where the slot's fragments are being made; the map says so only once all were verified there.
    Column("target", String, nullable=False),
    # Of the volume since the move began; a put of an earlier epoch is fenced.
    Column("epoch", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
    Column("job_id", BigInteger, nullable=True),
    Column("begun", Float, nullable=False),
    Index("slot_moves_target", "target"),
    sqlite_with_rowid=False,
)

unrepairable = Table(
    "unrepairable",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("volume_id", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
    Column("since", Float, nullable=False),
    Column("tried", Float, nullable=False),
    Index("unrepairable_volume", "volume_id"),
    sqlite_with_rowid=False,
)

stray = Table(
    "stray",
    metadata,
    Column("node_id", String, primary_key=True),
    Column("volume_id", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, primary_key=True),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    # `Difference`: an orphan, misplaced, or stale.
    Column("kind", String, nullable=False),
    # Of the record, bytes.
    Column("length", Integer, nullable=False),
    Column("first_seen", Float, nullable=False),
    # Number of the verifier's pass that saw it last.
    Column("pass_number", BigInteger, nullable=False),
    # When its removal began; NULL for all but the few that are being deleted now.
    Column("removing", Float, nullable=True),
    sqlite_with_rowid=False,
)

passes = Table(
    "passes",
    metadata,
    Column("kind", String, primary_key=True),
    Column("subject", String, primary_key=True),
    # Counts the passes of this kind and subject, or their requests.
    Column("number", BigInteger, nullable=False),
    Column("begun", Float, nullable=False),
    Column("ended", Float, nullable=True),
    # JSON: where it stands, counts, examples.
    Column("body", Text, nullable=False),
    sqlite_with_rowid=False,
)

watched = Table(
    "watched",
    metadata,
    Column("hash", LargeBinary, primary_key=True),
    Column("acknowledged", Float, nullable=False),
    # Looks that are over; the next one is due at `due`, or was taken by a gateway until then.
    Column("step", SmallInteger, nullable=False),
    Column("due", Float, nullable=False),
    # Attempts at this look that were answered by an error that may pass.
    Column("tries", SmallInteger, nullable=False),
    Index("watched_due", "due"),
    sqlite_with_rowid=False,
)

sightings = Table(
    "sightings",
    metadata,
    # A gateway's process, and a node that it, another gateway or placement does not reach.
    Column("gateway", String, primary_key=True),
    Column("node_id", String, primary_key=True),
    Column("incarnation", BigInteger, nullable=False),
    Column("reachable", Boolean, nullable=False),
    Column("reason", String, nullable=False),
    # How many nodes the gateway reached lately, and how many it did not.
    Column("reached", Integer, nullable=False),
    Column("missed", Integer, nullable=False),
    # Both by the gateway's clock: readers compare `written` only with itself.
    Column("since", Float, nullable=False),
    Column("written", Float, nullable=False),
    sqlite_with_rowid=False,
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    # JSON: what was asked for.
    Column("arguments", Text, nullable=False),
    Column("state", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("changed", Float, nullable=False),
    Column("done_units", BigInteger, nullable=False),
    Column("total_units", BigInteger, nullable=False),
    Column("done_bytes", BigInteger, nullable=False),
    Column("total_bytes", BigInteger, nullable=False),
    Column("bytes_per_s", Float, nullable=False),
    Column("detail", String, nullable=False),
    # JSON: volumes that get no further, with the reasons.
    Column("blockers", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("event_id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("kind", String, nullable=False),
    # `node-03`, `v12` or a block's hash: what `why` is asked about.
    Column("subject", String, nullable=False),
    Column("detail", String, nullable=False),
    Index("events_subject", "subject", "event_id"),
)
