"""Whether a node process serves its disk.

                 own directory seen                    store open
      refusing ----------------------> opening --------------------> serving
         ^                               |  ^                           |
         |   missing, foreign, corrupt   |  |     opened again          | a write failed
         +-------------------------------+  +----------- failed <-------+

      every state but closing -> closing (stop asked for; the end)

Owned by `StorageNode`; reported in every lease answer and summary.  Not to be confused with
`cluster.topology.NodeState`, the cell's opinion of the node.

| state    | reads | writes                | left by                                      |
|----------|-------|-----------------------|----------------------------------------------|
| opening  | no    | no                    | the store opened, or the directory refused   |
| refusing | no    | no                    | the directory shows its own identity again   |
| serving  | yes   | with a live lease     | a failed write, a stop                       |
| failed   | yes   | no                    | the store being closed to be opened again    |
| closing  | no    | no                    | (the process ends)                           |
"""

from __future__ import annotations

import enum
from typing import Final


class ServiceState(enum.StrEnum):
    """What a node process does with its disk."""

    OPENING = "opening"
    REFUSING = "refusing"
    SERVING = "serving"
    FAILED = "failed"
    CLOSING = "closing"


class Fault(enum.StrEnum):
    """What a node knows to be wrong with its disk.  Append-only: travels as text."""

    NONE = ""
    DIRECTORY = "directory"
    """Missing, empty, another node's or of a newer version: for an operator to put right.  Says
    nothing about what the disk holds."""
    DISK = "disk"
    """Cannot be relied on: I/O errors, a store or an index that cannot be read, failing writes."""


TRANSITIONS: Final[dict[ServiceState, frozenset[ServiceState]]] = {
    ServiceState.OPENING: frozenset(
        {ServiceState.SERVING, ServiceState.REFUSING, ServiceState.CLOSING}
    ),
    ServiceState.REFUSING: frozenset({ServiceState.OPENING, ServiceState.CLOSING}),
    ServiceState.SERVING: frozenset({ServiceState.FAILED, ServiceState.CLOSING}),
    ServiceState.FAILED: frozenset({ServiceState.OPENING, ServiceState.CLOSING}),
    ServiceState.CLOSING: frozenset(),
}


def transition(current: ServiceState, target: ServiceState) -> ServiceState:
    """`target`, if the table allows the step; a state may always be entered again."""
    assert target is current or target in TRANSITIONS[current], f"{current} -> {target}"
    return target
