"""What a node says of itself and of what it holds, as messages.

Last step of INVENTORY, FINDINGS, LEASE and SUMMARY on a node: `StorageNode` asks its store and
passes the answers here.  Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from protocol.messages import (
    FindingsReply,
    InventoryReply,
    LeaseReply,
    ScrubProgress,
    SpaceReport,
    SummaryReply,
)
from storage_node.interface import Finding, FragmentKey, FragmentStore
from storage_node.service_state import Fault, ServiceState
from storage_node.space import Space


class Condition(NamedTuple):
    """What a node says of itself in every answer about itself."""

    state: ServiceState
    detail: str
    """Why it does not serve; empty while it does."""
    incarnation: int
    fault: Fault


def inventory_reply(page: Sequence[tuple[FragmentKey, int]], more: bool) -> InventoryReply:
    """A page of keys and record lengths."""
    return InventoryReply([key.pack() for key, _ in page], [length for _, length in page], more)


def findings_reply(found: Sequence[Finding], more: bool) -> FindingsReply:
    """A page of the fragments that are set aside."""
    return FindingsReply(
        [finding.key.pack() for finding in found],
        [int(finding.status) for finding in found],
        [finding.found_at for finding in found],
        more,
    )


def lease_reply(
    condition: Condition, store: FragmentStore | None, write_failures: int
) -> LeaseReply:
    """`store` is None unless the node serves; then no space is told."""
    return LeaseReply(
        condition.incarnation,
        str(condition.state),
        condition.detail,
        str(condition.fault),
        -1 if store is None else store.space().client_free_bytes,
        write_failures,
    )


def summary_reply(
    condition: Condition,
    store: FragmentStore | None,
    pid: int,
    counters: dict[str, Any],
    scrub: Callable[[int], ScrubProgress],
) -> SummaryReply:
    """State and counts; those of the store are zero, or missing, without one.

    `scrub` tells where the scrubber stands, given the findings that are open.
    """
    fragments = fragment_bytes = used = 0
    space = Space(0, 0, 0, 0, 0)
    if store is not None:
        stats = store.stats()
        fragments, fragment_bytes, used = stats.fragments, stats.fragment_bytes, stats.disk_bytes
        space = store.space()
        counters = {**counters, **stats.counters}
    return SummaryReply(
        str(condition.state),
        condition.detail,
        condition.incarnation,
        fragments,
        fragment_bytes,
        used,
        space.client_free_bytes,
        pid,
        counters,
        str(condition.fault),
        SpaceReport(*space),
        scrub(counters.get("findings", 0)),
    )
