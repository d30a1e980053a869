"""A fragment record is read exactly as it was framed, or refused."""

from __future__ import annotations

import random
import struct

import pytest

from erasure.codec import Codec
from erasure.fragment import (
    FRAGMENT_HEADER_BYTES,
    VERSION,
    pack_header,
    parse,
    parse_expected,
    peek_key,
)
from erasure.scheme import Scheme
from protocol.errors import CorruptFragment, FormatUnsupported
from protocol.hashing import checksum64, hash_block
from protocol.ids import BlockHash, VolumeId

SCHEME = Scheme.rs(6, 3)
STORED = random.Random(3).randbytes(1000)
BLOCK = hash_block(STORED)
VOLUME = VolumeId(2**63 + 17)
EPOCH = 2**40 + 5


def records(
    scheme: Scheme = SCHEME, block: BlockHash = BLOCK, stored: bytes = STORED
) -> list[bytes]:
    return [
        pack_header(scheme, slot, block, VOLUME, EPOCH, len(stored), payload, 77, 900)
        + bytes(payload)
        for slot, payload in enumerate(Codec().encode(scheme, stored))
    ]


def resealed(record: bytes, offset: int, value: bytes) -> bytes:
    """`record` with a header field replaced and the header's checksum made right again."""
    fields = record[:offset] + value + record[offset + len(value) : FRAGMENT_HEADER_BYTES - 8]
    return fields + struct.pack("<Q", checksum64(fields)) + record[FRAGMENT_HEADER_BYTES:]


@pytest.mark.parametrize("scheme", [SCHEME, Scheme.replica(4), Scheme.rs(16, 6)], ids=str)
def test_a_record_says_everything_that_was_packed(scheme: Scheme) -> None:
    payloads = Codec().encode(scheme, STORED)
    for slot, record in enumerate(records(scheme)):
        found = parse(record)
        assert found.scheme == scheme
        assert found.slot == slot
        assert found.block == BLOCK
        assert found.volume == VOLUME
        assert found.epoch == EPOCH
        assert found.stored_length == len(STORED)
        assert found.payload == payloads[slot]
        assert found.stripe_tag == 77
        assert found.plain_length == 900
        assert peek_key(record) == (VOLUME, BLOCK, slot, EPOCH)


def test_ids_keep_their_types() -> None:
    found = parse(records()[0])
    volume, block, _, _ = peek_key(records()[0])
    assert isinstance(found.block, BlockHash)
    assert isinstance(found.volume, VolumeId)
    assert isinstance(block, BlockHash)
    assert isinstance(volume, VolumeId)


def test_the_payload_is_a_view_into_the_record() -> None:
    record = bytearray(records()[0])
    found = parse(record)
    assert found.payload.obj is record


@pytest.mark.parametrize("stored", [b"", b"x"])
@pytest.mark.parametrize("scheme", [SCHEME, Scheme.replica(2)], ids=str)
def test_blocks_of_no_and_one_byte_can_be_framed(scheme: Scheme, stored: bytes) -> None:
    for slot, record in enumerate(records(scheme, hash_block(stored), stored)):
        assert parse(record).slot == slot


@pytest.mark.parametrize("offset", range(FRAGMENT_HEADER_BYTES))
def test_a_flip_of_any_header_byte_is_refused(offset: int) -> None:
    original = records()[4]
    for mask in (0x01, 0x80, 0xFF):
        record = bytearray(original)
        record[offset] ^= mask
        with pytest.raises(CorruptFragment):
            parse(record)
        with pytest.raises(CorruptFragment):
            peek_key(record)


@pytest.mark.parametrize("scheme", [SCHEME, Scheme.replica(4)], ids=str)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_payload_byte_is_refused(scheme: Scheme, where: str) -> None:
    for record in map(bytearray, records(scheme)):
        payload = len(record) - FRAGMENT_HEADER_BYTES
        offset = {"first": 0, "middle": payload // 2, "last": payload - 1}[where]
        record[FRAGMENT_HEADER_BYTES + offset] ^= 1
        with pytest.raises(CorruptFragment):
            parse(record)


@pytest.mark.parametrize(
    "length",
    [0, 1, 3, FRAGMENT_HEADER_BYTES - 1, FRAGMENT_HEADER_BYTES, FRAGMENT_HEADER_BYTES + 1, -1],
)
def test_a_truncated_record_is_refused(length: int) -> None:
    record = records()[0][:length]
    with pytest.raises(CorruptFragment):
        parse(record)
    with pytest.raises(CorruptFragment):
        peek_key(record)


def test_a_record_with_bytes_behind_it_is_refused() -> None:
    for behind in (b"\0", records()[1]):
        with pytest.raises(CorruptFragment):
            parse(records()[0] + behind)


def test_zeros_are_not_a_record() -> None:
    for length in (96, 97, 4096):
        with pytest.raises(CorruptFragment):
            parse(bytes(length))


def test_a_payload_under_another_slots_header_is_refused() -> None:
    first, second = records()[:2]
    with pytest.raises(CorruptFragment):
        parse(first[:FRAGMENT_HEADER_BYTES] + second[FRAGMENT_HEADER_BYTES:])


def test_an_intact_fragment_of_another_place_is_not_the_one_asked_for() -> None:
    record = records()[2]
    assert parse_expected(record, VOLUME, BLOCK, 2) == parse(record)
    with pytest.raises(CorruptFragment, match="asked for slot 3"):
        parse_expected(record, VOLUME, BLOCK, 3)
    with pytest.raises(CorruptFragment, match="got slot 2"):
        parse_expected(record, VOLUME, hash_block(b"another"), 2)
    with pytest.raises(CorruptFragment, match="in v5"):
        parse_expected(record, VolumeId(5), BLOCK, 2)


def test_an_intact_header_of_a_newer_version_asks_for_an_upgrade() -> None:
    record = resealed(records()[0], 4, bytes([VERSION + 1]))
    with pytest.raises(FormatUnsupported, match="upgrade"):
        parse(record)
    with pytest.raises(FormatUnsupported):
        peek_key(record)


@pytest.mark.parametrize("packed", [b"\x09\6\3", b"\1\x40\3", b"\0\0\0"])
def test_an_intact_header_with_an_unknown_scheme_asks_for_an_upgrade(packed: bytes) -> None:
    with pytest.raises(FormatUnsupported, match="fragment record"):
        parse(resealed(records()[0], 5, packed))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(8, bytes([9]), id="slot n"),
        pytest.param(8, bytes([255]), id="slot 255"),
        pytest.param(12, struct.pack("<I", 2**32 - 1), id="stored length over the limit"),
        pytest.param(12, struct.pack("<I", 1003), id="stored length of another chunk"),
        pytest.param(16, struct.pack("<I", 2**32 - 1), id="payload length"),
        pytest.param(16, struct.pack("<I", 0), id="payload length zero"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(offset: int, value: bytes) -> None:
    """Only a program that computes the checksum over nonsense could write one."""
    with pytest.raises(CorruptFragment):
        parse(resealed(records()[0], offset, value))


def test_the_header_has_the_documented_layout() -> None:
    record = records()[4]
    assert record[0:4] == b"HVSF"
    assert record[4:9] == bytes([1, 1, 6, 3, 4])
    assert record[9:12] == bytes(3)
    assert struct.unpack_from("<III", record, 12) == (1000, 167, 900)
    assert struct.unpack_from("<QQ", record, 24) == (VOLUME, EPOCH)
    assert record[40:72] == BLOCK
    assert struct.unpack_from("<QQQ", record, 72) == (
        77,
        checksum64(record[96:]),
        checksum64(record[:88]),
    )
