"""Makes the lost slots of a stripe from what was read of it: one pass, proven, for all of them.

The computing half of a move (`executor`, step "copy"); runs off the event loop, for a batch of
stripes at a time.  Pure functions over bytes; may not import SQL, asyncio or Ray.

What k fragments give is believed if they carry one stripe tag and the envelope's checksum matches
(`erasure.stripe.rebuild`).  Where anything disagrees, `erasure.stripe.recover` finds the set whose
plain bytes hash to the block's name, and names the slots that lied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.block_index import BlockRow
from erasure.codec import Codec
from erasure.fragment import FRAGMENT_HEADER_BYTES, Fragment, pack_header
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import rebuild, recover, remake
from protocol.errors import (
    BlockUnreadable,
    ConfigInvalid,
    CorruptFragment,
    FormatUnsupported,
    HaversackError,
)
from protocol.hashing import Buffer


class Record(NamedTuple):
    """A fragment record to be written, in two pieces."""

    header: bytes
    payload: Buffer
    stripe_tag: int

    @property
    def size(self) -> int:
        return FRAGMENT_HEADER_BYTES + len(self.payload)


@dataclass(slots=True)
class StripeJob:
    """One stripe: what is there, and which slots are wanted."""

    row: BlockRow
    fragments: Mapping[int, Fragment]
    wanted: Sequence[int]
    made: dict[int, Record] = field(default_factory=dict)
    error: HaversackError | None = None
    """Why nothing was made."""
    liars: tuple[int, ...] = ()


class Remaker(NamedTuple):
    """What every stripe of a process needs."""

    codec: Codec
    keyring: Keyring | None

    def make(self, jobs: Sequence[StripeJob], scheme: Scheme, epoch: int) -> None:
        """Fill in `made`, or `error`: `CorruptFragment` where k fragments were given and do not
        agree; more of them are then needed."""
        for job in jobs:
            try:
                self._make_one(job, scheme, epoch)
            except (CorruptFragment, FormatUnsupported, BlockUnreadable) as error:
                job.error = error

    def _make_one(self, job: StripeJob, scheme: Scheme, epoch: int) -> None:
        chosen = dict(sorted(job.fragments.items())[: scheme.k])
        row = job.row
        made = rebuild(self.codec, epoch, row.plain_bytes, chosen, job.wanted, scheme)
        _take(job, made)

    def prove(self, jobs: Sequence[StripeJob], scheme: Scheme, epoch: int) -> None:
        """As `make`, from whatever fragments there are, proven by SHA-256."""
        for job in jobs:
            job.error = None
            try:
                proven = recover(self.codec, self.keyring, job.row.hash, job.fragments)
            except (CorruptFragment, BlockUnreadable, FormatUnsupported, ConfigInvalid) as error:
                job.error = error
                continue
            job.liars = proven.liars
            row = job.row
            made = remake(
                self.codec, row.hash, row.volume, epoch, proven.stored, job.wanted, scheme
            )
            _take(job, made)


def _take(job: StripeJob, made: Mapping[int, tuple[bytes, Buffer]]) -> None:
    for slot, (header, payload) in made.items():
        job.made[slot] = Record(header, payload, _tag_of(header))


def reframe(fragment: Fragment, epoch: int) -> Record:
    """The same fragment under a newer epoch of its volume."""
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        epoch,
        fragment.stored_length,
        fragment.payload,
        fragment.stripe_tag,
        fragment.plain_length,
    )
    return Record(header, fragment.payload, fragment.stripe_tag)


def _tag_of(header: bytes) -> int:
    return int.from_bytes(header[72:80], "little")
