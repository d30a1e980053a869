"""The writes of one group commit: what several requests bring, as one write of the store.

Middle step of a put and of a delete on a node: `StorageNode` checks each record with `key_of`,
and `group_commit` runs the rest, one group at a time, where the store's writes run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from erasure.fragment import parse
from protocol.errors import CorruptFragment, FormatUnsupported
from protocol.hashing import Buffer
from protocol.ids import VolumeId
from protocol.messages import ItemStatus, PutPurpose
from storage_node.fence import write_epochs
from storage_node.interface import FragmentKey, FragmentStore


class PutGroup(NamedTuple):
    """One put's share of a group commit."""

    records: list[tuple[FragmentKey, Buffer]]
    epochs: dict[VolumeId, int]
    """Newer volume epochs than the store has written down."""


def key_of(record: Buffer) -> tuple[FragmentKey, int] | None:
    """Key and epoch of a whole, intact record; None for anything else."""
    try:
        fragment = parse(record)
    except (CorruptFragment, FormatUnsupported):
        return None
    return FragmentKey(fragment.volume, fragment.block, fragment.slot), fragment.epoch


def store_groups(store: FragmentStore, groups: Sequence[PutGroup], purpose: PutPurpose) -> None:
    """Newer epochs first, so that no record of a new epoch is durable on a node that would still
    take the old one."""
    epochs: dict[VolumeId, int] = {}
    for group in groups:
        epochs.update(group.epochs)
    write_epochs(store, epochs)
    store.put_group([record for group in groups for record in group.records], purpose)


def delete_groups(
    store: FragmentStore, groups: Sequence[Sequence[FragmentKey]]
) -> dict[FragmentKey, ItemStatus]:
    """Each key once, whoever asked for it."""
    keys = list(dict.fromkeys(key for group in groups for key in group))
    return dict(zip(keys, store.delete_group(keys), strict=True))
