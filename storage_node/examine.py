"""The full check of a stored record: what `VERIFY` and the scrubber mean by "good".

Called by `StorageNode.verify`, by `scrub`, and by both stores when a record is set aside or
replaced.  A store's own checksum says that the bytes are those that were stored; this says that
they are an intact fragment of the key they lie under.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from erasure.fragment import parse_expected
from protocol.errors import CorruptFragment, FormatUnsupported
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey, FragmentStore, StoredRecord, VerifiedRecord


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
