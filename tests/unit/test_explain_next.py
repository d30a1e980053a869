"""`haversack why` says of a node that is down what repair will do, by repair's own rule."""

from __future__ import annotations

import pytest
from cell_rows import node_ids

from cluster.explain.next_action import Times, _of_node
from cluster.repair.plan import NodeWord, is_out
from cluster.repair.settings import RepairSettings
from cluster.topology import NodeState, NodeView

NOW = 1_000_000.0
SETTINGS = RepairSettings(out_after_s=900.0, refusing_out_after_s=86_400.0)
(NODE,) = node_ids(1)


def down(for_s: float, *, disk_failed: bool = False) -> NodeView:
    return NodeView(
        node_id=NODE,
        store_id="store-1",
        directory="/disks/1",
        host="h",
        rack="r",
        weight=1.0,
        state=NodeState.DOWN,
        state_since=NOW - for_s,
        incarnation=1,
        endpoint="127.0.0.1:1",
        pid=1,
        capacity_bytes=1,
        free_bytes=1,
        used_bytes=0,
        fragments=0,
        detail="",
        disk_failed=disk_failed,
    )


@pytest.mark.parametrize("for_s", [60.0, 1_000.0, 90_000.0])
@pytest.mark.parametrize("word", list(NodeWord))
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("disk_failed", [False, True])
def test_what_is_said_of_a_node_that_is_down_agrees_with_what_repair_does(
    for_s: float, word: NodeWord, is_read: bool, disk_failed: bool
) -> None:
    node = down(for_s, disk_failed=disk_failed)
    reached = frozenset({NODE}) if is_read else frozenset()
    said = _of_node(node, Times(NOW, SETTINGS, reached, {NODE: word}))
    out = is_out(node, NOW, SETTINGS, word, is_read=is_read)
    assert ("it is out" in said or "its disk failed" in said) is out, said


def test_how_long_a_node_has_left_depends_on_why_it_is_away() -> None:
    silent = _of_node(down(60), Times(NOW, SETTINGS))
    assert silent.endswith("its slots are placed anew in 14 min unless it comes back")
    refusing = _of_node(down(60), Times(NOW, SETTINGS, words={NODE: NodeWord.REFUSES}))
    assert refusing.endswith("its slots are placed anew in 23 h unless it comes back")
