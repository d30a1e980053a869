"""A stored block opens to exactly the bytes that were sealed, or is refused."""

from __future__ import annotations

import itertools
import random
import struct
import threading

import pytest
import xxhash
import zstandard

from erasure.envelope import Flags, peek_plain_length, seal, unseal
from erasure.keyring import NONCE_BYTES, Keyring, key_id_of
from protocol.errors import ConfigInvalid, CorruptFragment, FormatUnsupported
from protocol.hashing import Buffer
from protocol.limits import BLOCK_BYTES_MAX, ENVELOPE_BYTES, KIB, MIB, STORED_BLOCK_BYTES_MAX

RANDOM = random.Random(4).randbytes(200 * KIB)
TEXT = b"".join(b"line %d of a file that compresses well\n" % line for line in range(6000))
KEYS = [bytes([number]) * 32 for number in (1, 2)]


def ring(*keys: bytes) -> Keyring:
    return Keyring(keys or KEYS[:1])


def sealed(plain: bytes, *, keyring: Keyring | None = None, compress: bool = True) -> bytes:
    return seal([plain], len(plain), keyring=keyring, compress=compress)


def resealed(stored: bytes, offset: int, value: bytes) -> bytes:
    """`stored` with bytes replaced and the checksum made right again."""
    changed = stored[:offset] + value + stored[offset + len(value) :]
    digest = xxhash.xxh3_64(changed[:56] + changed[ENVELOPE_BYTES:]).intdigest()
    return changed[:56] + struct.pack("<Q", digest) + changed[ENVELOPE_BYTES:]


def flags_of(stored: bytes) -> Flags:
    return Flags(stored[5])


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "plain",
    [b"", b"x", b"x" * 100, RANDOM[:1000], TEXT, RANDOM, TEXT + RANDOM],
    ids=["empty", "one", "tiny", "random", "text", "large random", "mixed"],
)
def test_what_is_sealed_opens_again(plain: bytes, compress: bool, encrypt: bool) -> None:
    keyring = ring() if encrypt else None
    stored = sealed(plain, keyring=keyring, compress=compress)
    assert unseal(stored, keyring) == plain
    assert peek_plain_length(stored) == len(plain)


@pytest.mark.parametrize("length", [BLOCK_BYTES_MAX - 1, BLOCK_BYTES_MAX])
def test_the_largest_block_fits_in_the_stored_limit(length: int) -> None:
    plain = random.Random(1).randbytes(length)
    stored = sealed(plain, keyring=ring())
    assert len(stored) <= STORED_BLOCK_BYTES_MAX
    assert unseal(stored, ring()) == plain


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("plain", [TEXT, RANDOM], ids=["text", "random"])
def test_the_stored_block_does_not_depend_on_how_the_bytes_arrived(
    plain: bytes, encrypt: bool
) -> None:
    """Two seals of one block that differ could leave a stripe that is half of each."""
    cuts = [0, 1, 1, 4096, 100_000, len(plain)]
    parts: list[Buffer] = [memoryview(plain)[begin:end] for begin, end in itertools.pairwise(cuts)]
    assert seal(parts, len(plain), keyring=ring() if encrypt else None, compress=True) == sealed(
        plain, keyring=ring() if encrypt else None
    )


def test_bytes_that_compress_are_compressed_and_others_are_stored_as_they_are() -> None:
    assert flags_of(sealed(TEXT)) == Flags.ZSTD
    assert len(sealed(TEXT)) < len(TEXT) // 4
    assert flags_of(sealed(TEXT[:300])) == Flags.ZSTD
    raw = sealed(RANDOM)
    assert flags_of(raw) == Flags.RAW
    assert raw[ENVELOPE_BYTES:] == RANDOM
    assert flags_of(sealed(zstandard.compress(RANDOM.hex().encode()))) == Flags.RAW
    assert flags_of(sealed(TEXT, compress=False)) == Flags.RAW


def test_a_compressible_start_does_not_fool_the_sample() -> None:
    plain = bytes(16 * KIB) + RANDOM
    assert flags_of(sealed(plain)) == Flags.RAW


def test_a_compressible_middle_is_found_by_the_sample_in_any_parts() -> None:
    plain = RANDOM[: 50 * KIB] + bytes(MIB) + RANDOM[: 50 * KIB]
    assert flags_of(sealed(plain)) == Flags.ZSTD
    parts = [plain[begin : begin + 1000] for begin in range(0, len(plain), 1000)]
    assert seal(parts, len(plain), keyring=None, compress=True) == sealed(plain)


def test_a_saving_too_small_to_repay_the_reads_is_not_kept() -> None:
    """The sample sees only zeros at its four places, the whole saves almost nothing."""
    plain = bytearray(random.Random(6).randbytes(2 * MIB))
    for window in range(4):
        begin = window * len(plain) // 4
        plain[begin : begin + 16 * KIB] = bytes(16 * KIB)
    assert flags_of(sealed(bytes(plain))) == Flags.RAW


def test_raw_bytes_are_opened_without_a_copy() -> None:
    stored = sealed(RANDOM)
    plain = unseal(stored, None)
    assert isinstance(plain, memoryview)
    assert plain.obj is stored


@pytest.mark.parametrize("plain", [RANDOM[:1000], TEXT[:1000]], ids=["raw", "zstd"])
@pytest.mark.parametrize("encrypt", [False, True])
def test_a_flip_of_any_envelope_byte_is_refused(plain: bytes, encrypt: bool) -> None:
    keyring = ring() if encrypt else None
    stored = sealed(plain, keyring=keyring)
    offsets = [*range(ENVELOPE_BYTES + 1), len(stored) // 2, len(stored) - 1]
    for offset in offsets:
        changed = bytearray(stored)
        changed[offset] ^= 0x01
        with pytest.raises(CorruptFragment):
            unseal(changed, keyring)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, -1])
def test_a_truncated_stored_block_is_refused(length: int) -> None:
    with pytest.raises(CorruptFragment):
        unseal(sealed(RANDOM[:1000])[:length], None)


def test_a_stored_block_with_bytes_behind_it_is_refused() -> None:
    with pytest.raises(CorruptFragment):
        unseal(sealed(RANDOM[:1000]) + b"\0", None)
    grown = resealed(sealed(RANDOM[:1000]) + b"\0", 12, struct.pack("<I", 1001))
    with pytest.raises(CorruptFragment, match="declares 1000 plain bytes and holds 1001"):
        unseal(grown, None)


@pytest.mark.parametrize(("offset", "value"), [(4, b"\2"), (5, b"\4"), (5, b"\x80")])
def test_an_intact_envelope_of_a_newer_version_asks_for_an_upgrade(
    offset: int, value: bytes
) -> None:
    with pytest.raises(FormatUnsupported, match="upgrade"):
        unseal(resealed(sealed(RANDOM[:1000]), offset, value), None)


@pytest.mark.parametrize("declared", [0, 10, BLOCK_BYTES_MAX + 1, 2**32 - 1])
def test_a_plain_length_that_lies_is_refused(declared: int) -> None:
    for plain in (RANDOM[:1000], TEXT):
        with pytest.raises(CorruptFragment):
            unseal(resealed(sealed(plain), 8, struct.pack("<I", declared)), None)


def forged(frame: bytes, plain_length: int) -> bytes:
    """An intact envelope around a payload that `seal` did not make."""
    header = struct.pack("<4sBBHIII", b"HVSB", 1, Flags.ZSTD, 0, plain_length, len(frame), 0)
    return resealed(header + bytes(44) + frame, 0, b"HVSB")


def frame_declaring(length: int, plain: bytes) -> bytes:
    """A zstd frame of `plain` whose header declares `length` bytes instead (8-byte field)."""
    body = zstandard.ZstdCompressor(write_content_size=False).compress(plain)
    window = zstandard.get_frame_parameters(body).window_size
    assert body[4] & 0xE0 == 0  # no content size, not one segment: a window byte follows
    assert window
    return body[:4] + bytes([body[4] | 0xC0]) + body[5:6] + struct.pack("<Q", length) + body[6:]


@pytest.mark.parametrize("declared", [2**40, BLOCK_BYTES_MAX + 1, 999, 1001])
def test_a_bomb_whose_frame_declares_another_size_is_refused_unread(declared: int) -> None:
    frame = frame_declaring(declared, bytes(100 * MIB))
    with pytest.raises(CorruptFragment, match="its envelope"):
        unseal(forged(frame, 1000), None)


@pytest.mark.parametrize("declared", [0, 1000, BLOCK_BYTES_MAX])
def test_a_bomb_that_holds_more_than_it_declares_is_refused(declared: int) -> None:
    frame = frame_declaring(declared, bytes(100 * MIB))
    with pytest.raises(CorruptFragment):
        unseal(forged(frame, declared), None)


def test_a_frame_that_holds_less_than_it_declares_is_refused() -> None:
    with pytest.raises(CorruptFragment):
        unseal(forged(frame_declaring(1001, bytes(1000)), 1001), None)


def test_a_frame_without_a_size_a_second_frame_and_no_frame_are_refused() -> None:
    plain = bytes(1000)
    frame = zstandard.ZstdCompressor().compress(plain)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(plain)
    assert unseal(forged(frame, 1000), None) == plain
    for payload in (unsized, frame + frame, frame + b"\0", frame[:-1], b"", b"no frame at all"):
        with pytest.raises(CorruptFragment):
            unseal(forged(payload, 1000), None)


def test_the_envelope_has_the_documented_layout() -> None:
    stored = sealed(RANDOM[:1000], keyring=ring())
    assert stored[:8] == b"HVSB\1\2\0\0"
    assert struct.unpack_from("<III", stored, 8) == (1000, 1000, key_id_of(KEYS[0]))
    assert stored[20:32] == ring().nonce_for(stored[:20], [RANDOM[:1000]])
    assert stored[48:56] == bytes(8)
    assert len(stored) == ENVELOPE_BYTES + 1000
    assert sealed(b"")[16:56] == bytes(40)


def test_many_threads_seal_and_open_at_once() -> None:
    failures: list[int] = []

    def work(number: int) -> None:
        plain = TEXT[number * 1000 :]
        if any(unseal(sealed(plain), None) != plain for _ in range(20)):
            failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_nonce_belongs_to_one_message_under_one_key() -> None:
    """The same message is sealed the same way; whatever differs has another nonce."""
    older, newer = ring(), ring(*KEYS)
    assert sealed(b"the same", keyring=older) == sealed(b"the same", keyring=ring())
    others = [
        sealed(b"the same", keyring=newer),
        sealed(b"the samf", keyring=older),
        sealed(TEXT, keyring=older, compress=True),
        sealed(TEXT, keyring=older, compress=False),
        *(sealed(bytes(length), keyring=older, compress=False) for length in range(1, 60)),
    ]
    nonces = {stored[20:32] for stored in [sealed(b"the same", keyring=older), *others]}
    assert len(nonces) == 1 + len(others)
    assert all(len(nonce) == NONCE_BYTES for nonce in nonces)


def test_encrypted_bytes_do_not_show_the_plain_ones() -> None:
    stored = sealed(RANDOM, keyring=ring())
    assert RANDOM[:64] not in stored
    assert flags_of(stored) == Flags.AES_256_GCM
    assert flags_of(sealed(TEXT, keyring=ring())) == Flags.AES_256_GCM | Flags.ZSTD


@pytest.mark.parametrize("offset", [4, 5, 6, 8, 16, 20, 31, 32, 47, 64, 500])
def test_a_forger_who_fixes_the_checksum_is_still_refused(offset: int) -> None:
    stored = sealed(RANDOM[:1000], keyring=ring())
    changed = resealed(stored, offset, bytes([stored[offset] ^ 1]))
    with pytest.raises((CorruptFragment, FormatUnsupported, ConfigInvalid)):
        unseal(changed, ring())


def test_rotation_seals_with_the_last_key_and_opens_with_all() -> None:
    before, after = ring(KEYS[0]), ring(*KEYS)
    old, new = sealed(TEXT, keyring=before), sealed(TEXT, keyring=after)
    assert unseal(old, after) == TEXT
    assert unseal(new, after) == TEXT
    assert after.current_id == key_id_of(KEYS[1]) != before.current_id
    with pytest.raises(ConfigInvalid, match="put that key back"):
        unseal(new, before)
    with pytest.raises(ConfigInvalid, match="no key file"):
        unseal(new, None)


def test_a_keyring_opens_blocks_that_are_not_encrypted() -> None:
    assert unseal(sealed(TEXT), ring()) == TEXT


def test_a_key_file_is_read_with_its_comments() -> None:
    text = f"# keys of the cell\n\n{KEYS[0].hex()}  # first\r\n {KEYS[1].hex().upper()} \n"
    keyring = Keyring.parse(text)
    assert keyring.current_id == key_id_of(KEYS[1])
    assert unseal(sealed(TEXT, keyring=ring(KEYS[0])), keyring) == TEXT


@pytest.mark.parametrize("text", ["", "# nothing\n", "abcd\n", "zz" * 32, "é" * 64, "11" * 33])
def test_a_bad_key_file_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        Keyring.parse(text)
    content = text.strip()
    assert not content or content.startswith("#") or content not in str(refused.value)


def test_a_keyring_prints_no_key() -> None:
    assert KEYS[0].hex() not in repr(ring())
    assert repr(ring()).startswith("Keyring(1 key(s)")
