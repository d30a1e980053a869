"""SQL of the table of strays: fragments in no row's slot, since when, and which are being removed.

Written by the verifier alone, inside transactions that have checked its role.  Functions over a
connection; no clock, no event loop, no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Connection,
    Row,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from cluster.schema import stray
from cluster.verify.differences import Difference
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey

_KEYS_PER_QUERY: Final = 200

_KEY: Final = (stray.c.node_id, stray.c.volume_id, stray.c.hash, stray.c.slot)
_AT_KEY: Final = and_(
    stray.c.node_id == bindparam("at_node"),
    stray.c.volume_id == bindparam("at_volume"),
    stray.c.hash == bindparam("at_hash"),
    stray.c.slot == bindparam("at_slot"),
)


class StrayRow(NamedTuple):
    """One row."""

    node: NodeId
    key: FragmentKey
    kind: Difference
    length: int
    first_seen: float
    pass_number: int
    removing: float | None

    @property
    def place(self) -> tuple[NodeId, FragmentKey]:
        """What names the row."""
        return self.node, self.key


class StrayTotal(NamedTuple):
    """Sums of one class."""

    kind: Difference
    fragments: int
    bytes: int
    oldest: float


def save_strays(connection: Connection, found: Sequence[StrayRow], room: int) -> tuple[int, int]:
    """Write down what a pass saw; what is known keeps its age.

    At most `room` rows are added.  Returns how many were new, and how many found no room.
    """
    places = [row.place for row in found]
    known = {row.place for row in read_places(connection, places)}
    new = [row for row in found if row.place not in known]
    old = [row for row in found if row.place in known]
    if old:
        connection.execute(
            update(stray)
            .where(_AT_KEY)
            .values(
                kind=bindparam("new_kind"),
                length=bindparam("new_length"),
                pass_number=bindparam("new_pass"),
            ),
            [
                {
                    **_parameters(row.place),
                    "new_kind": row.kind.value,
                    "new_length": row.length,
                    "new_pass": row.pass_number,
                }
                for row in old
            ],
        )
    added = new[: max(room, 0)]
    if added:
        connection.execute(insert(stray), [_values(row) for row in added])
    return len(added), len(new) - len(added)


def read_places(
    connection: Connection, places: Sequence[tuple[NodeId, FragmentKey]]
) -> list[StrayRow]:
    """Those of the rows that exist."""
    found: list[StrayRow] = []
    for start in range(0, len(places), _KEYS_PER_QUERY):
        part = [
            (str(node), int(key.volume), bytes(key.block), key.slot)
            for node, key in places[start : start + _KEYS_PER_QUERY]
        ]
        query = select(stray).where(tuple_(*_KEY).in_(part))
        found += [_row(row) for row in connection.execute(query)]
    return found


def page_strays(
    connection: Connection,
    after: tuple[NodeId, FragmentKey] | None,
    limit: int,
    first_seen: tuple[float, float] = (float("-inf"), float("inf")),
    kind: Difference | None = None,
) -> list[StrayRow]:
    """Rows in key order after one of them, first seen from one instant up to another; of one
    class if it is named."""
    query = select(stray).order_by(*_KEY).limit(limit)
    if kind is not None:
        query = query.where(stray.c.kind == kind.value)
    oldest, newest = first_seen
    if oldest != float("-inf"):
        query = query.where(stray.c.first_seen > oldest)
    if newest != float("inf"):
        query = query.where(stray.c.first_seen <= newest)
    if after is not None:
        node, key = after
        named, volume, block = str(node), int(key.volume), bytes(key.block)
        here = stray.c.node_id == named
        query = query.where(
            or_(
                stray.c.node_id > named,
                and_(here, stray.c.volume_id > volume),
                and_(here, stray.c.volume_id == volume, stray.c.hash > block),
                and_(
                    here,
                    stray.c.volume_id == volume,
                    stray.c.hash == block,
                    stray.c.slot > key.slot,
                ),
            )
        )
    return [_row(row) for row in connection.execute(query)]


def forget_strays(connection: Connection, places: Iterable[tuple[NodeId, FragmentKey]]) -> None:
    """These are strays no more, or are gone."""
    parameters = [_parameters(place) for place in places]
    if parameters:
        connection.execute(delete(stray).where(_AT_KEY), parameters)


def forget_unseen(
    connection: Connection, node: NodeId, after: int, last: int, pass_number: int
) -> int:
    """A node was looked at completely in a range of volumes: what this pass did not see is gone."""
    done = connection.execute(
        delete(stray).where(
            stray.c.node_id == str(node),
            stray.c.volume_id > after,
            stray.c.volume_id <= last,
            stray.c.pass_number != pass_number,
        )
    )
    return done.rowcount


def mark_removing(
    connection: Connection, places: Iterable[tuple[NodeId, FragmentKey]], since: float | None
) -> None:
    """Note that deletes of these are about to be sent; None: none is under way any more."""
    parameters = [{**_parameters(place), "since": since} for place in places]
    if parameters:
        connection.execute(
            update(stray).where(_AT_KEY).values(removing=bindparam("since")), parameters
        )


def may_receive(
    connection: Connection, node: NodeId, volume: VolumeId, slot: int, fade_after: float
) -> bool:
    """Whether fragments of a slot may be made on a node: no delete of such a fragment there can
    still be under way.  Asked in the transaction that begins a move.

    `fade_after`: wall-clock instant before which a delete was surely carried out or lost.
    """
    under_way = connection.execute(
        select(stray.c.hash)
        .where(
            stray.c.node_id == str(node),
            stray.c.volume_id == int(volume),
            stray.c.slot == slot,
            stray.c.removing > fade_after,
        )
        .limit(1)
    ).first()
    return under_way is None


def count_strays(connection: Connection) -> int:
    """Rows of the table."""
    count: int = connection.execute(select(func.count()).select_from(stray)).scalar_one()
    return count


def stray_totals(connection: Connection) -> list[StrayTotal]:
    """Sums by class, for status and metrics."""
    query = (
        select(
            stray.c.kind,
            func.count().label("fragments"),
            func.sum(stray.c.length).label("bytes"),
            func.min(stray.c.first_seen).label("oldest"),
        )
        .group_by(stray.c.kind)
        .order_by(stray.c.kind)
    )
    return [
        StrayTotal(Difference(row.kind), row.fragments, int(row.bytes), row.oldest)
        for row in connection.execute(query)
    ]


def _row(row: Row[Any]) -> StrayRow:
    return StrayRow(
        NodeId(row.node_id),
        FragmentKey(VolumeId(row.volume_id), BlockHash(row.hash), row.slot),
        Difference(row.kind),
        row.length,
        row.first_seen,
        row.pass_number,
        row.removing,
    )


def _values(row: StrayRow) -> dict[str, Any]:
    return {
        "node_id": str(row.node),
        "volume_id": int(row.key.volume),
        "hash": bytes(row.key.block),
        "slot": row.key.slot,
        "kind": row.kind.value,
        "length": row.length,
        "first_seen": row.first_seen,
        "pass_number": row.pass_number,
        "removing": row.removing,
    }


def _parameters(place: tuple[NodeId, FragmentKey]) -> dict[str, Any]:
    node, key = place
    return {
        "at_node": str(node),
        "at_volume": int(key.volume),
        "at_hash": bytes(key.block),
        "at_slot": key.slot,
    }
