"""What a storage-node process is told.  The controller sends it, and must not load RocksDB."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import NodeId
from protocol.limits import GIB


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
