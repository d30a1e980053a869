"""The fragment record: a self-describing header in front of one slot's payload.

Step "frame the fragments" of a put (before they go to the nodes) and the first step of every read
of a fragment: by a node before it stores one, by `cluster.block_client` before it joins or
decodes, by a scrubber, by `fsck --rebuild-index`.  A disk full of these is enough to rebuild the
block index.  Pure functions over bytes; imports no codec, so a storage node stays small.

    offset  size  field
    0       4     magic, b"HVSF"
    4       1     format version
    5       3     scheme: kind, k, m (`erasure.scheme`)
    8       1     slot: 0..k-1 data, k..n-1 parity
    9       3     reserved, zero
    12      4     length of the stored block (envelope included), bytes
    16      4     length of this fragment's payload, bytes
    20      4     plain length of the block, bytes (zero: empty, or not told)
    24      8     volume id
    32      8     epoch of the volume when the fragment was written
    40      32    block hash: SHA-256 of the plain bytes
    72      8     stripe tag: equal in all fragments made from the same stored bytes
    80      8     XXH3-64 of the payload
    88      8     XXH3-64 of bytes 0..88
    96            payload: this slot's chunk, without any framing of the codec

All integers are little-endian.  Every later version keeps magic, version, the header's size and
its checksum where they are, so that a flipped version byte is a corrupt fragment and not a newer
one.

The stripe tag exists because one block can be sealed twice into different stored bytes (another
nonce, another release of zstd): fragments of two seals must never be decoded together.

History: version 1, first.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from erasure.scheme import Scheme
from protocol.errors import CorruptFragment, FormatUnsupported, SchemeUnsupported
from protocol.hashing import Buffer, checksum64
from protocol.ids import BlockHash, VolumeId
from protocol.limits import STORED_BLOCK_BYTES_MAX

MAGIC: Final = b"HVSF"
VERSION: Final = 1

_FIELDS = struct.Struct("<4sB3sB3xIIIQQ32sQQ")
_CHECKSUM = struct.Struct("<Q")

FRAGMENT_HEADER_BYTES: Final = _FIELDS.size + _CHECKSUM.size
"""Where the payload starts."""

assert FRAGMENT_HEADER_BYTES == 96


class Fragment(NamedTuple):
    """A record whose header matched its checksum, and its payload too unless it is `unproven`."""

    scheme: Scheme
    slot: int
    block: BlockHash
    volume: VolumeId
    epoch: int
    stored_length: int
    payload: memoryview
    """A view into the record."""
    stripe_tag: int
    """Decode only fragments of one tag together."""
    plain_length: int
    """What the block index says of the block; so that it can be rebuilt from headers alone."""


class _Header(NamedTuple):
    scheme: Scheme
    slot: int
    stored_length: int
    plain_length: int
    volume: VolumeId
    epoch: int
    block: BlockHash
    stripe_tag: int
    payload_checksum: int


def pack_header(
    scheme: Scheme,
    slot: int,
    block: BlockHash,
    volume: VolumeId,
    epoch: int,
    stored_length: int,
    payload: Buffer,
    stripe_tag: int = 0,
    plain_length: int = 0,
) -> bytes:
    """The `FRAGMENT_HEADER_BYTES` in front of `payload`; the two are never joined here.

    `stripe_tag` identifies the stored bytes; `erasure.stripe` gives it, and `plain_length`.
    """
    assert 0 <= slot < scheme.n
    assert stored_length <= STORED_BLOCK_BYTES_MAX
    assert len(payload) == scheme.chunk_bytes(stored_length)
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        scheme.pack(),
        slot,
        stored_length,
        len(payload),
        plain_length,
        volume,
        epoch,
        block,
        stripe_tag,
        checksum64(payload),
    )
    return fields + _CHECKSUM.pack(checksum64(fields))


def parse(record: Buffer) -> Fragment:
    """Read a record and check all of it.

    Raises `CorruptFragment` unless header and payload are what `pack_header` framed, and
    `FormatUnsupported` for an intact header of a newer version.  Whether it is the fragment that
    was asked for is `parse_expected`'s question.
    """
    view = memoryview(record)
    header = _parse_header(view)
    payload = view[FRAGMENT_HEADER_BYTES:]
    if checksum64(payload) != header.payload_checksum:
        raise CorruptFragment(
            f"payload of {_name(header)} does not match its checksum", _details(header)
        )
    return _fragment(header, payload)


def parse_expected(record: Buffer, volume: VolumeId, block: BlockHash, slot: int) -> Fragment:
    """`parse`, and refuse an intact fragment that is not the one asked for.

    Raises what `parse` raises; `CorruptFragment` for another volume, block or slot.
    """
    return _expected(parse(record), volume, block, slot)


def parse_unproven(record: Buffer, volume: VolumeId, block: BlockHash, slot: int) -> Fragment:
    """`parse_expected` without the pass over the payload: only for `erasure.stripe.rebuild`, which
    proves all payloads of a stripe together.  Raises as that does, but for the payload's bytes."""
    view = memoryview(record)
    return _expected(
        _fragment(_parse_header(view), view[FRAGMENT_HEADER_BYTES:]), volume, block, slot
    )


def _fragment(header: _Header, payload: memoryview) -> Fragment:
    return Fragment(
        header.scheme,
        header.slot,
        header.block,
        header.volume,
        header.epoch,
        header.stored_length,
        payload,
        header.stripe_tag,
        header.plain_length,
    )


def _expected(found: Fragment, volume: VolumeId, block: BlockHash, slot: int) -> Fragment:
    if (found.volume, found.block, found.slot) != (volume, block, slot):
        raise CorruptFragment(
            f"asked for slot {slot} of {block} in {volume}, got slot {found.slot} of "
            f"{found.block} in {found.volume}",
            {"hash": str(block), "slot": slot, "volume": str(volume)},
        )
    return found


def peek_key(record: Buffer) -> tuple[VolumeId, BlockHash, int, int]:
    """Volume, block, slot and epoch of a record; only the header's checksum is verified.

    Raises as `parse` does, except for the payload's bytes.
    """
    header = _parse_header(memoryview(record))
    return header.volume, header.block, header.slot, header.epoch


def _parse_header(view: memoryview) -> _Header:
    """Check magic, checksum, version, scheme and lengths, in this order."""
    if len(view) < FRAGMENT_HEADER_BYTES:
        raise CorruptFragment(f"fragment record of {len(view)} bytes is shorter than its header")
    (
        magic,
        version,
        packed_scheme,
        slot,
        stored_length,
        payload_length,
        plain_length,
        volume,
        epoch,
        block,
        stripe_tag,
        payload_checksum,
    ) = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise CorruptFragment(f"fragment record starts with {magic!r} instead of its magic")
    (checksum,) = _CHECKSUM.unpack_from(view, _FIELDS.size)
    if checksum64(view[: _FIELDS.size]) != checksum:
        raise CorruptFragment("header of a fragment record does not match its checksum")
    if version != VERSION:
        raise FormatUnsupported(
            f"fragment record of version {version}: this program reads version {VERSION}; "
            "upgrade it"
        )
    try:
        scheme = Scheme.unpack(packed_scheme)
    except SchemeUnsupported as error:
        raise FormatUnsupported(f"fragment record: {error}") from error
    header = _Header(
        scheme,
        slot,
        stored_length,
        plain_length,
        VolumeId(volume),
        epoch,
        BlockHash(block),
        stripe_tag,
        payload_checksum,
    )
    if slot >= scheme.n or stored_length > STORED_BLOCK_BYTES_MAX:
        raise CorruptFragment(f"header of {_name(header)} is out of range", _details(header))
    expected = scheme.chunk_bytes(stored_length)
    held = len(view) - FRAGMENT_HEADER_BYTES
    if not held == payload_length == expected:
        raise CorruptFragment(
            f"{_name(header)} holds {held} bytes of payload, declares {payload_length}; its "
            f"stripe has {expected}",
            _details(header),
        )
    return header


def _name(header: _Header) -> str:
    return f"slot {header.slot} of {header.block} in {header.volume}"


def _details(header: _Header) -> dict[str, str | int]:
    return {"hash": str(header.block), "slot": header.slot, "volume": str(header.volume)}
