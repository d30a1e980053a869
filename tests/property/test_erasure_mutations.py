"""No mutation of a fragment record or of a stored block is read as something."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erasure.codec import Codec
from erasure.envelope import seal, unseal
from erasure.fragment import parse, peek_key
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import make_stripe
from protocol.errors import CorruptFragment
from protocol.hashing import hash_block
from protocol.ids import VolumeId

RANDOM = random.Random(2).randbytes(700)
TEXT = b"forty-two socks in a haversack, " * 30
KEYRING = Keyring([bytes(32)])

STORED = [
    seal([plain], len(plain), keyring=keyring, compress=True)
    for plain in (b"", RANDOM, TEXT)
    for keyring in (None, KEYRING)
]
RECORDS = [
    header + bytes(payload)
    for scheme in (Scheme.rs(6, 3), Scheme.replica(2))
    for stored in STORED
    for header, payload in make_stripe(Codec(), scheme, hash_block(stored), VolumeId(5), 1, stored)
]


# Drawn by index: hypothesis prints its strategies, and would print the bytes with them.
ORIGINALS = {"record": RECORDS, "stored": STORED}


@st.composite
def mutated(draw: st.DrawFn, kind: str) -> bytes:
    """One of the originals after up to four edits: overwrite, insert, delete, splice, swap."""
    originals = ORIGINALS[kind]
    pick = st.integers(0, len(originals) - 1)
    data = bytearray(originals[draw(pick)])
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["overwrite", "insert", "delete", "splice", "swap"])):
            case "overwrite":
                data[begin:end] = draw(st.binary(min_size=end - begin, max_size=end - begin))
            case "insert":
                data[begin:begin] = draw(st.binary(max_size=40))
            case "delete":
                del data[begin:end]
            case "splice":
                data[begin:] = originals[draw(pick)][begin:]
            case "swap":
                other = draw(st.integers(0, len(data)))
                length = end - begin
                data[begin:end], data[other : other + length] = (
                    data[other : other + length],
                    data[begin:end],
                )
    assume(bytes(data) not in originals)
    return bytes(data)


@settings(max_examples=500, deadline=None)
@given(mutated("record"))
def test_a_mutated_record_is_refused(record: bytes) -> None:
    with pytest.raises(CorruptFragment):
        parse(record)


@settings(max_examples=300, deadline=None)
@given(mutated("record"))
def test_a_mutated_header_never_gives_a_key_of_its_own(record: bytes) -> None:
    """The payload may be damaged, the key is still the one that was written."""
    try:
        key = peek_key(record)
    except CorruptFragment:
        return
    assert record[:96] in {original[:96] for original in RECORDS}
    assert key[0] == VolumeId(5)


@settings(max_examples=500, deadline=None)
@given(mutated("stored"))
def test_a_mutated_stored_block_is_refused(stored: bytes) -> None:
    with pytest.raises(CorruptFragment):
        unseal(stored, KEYRING)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_neither_a_record_nor_a_stored_block(data: bytes) -> None:
    with pytest.raises(CorruptFragment):
        parse(data)
    with pytest.raises(CorruptFragment):
        unseal(data, None)
