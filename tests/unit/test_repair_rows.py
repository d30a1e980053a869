"""What repair reads first when more is lost than it looks at."""

from __future__ import annotations

from pathlib import Path

from cell_rows import RS, HandClock, Rows, empty_database, new_cell, node_ids

from cluster.repair.repair_rows import read_view
from protocol.ids import NodeId

NODES = 1_500


def test_a_volume_that_lost_most_comes_first_however_its_nodes_are_numbered(
    tmp_path: Path,
) -> None:
    db = empty_database(tmp_path)
    new_cell(db, HandClock(), NODES)
    rows = Rows(db)
    out = sorted(node_ids(NODES)[: NODES - 20])
    whole = node_ids(NODES)[-20:]
    for number in range(20):
        rows.open_volume(RS, (*out[2 * number : 2 * number + 2], *whole[:7]))
    far_apart: tuple[NodeId, ...] = (out[100], out[700], out[1_400])
    worst = rows.open_volume(RS, (*far_apart, *whole[:6]))
    view = db.read_now(lambda connection: read_view(connection, out, volumes_max=5))
    assert len(view.volumes) == 5
    assert worst.volume_id in {volume.volume_id for volume in view.volumes}
    db.close()
