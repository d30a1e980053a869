"""The full check of a stored record: what `VERIFY` and the scrubber mean by "good".

Called by `StorageNode.verify`, by `scrub`, and by both stores when a record is set aside or
replaced.  A store's own checksum says that the bytes are those that were stored; this says that
they are an intact fragment of the key they lie under.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from erasure.fragment import parse_expected
from protocol.errors import CorruptFragment, FormatUnsupported
from protocol.limits import MIB
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey, FragmentStore, StoredRecord, VerifiedRecord

VERIFY_BYTES_MAX: Final = 256 * MIB
"""Read for one request at most: a second or so, well within a caller's patience."""

_VERIFY_KEYS: Final = 256
_VERIFY_BYTES: Final = 8 * MIB
"""Read in one go: how long a thread may keep the disk, and what it may hold."""


def examined(key: FragmentKey, answer: StoredRecord) -> VerifiedRecord:
    """What a store's answer for `key` is worth."""
    if answer.record is None:
        return VerifiedRecord(answer.status)
    try:
        fragment = parse_expected(answer.record, *key)
    except (CorruptFragment, FormatUnsupported):
        return VerifiedRecord(ItemStatus.CORRUPT)
    return VerifiedRecord(ItemStatus.OK, len(answer.record), fragment.epoch, fragment.stripe_tag)


def examine_some(
    store: FragmentStore, keys: Sequence[FragmentKey], bytes_max: int
) -> list[VerifiedRecord]:
    """As many of `keys`, from the first, as one read of `bytes_max` gives."""
    answers = store.get_many(keys, bytes_max)
    read = itertools.takewhile(lambda answer: answer.status is not ItemStatus.NOT_SENT, answers)
    return [examined(key, answer) for key, answer in zip(keys, read, strict=False)]


async def examine_many(
    slowly: Callable[..., Awaitable[Any]], store: FragmentStore, keys: Sequence[FragmentKey]
) -> list[VerifiedRecord]:
    """One answer per key, in order; after `VERIFY_BYTES_MAX` the rest of the keys is NOT_SENT.

    `slowly(work, ...)` runs a piece of the work off the loop.
    """
    found: list[VerifiedRecord] = []
    read_bytes = 0
    while len(found) < len(keys) and read_bytes < VERIFY_BYTES_MAX:
        part = keys[len(found) : len(found) + _VERIFY_KEYS]
        answers: list[VerifiedRecord] = await slowly(examine_some, store, part, _VERIFY_BYTES)
        found += answers
        read_bytes += sum(answer.length for answer in answers)
    unread = len(keys) - len(found)
    return found + [VerifiedRecord(ItemStatus.NOT_SENT)] * unread
