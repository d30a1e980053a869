"""What outlives a simulated process: its host's clocks, and how it is started again.

`chaos/sim/cell.py` has one `Host` per process of the cell.  A `Life` is one run of the program: a
`SimProcess` and whatever the operating system closes when it dies.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.sim.clock import VirtualClock
from chaos.sim.database import SqlFaults
from chaos.sim.process import ProcessState, SimProcess


@dataclass(slots=True)
class Life:
    """One process, from its start to its death."""

    number: int
    process: SimProcess
    closers: list[Callable[[], None]] = field(default_factory=list)
    """What the operating system closes when the process dies."""

    def end(self) -> None:
        """SIGKILL."""
        self.process.kill()
        closers, self.closers = self.closers, []
        for close in closers:
            close()


@dataclass(slots=True)
class Host:
    """One role (`node-03`, `placement`, `gateway-1`) and the lives that played it."""

    name: str
    clock: VirtualClock
    start: Callable[[Host, Life], None]
    """Assemble a new life: what the program does between `main` and serving."""
    seed: str
    sql_faults: SqlFaults = field(default_factory=SqlFaults)
    life: Life | None = None
    """The one that its supervisor knows of, dead or alive."""
    zombies: list[Life] = field(default_factory=list)
    """Earlier ones that were replaced while they were stopped, and not killed."""
    lives: int = 0
    retired: bool = False
    """Never started again: its disk is gone."""

    @property
    def alive(self) -> bool:
        """A process plays this role, if perhaps stopped."""
        return self.life is not None and self.life.process.alive

    @property
    def running(self) -> bool:
        """It is alive and not stopped."""
        return self.life is not None and self.life.process.state is ProcessState.RUNNING

    def rng(self, purpose: str) -> random.Random:
        """A generator of this life: what a new life draws does not depend on the old one's."""
        return random.Random(f"{self.seed}/{self.name}/{self.lives}/{purpose}")
