"""What the records of one block's stripe say about each other: pure.

A node vouches for its own record (checksums, key, length, stripe tag).  Whether it is a fragment of
the *same* stored bytes as the others shows only side by side.  Nothing is decoded here: who mends
a fragment proves the bytes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cluster.block_index import BlockRow
from cluster.topology import VolumeView
from cluster.verify.differences import Difference, Finding
from erasure.fragment import FRAGMENT_HEADER_BYTES
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey, VerifiedRecord


def judge_stripe(
    row: BlockRow, volume: VolumeView, answers: Mapping[int, VerifiedRecord]
) -> list[Finding]:
    """Differences of one block.  `answers` by slot, of its holder; silent nodes are left out, and
    slots with a debt: what they hold is known to be wrong.

    A whole fragment is called wrong only if at least k others agree with each other and not with
    it, and no other seal has as many.
    """
    expected = FRAGMENT_HEADER_BYTES + volume.scheme.chunk_bytes(row.stored_bytes)
    found: list[Finding] = []
    tags: dict[int, tuple[int, int]] = {}

    def tell(difference: Difference, slot: int) -> None:
        key = FragmentKey(row.volume, row.hash, slot)
        found.append(Finding(difference, key, volume.slots[slot]))

    for slot, answer in sorted(answers.items()):
        difference = difference_of(answer.status)
        if difference is None:
            tags[slot] = answer.stripe_tag, answer.length
        else:
            tell(difference, slot)
    counts = Counter(tags.values()).most_common()
    if not counts:
        return found
    seal, most = counts[0]
    if len(counts) == 1 and seal[1] == expected:
        return found
    tied = len(counts) > 1 and counts[1][1] == most
    if tied or most < volume.scheme.k or seal[1] != expected:
        tell(Difference.UNSETTLED, min(tags))
        return found
    for slot, other in tags.items():
        if other != seal:
            wrong_length = other[1] != expected
            tell(Difference.WRONG_LENGTH if wrong_length else Difference.OTHER_STRIPE, slot)
    return found


def difference_of(status: ItemStatus) -> Difference | None:
    """What a node's own word about a record means; None: the record is whole."""
    match status:
        case ItemStatus.OK:
            return None
        case ItemStatus.NOT_FOUND:
            return Difference.MISSING
        case ItemStatus.IO_ERROR:
            return Difference.UNREADABLE
        case _:
            return Difference.WRONG_BYTES
