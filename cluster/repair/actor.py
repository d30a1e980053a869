"""Ray shell of the repair service.  Every method is one call of the core.

Created by the controller under a fixed name.  Ray runs `__init__` again after a death, so that
taking the role over and going on where the move rows say is the ordinary start.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import ray

_NICENESS = 10
"""Behind gateways and nodes where cores are short: a tenth of a core is left even then."""


class RepairActor:
    """The repair service of one cell."""

    def __init__(self, data: str) -> None:
        """`data`: directory of the cell."""
        from cluster.repair.host import RepairHost  # the controller needs none of what it loads

        os.nice(_NICENESS)
        self._host = RepairHost(Path(data))
        self._task = asyncio.get_running_loop().create_task(self._host.run())

    async def stop(self) -> None:
        """Give up the role; moves under way go on at the next start."""
        self._task.cancel()
        await self._host.stop()


def remote_repair() -> Any:
    """The actor class: restarted for ever, never retried by Ray, no share of a core reserved."""
    remote: Any = ray.remote
    return remote(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=1000,
        lifetime=None,
    )(RepairActor)
