"""What the repair service's process runs beside it: the verifier, and the collector of findings.

Called by `cluster.repair.host` and the simulation.  Imports no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cluster.node_watch import Ports
from cluster.verify.findings_collector import FindingsCollector
from cluster.verify.service import VerifierService
from cluster.verify.settings import VerifierSettings
from protocol.clock import Clock
from protocol.config import Settings
from sql.database import Database


async def run_with_verifier(
    repair: Awaitable[None],
    db: Database,
    clock: Clock,
    ports: Ports,
    epoch: Callable[[], int],
    settings: VerifierSettings,
) -> None:
    """Run `repair`, and verification beside it, until one of them ends.

    Raises what it raised: `NotLeader` for all three when another process has taken the role.
    """
    verifier = VerifierService(db, clock, ports, epoch, settings)
    collector = FindingsCollector(db, clock, ports, epoch, settings)
    loop = asyncio.get_running_loop()
    tasks = [
        asyncio.ensure_future(repair),
        loop.create_task(verifier.run(), name="verifier"),
        loop.create_task(collector.run(), name="findings"),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def verifier_settings(settings: Settings) -> VerifierSettings:
    """What an operator may set of the verifier's times."""
    return VerifierSettings(period_s=settings.verify_period_s, grace_s=settings.stray_grace_s)
