"""Times and amounts of the placement service, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.limits import MIB


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """Durations in seconds."""

    lease_s: float = 10.0
    """How long a node may acknowledge writes without hearing from the leader: a placement service
    that is restarted (a few seconds) must not stop the cell's writes."""

    lease_interval_s: float = 1.0
    """Between two pushes to a node: also how soon its silence is noticed."""

    call_deadline_s: float = 2.0
    """For one call to a node: a disk that takes longer is no use to a put."""

    misses_until_suspect: int = 2
    """One lost packet is not a suspicion."""

    down_after_s: float = 6.0
    """Silence after which a node's volumes are sealed: longer than a storage actor takes to be
    restarted on its own (two to four seconds), shorter than its lease."""

    start_grace_s: float = 15.0
    """After taking the role: no node is down for its silence, and no volume is opened on the few
    nodes that answered first, until all were heard or so long has passed.  A cold start opens
    nine stores."""

    review_interval_s: float = 5.0
    """Between two looks at how full the open volumes are: a stock of them lasts longer."""

    report_interval_s: float = 10.0
    """Between two summaries of a node, and between two transactions that store them."""

    disk_report_interval_s: float = 60.0
    """Between two transactions that store how far a node's scrub is and how full its disk: what
    changes all the time.  A pass that begins or ends, or a finding, is stored with the next
    summary."""

    sightings_interval_s: float = 2.0
    """Between two looks at what gateways say of nodes."""

    write_failed_s: float = 60.0
    """How long after a failed write a node is kept out of open volumes: it opens its store again
    within seconds, and then looks well until somebody writes to it."""

    room_bytes_min: int = 256 * MIB
    """Free space from which a node that was full counts as one with room again, so that a delete
    here and a put there do not seal volumes in turns: more than a volume puts on one node.  On a
    disk smaller than sixteen times that, a sixteenth of it."""

    retired_after_s: float = 30.0
    """How long open volumes of a scheme that new blocks do not get any more are left open: longer
    than a gateway goes on with an old map while its database is busy."""

    open_volumes: int = 4
    """Open volumes per scheme: enough node sets to route around a slow node, few enough that each
    fills before it grows old."""

    def __post_init__(self) -> None:
        assert self.lease_interval_s + self.call_deadline_s < self.down_after_s < self.lease_s
        assert self.misses_until_suspect >= 1
        assert self.open_volumes >= 1
