"""What the controller runs: written by `cluster.members`, read by `cluster.supervisor`.

A file rather than a query, because a process that loads SQL and settings to read nine rows once
keeps 25 MB for the life of the cell.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from storage_node.node_config import NodeUpkeep

PLAN_FILE = "controller.json"


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """A storage-node actor to start."""

    node_id: str
    directory: str


@dataclass(frozen=True, slots=True)
class ControllerPlan:
    """One cell's actors."""

    cluster_id: str
    node_capacity_bytes: int | None
    upkeep: NodeUpkeep
    nodes: tuple[PlannedNode, ...]


def write_plan(data: Path, plan: ControllerPlan) -> None:
    """Replace the plan of a data directory: at every start, and when a node comes or goes.

    Gateways and the repair service may write at the same time, each from the table.
    """
    partial = data / f"{PLAN_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")
    partial.rename(data / PLAN_FILE)


def read_plan(data: Path) -> ControllerPlan:
    """The plan as it was written last."""
    plan = json.loads((data / PLAN_FILE).read_text(encoding="utf-8"))
    nodes = tuple(PlannedNode(**node) for node in plan["nodes"])
    upkeep = NodeUpkeep(**plan["upkeep"])
    return ControllerPlan(plan["cluster_id"], plan["node_capacity_bytes"], upkeep, nodes)
