"""Times and amounts of repair, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.verify.settings import VerifierSettings
from protocol.config import Settings
from protocol.limits import GIB, MIB


@dataclass(frozen=True, slots=True)
class RepairSettings:
    """Durations in seconds, amounts in bytes."""

    out_after_s: float = 900.0
    """See `Settings.node_out_after_s`."""

    refusing_out_after_s: float = 24 * 3600.0
    """See `Settings.node_refusing_out_after_s`."""

    last_fragment_wait_s: float = 24 * 3600.0
    """How long a slot waits for its old disk if some of its blocks cannot be made from others."""

    bytes_per_s_max: float = 1.0 * GIB
    bytes_per_s_min: float = 4.0 * MIB
    """Written by repair: at most, and while it yields to clients."""

    live_latency_s: float = 0.02
    """A trifling call to a node that takes longer says that clients wait too."""

    headroom_share: float = 0.02
    """Of a node's capacity, left free by repair."""

    look_s: float = 1.0
    """Between two looks at the map's version: how soon a lost node is noticed."""

    pass_s: float = 20.0
    """Between two passes while the map does not change: debts do not change it."""

    report_s: float = 2.0
    """Between two notes of progress in SQL."""

    call_s: float = 15.0
    """One call to a node: a frame of some MiB on a busy disk."""

    verify_s: float = 60.0
    """A node's verification of some thousand records."""

    volumes_at_once: int = 2
    """Volumes worked on at the same time: the nodes of one seldom keep all disks busy."""

    batches_at_once: int = 2
    """Batches of stripes of one volume in memory at the same time: one is read while another is
    coded and written."""

    batch_bytes: int = 32 * MIB
    """Stored bytes of the stripes of one batch: some MiB of each slot in one frame."""

    batch_blocks: int = 1_024
    """Stripes of one batch, however small they are."""

    volumes_per_pass: int = 64
    """Volumes that one plan takes on: what is closest to loss is looked for again after them."""

    volumes_seen_max: int = 4_096
    """Damaged volumes read into one plan, those with most lost slots first."""

    debts_per_volume: int = 4_096
    """Debts of one volume repaid in one go."""

    rounds_max: int = 3
    """How often the rest of a slot is made again before its target counts as unfit."""

    delete_fade_s: float = VerifierSettings().fade_s
    """For so long after the verifier sent a delete without an answer, no move begins there."""

    retry_unrepairable_s: float = 600.0
    """Before a block that could not be made is tried again, if nothing changed in between."""

    def __post_init__(self) -> None:
        assert 0 < self.out_after_s <= self.refusing_out_after_s
        assert 0 < self.bytes_per_s_min <= self.bytes_per_s_max
        assert self.volumes_per_pass <= self.volumes_seen_max


def repair_settings(settings: Settings) -> RepairSettings:
    """What an operator may set of repair's times and amounts."""
    return RepairSettings(
        out_after_s=settings.node_out_after_s,
        refusing_out_after_s=settings.node_refusing_out_after_s,
        last_fragment_wait_s=settings.node_refusing_out_after_s,
        bytes_per_s_max=float(settings.repair_bytes_per_s_max),
        bytes_per_s_min=float(settings.repair_bytes_per_s_min),
        live_latency_s=settings.repair_live_latency_s,
        headroom_share=settings.repair_headroom_share,
    )
