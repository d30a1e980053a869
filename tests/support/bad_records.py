"""Ways in which a fragment record can be wrong, from a flipped bit to a perfect forgery."""

from __future__ import annotations

from collections.abc import Callable

from erasure.codec import Codec
from erasure.envelope import seal
from erasure.fragment import pack_header, parse
from erasure.stripe import make_stripe


def flip(position: float) -> Callable[[bytes], bytes]:
    """One bit, at a share of the record's length."""

    def tamper(record: bytes) -> bytes:
        index = min(int(len(record) * position), len(record) - 1)
        return record[:index] + bytes([record[index] ^ 1]) + record[index + 1 :]

    return tamper


def lie(record: bytes) -> bytes:
    """Other bytes with checksums, identity and stripe tag that are all in order."""
    fragment = parse(record)
    payload = bytes(byte ^ 0x55 for byte in fragment.payload)
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        fragment.epoch,
        fragment.stored_length,
        payload,
        fragment.stripe_tag,
        fragment.plain_length,
    )
    return header + payload


def forge(record: bytes) -> bytes:
    """A perfect record of other bytes of the same length, sealed by the book."""
    fragment = parse(record)
    length = fragment.plain_length
    stored = seal((bytes(length),), length, keyring=None, compress=False)
    stripe = make_stripe(
        Codec(), fragment.scheme, fragment.block, fragment.volume, fragment.epoch, stored
    )
    return b"".join(stripe[fragment.slot])
