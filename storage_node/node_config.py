"""What a storage-node process is told.  The controller sends it, and must not load RocksDB."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import NodeId
from protocol.limits import (
    CLIENT_SPACE_SHARE,
    GIB,
    MIB,
    PLACEMENT_SPACE_SHARE,
    REPAIR_SPACE_SHARE,
)


@dataclass(frozen=True, slots=True)
class NodeUpkeep:
    """How a node looks after its disk; the same for all nodes of a cell."""

    scrub_period_s: float = 14 * 24 * 3600
    """Within this, the node reads and checks every fragment it holds."""
    scrub_bytes_per_s_max: int = 32 * MIB
    """Bound of that reading, unless an operator asks for a pass at once."""
    placement_space_share: float = PLACEMENT_SPACE_SHARE
    client_space_share: float = CLIENT_SPACE_SHARE
    repair_space_share: float = REPAIR_SPACE_SHARE
    """Of the capacity, up to which volumes, puts of clients and puts of repair are taken."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything a node process is told; plain data, so that it can be sent to one."""

    node_id: NodeId
    directory: str
    cluster_id: str
    secret_file: str
    bind_host: str
    capacity_bytes: int | None
    """What the node may fill; its file system's size when None."""
    namespace: str
    """Ray namespace of the registrar."""
    registrar: str
    """Name of the placement actor."""
    reserve_bytes: int = 1 * GIB
    log_file: str | None = None
    upkeep: NodeUpkeep = NodeUpkeep()
