"""Ray shell of the placement service.  Every method is one call of the core.

Created by the controller under a fixed name; storage-node actors register through it.  Ray runs
`__init__` again after a death, so that taking the role over is the ordinary start.

A process that holds a handle to an actor imports the module of its class.  So this one imports
nothing at its top but Ray: nine storage nodes would otherwise load SQL to register (14 MB each).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from storage_node.interface import NodeRegistration


class PlacementActor:
    """The placement service of one cell."""

    def __init__(self, data: str) -> None:
        """`data`: directory of the cell."""
        from cluster.placement_host import PlacementHost  # see the module's docstring

        self._host = PlacementHost(Path(data))
        self._task = asyncio.get_running_loop().create_task(self._host.run())

    async def register(self, registration: NodeRegistration) -> int:
        """A node opened its store: its new incarnation."""
        return await self._host.register(registration)

    async def stop(self) -> None:
        """Give up the role in order."""
        self._task.cancel()
        await self._host.stop()


def remote_placement() -> Any:
    """The actor class: restarted for ever, never retried by Ray, no share of a core reserved."""
    remote: Any = ray.remote
    return remote(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=1000,
        lifetime=None,
    )(PlacementActor)
