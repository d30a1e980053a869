"""The stripe: what the nodes of one volume hold of one block, made and recovered.

`make_stripe` is the step between "encode" and "send" of the life of a put.  `recover` is the step
of a get, a repair or a verification at which fragments disagree or parity was used: it proves the
answer by SHA-256 and names the slots that lied.  Called by `cluster`, off the event loop.  Pure
functions over bytes; must not import storage, network or SQL.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from erasure import envelope
from erasure.codec import Codec
from erasure.fragment import Fragment, pack_header
from erasure.scheme import Scheme, SchemeKind
from protocol.errors import BlockUnreadable, CorruptFragment
from protocol.hashing import Buffer, checksum64, hash_block
from protocol.ids import BlockHash, VolumeId
from protocol.limits import ENVELOPE_BYTES

if TYPE_CHECKING:
    from erasure.keyring import Keyring

RECOVERY_TRIES_MAX: Final = 2_048
"""Subsets of one stripe that `recover` decodes before it gives up: all of them up to rs-10-4, any
three liars in the widest stripe."""


class Recovered(NamedTuple):
    """A proven block."""

    plain: Buffer
    """Its bytes; their SHA-256 is the block's name."""
    liars: tuple[int, ...]
    """Slots that were given and do not hold what the stored block encodes to, ascending."""
    stored: bytes
    """The stored block: `make_stripe` of it is what every slot should hold."""


def make_stripe(
    codec: Codec,
    scheme: Scheme,
    block: BlockHash,
    volume: VolumeId,
    epoch: int,
    stored: bytes,
) -> list[tuple[bytes, Buffer]]:
    """Header and payload for each slot; the two are sent and written one after the other."""
    tag, length = _stripe_tag(stored), len(stored)
    plain = envelope.peek_plain_length(stored)
    return [
        (pack_header(scheme, slot, block, volume, epoch, length, payload, tag, plain), payload)
        for slot, payload in enumerate(codec.encode(scheme, stored))
    ]


def remake(
    codec: Codec,
    block: BlockHash,
    volume: VolumeId,
    epoch: int,
    stored: bytes,
    wanted: Sequence[int],
    scheme: Scheme,
) -> dict[int, tuple[bytes, Buffer]]:
    """Header and payload of the `wanted` slots of a proven stored block, as `make_stripe` makes
    them."""
    stripe = make_stripe(codec, scheme, block, volume, epoch, stored)
    return {slot: stripe[slot] for slot in wanted}


def rebuild(
    codec: Codec,
    epoch: int,
    plain_length: int,
    fragments: Mapping[int, Fragment],
    wanted: Sequence[int],
    scheme: Scheme,
) -> dict[int, tuple[bytes, Buffer]]:
    """`remake` from exactly k fragments of one block, none of them wanted, whose payloads nobody
    has checked: one pass of the code over them, one of XXH3, and no copy.

    Besides the wanted slots the data slots that are missing are made, and all data slots must be
    the stored block that the envelope's checksum and the stripe tag describe.  That proves every
    byte of the k payloads, and so of what was made from them: of k slots of which at least one is
    parity, another value of the parity gives other data slots.  Padding is outside the envelope,
    and must be zeros.  Costs no SHA-256 and needs no key.

    Raises `CorruptFragment` where anything disagrees: then `recover` finds out who is wrong.
    """
    first = next(iter(fragments.values()))
    for fragment in fragments.values():
        if (fragment.scheme, fragment.stored_length, fragment.stripe_tag) != (
            scheme,
            first.stored_length,
            first.stripe_tag,
        ):
            raise CorruptFragment(
                f"slots {sorted(fragments)} of block {first.block} are of different stripes"
            )
    payloads = {slot: fragment.payload for slot, fragment in fragments.items()}
    missing = [] if scheme.kind is SchemeKind.REPLICA else range(scheme.k)
    needed = sorted({*wanted, *missing} - set(payloads))
    made = codec.reconstruct(scheme, payloads, needed, first.stored_length)
    _prove(codec, scheme, first, {**payloads, **made}, plain_length)
    return {
        slot: (
            pack_header(
                scheme,
                slot,
                first.block,
                first.volume,
                epoch,
                first.stored_length,
                made[slot],
                first.stripe_tag,
                plain_length,
            ),
            made[slot],
        )
        for slot in wanted
    }


def _prove(
    codec: Codec,
    scheme: Scheme,
    first: Fragment,
    payloads: Mapping[int, Buffer],
    plain_length: int,
) -> None:
    """All data slots among `payloads` are the stored block that `first` is a fragment of."""
    slots = sorted(payloads)[: scheme.k]
    data = [payloads[slot] for slot in slots]
    pieces = codec.data_pieces(scheme, data, first.stored_length)
    for payload, piece in zip(data, pieces, strict=True):
        if any(memoryview(payload)[len(piece) :]):
            raise CorruptFragment(f"a slot of block {first.block} is not padded with zeros")
    if len(pieces[0]) < ENVELOPE_BYTES:
        pieces = [b"".join(pieces)]
    if envelope.verify_pieces(pieces) != plain_length:
        raise CorruptFragment(f"block {first.block} has another length than the index says")
    if _stripe_tag(pieces[0]) != first.stripe_tag:
        raise CorruptFragment(f"block {first.block} decodes to another stripe than its tag names")


def recover(
    codec: Codec, keyring: Keyring | None, block: BlockHash, fragments: Mapping[int, Fragment]
) -> Recovered:
    """The block from whatever fragments there are, by the slot each was read from.

    Fragments of another block, slot or seal are set aside; then subsets are decoded, fewest
    suspects first, until the plain bytes hash to `block`.

    Raises `BlockUnreadable` if no subset does, `ConfigInvalid` if the key is missing,
    `FormatUnsupported` if a newer version sealed the block.
    """
    for group in _groups(block, fragments):
        solved = _solve(codec, keyring, block, group)
        if solved is None:
            continue
        plain, stored = solved
        honest = _honest_slots(codec, stored, group)
        liars = tuple(slot for slot in sorted(fragments) if slot not in honest)
        return Recovered(plain, liars, stored)
    raise BlockUnreadable(
        f"block {block} cannot be read from slots {sorted(fragments)}: no set of them gives bytes "
        "with this hash",
        {"hash": str(block), "slots": sorted(fragments)},
    )


def _stripe_tag(stored: Buffer) -> int:
    """Identifies stored bytes: the envelope's own checksum already covers all of them."""
    return checksum64(memoryview(stored)[:ENVELOPE_BYTES])


def _groups(block: BlockHash, fragments: Mapping[int, Fragment]) -> list[dict[int, Fragment]]:
    """Fragments that claim to be one stripe of `block`, largest group first; too few: left out."""
    groups: dict[tuple[Scheme, int, int], dict[int, Fragment]] = {}
    for slot in sorted(fragments):
        fragment = fragments[slot]
        if fragment.slot == slot and fragment.block == block:
            key = (fragment.scheme, fragment.stored_length, fragment.stripe_tag)
            groups.setdefault(key, {})[slot] = fragment
    readable = [group for (scheme, _, _), group in groups.items() if len(group) >= scheme.k]
    return sorted(readable, key=len, reverse=True)


def _solve(
    codec: Codec, keyring: Keyring | None, block: BlockHash, group: Mapping[int, Fragment]
) -> tuple[Buffer, bytes] | None:
    """Plain and stored bytes from the first subset of `group` that proves itself."""
    first = next(iter(group.values()))
    subsets = _subsets(sorted(group), first.scheme.k)
    for slots in itertools.islice(subsets, RECOVERY_TRIES_MAX):
        payloads = {slot: group[slot].payload for slot in slots}
        stored = codec.decode(first.scheme, payloads, first.stored_length)
        try:
            plain = envelope.unseal(stored, keyring)
        except CorruptFragment:
            continue
        # The envelope's checksum matched, so these are the bytes that were sealed: if they are
        # another block's, so is the whole group, and no other subset would tell otherwise.
        return (plain, bytes(stored)) if hash_block(plain) == block else None
    return None


def _subsets(slots: Sequence[int], k: int) -> Iterator[tuple[int, ...]]:
    """Every k of `slots` once: first those that explain the failure by the fewest liars, and of
    these the ones with the most data slots."""
    seen: set[tuple[int, ...]] = set()
    for suspects in range(len(slots) - k + 1):
        for doubted in itertools.combinations(slots, suspects):
            chosen = tuple(slot for slot in slots if slot not in doubted)[:k]
            if chosen not in seen:
                seen.add(chosen)
                yield chosen


def _honest_slots(codec: Codec, stored: bytes, group: Mapping[int, Fragment]) -> set[int]:
    """Slots whose payload is what `stored` encodes to; k that decoded to it need no look."""
    scheme = next(iter(group.values())).scheme
    if len(group) == scheme.k:
        return set(group)
    expected = codec.encode(scheme, stored)
    return {
        slot
        for slot, fragment in group.items()
        if checksum64(fragment.payload) == checksum64(expected[slot])
    }
