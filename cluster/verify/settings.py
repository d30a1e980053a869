"""Times and amounts of the verifier, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.limits import MIB


@dataclass(frozen=True, slots=True)
class VerifierSettings:
    """Durations in seconds."""

    period_s: float = 7 * 24 * 3600.0
    """Between the starts of two passes."""

    poll_s: float = 2.0
    """Between two looks for a request: a person waits for it."""

    grace_s: float = 24 * 3600.0
    """A stray younger than this is left alone, whoever asks: a put, a move or a job may still be
    at work on it, and an operator has a day to notice a database that was put back."""

    settle_s: float = 60.0
    """A fragment without a row is not called a stray before: twice as long as a put may take
    from its first fragment to its row."""

    asked_settle_s: float = 5.0
    """The same when a person waits for the end.  Nearly every put has its row by then; what has
    none and is younger than `settle_s` is reported as too young to tell, not as an orphan."""

    section_blocks_max: int = 500_000
    """Rows of the block index in memory at a time: some 50 MB.  A pass reads the index once for
    each so many blocks."""

    index_page_rows: int = 20_000
    """Rows of the index that one read transaction looks at."""

    inventory_page_keys: int = 16_384

    call_s: float = 30.0
    """For one call to a node: a page of its inventory, or the reading of a batch of records."""

    call_attempts: int = 3
    """Before a node is not looked at in this section."""

    retry_pause_s: float = 1.0

    confirm_batch: int = 1_000
    """Suspects that are asked for again together."""

    deep_blocks: int = 128
    """Blocks whose stripes are read together by a deep pass."""

    deep_bytes_per_s: int = 64 * MIB
    """Read from all disks together by a deep pass: a tenth of what nine slow disks give."""

    findings_s: float = 15.0
    """Between two questions to a node for what its scrub found."""

    findings_page: int = 1_000

    strays_max: int = 1_000_000
    """Rows of the table of strays; more are only counted."""

    examples_max: int = 10
    """Kept for each class of difference."""

    removal_batch: int = 500
    """Strays whose removal is one step: bounded, so that it stops where it was told to."""

    removal_max: int = 50_000
    """Strays of one removal plan: it is held in memory; the rest is the next plan's."""

    fade_s: float = 30.0
    """For so long after a delete was sent without an answer it may still be carried out: the call's
    deadline and the longest lease of a node that was stopped."""

    def __post_init__(self) -> None:
        assert 0 < self.asked_settle_s <= self.settle_s < self.grace_s
        assert self.section_blocks_max >= 1
        assert self.call_attempts >= 1
