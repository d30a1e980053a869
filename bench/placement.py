"""How long planning takes: `python -m bench.placement`.  Figures of `docs/design/007-placement.md`.

10,000 nodes in 100 racks of 10 hosts, weights 1 to 5, rs-6-3; CPU time, one core.
"""

from __future__ import annotations

import random
import time
from collections import Counter

from cluster.placement import plan_slots
from cluster.topology import NodeState, NodeView
from erasure.scheme import Scheme
from protocol.ids import NodeId

NODES = 10_000
VOLUMES = (10**3, 10**4, 10**5, 10**6)


def make_node(number: int) -> NodeView:
    """Node of a regular cell."""
    return NodeView(
        node_id=NodeId(f"node-{number:05d}"),
        store_id="",
        directory="",
        host=f"host-{number // 10}",
        rack=f"rack-{number // 100}",
        weight=1.0 + number % 5,
        state=NodeState.UP,
        state_since=0.0,
        incarnation=1,
        endpoint="",
        pid=1,
        capacity_bytes=1 << 44,
        free_bytes=1 << 43,
        used_bytes=0,
        fragments=0,
        detail="",
    )


def main() -> None:
    """Print one line per number of volumes."""
    nodes = [make_node(number) for number in range(NODES)]
    weights = {node.node_id: node.weight for node in nodes}
    scheme = Scheme.rs(6, 3)
    for count in VOLUMES:
        began = time.process_time()
        planned = plan_slots(nodes, scheme, count, random.Random(1))
        spent_s = time.process_time() - began
        load: Counter[NodeId] = Counter()
        for slots in planned:
            load.update(node_id for node_id in slots if node_id is not None)
        per_weight = [load[node.node_id] / weights[node.node_id] for node in nodes]
        mean = sum(per_weight) / len(per_weight)
        print(
            f"{count:9,} volumes {spent_s:7.2f} s {spent_s / count * 1e6:7.1f} us a volume, "
            f"load per weight {min(per_weight) / mean:.2f} to {max(per_weight) / mean:.2f} of even"
        )


if __name__ == "__main__":
    main()
