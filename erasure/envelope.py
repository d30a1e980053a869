"""The stored block: plain bytes in, envelope + payload out; compress, then encrypt.

Step "seal" of the life of a put (after the hash was checked, before the erasure code) and step
"unseal" of a get (after the data slots were joined).  Called by `cluster.block_client` and
`erasure.stripe`.  Pure functions over bytes; must not import a codec, a fragment or I/O.

    offset  size  field
    0       4     magic, b"HVSB"
    4       1     format version
    5       1     flags: 1 zstd, 2 AES-256-GCM; all others zero
    6       2     reserved, zero
    8       4     plain length, bytes (what SHA-256 names)
    12      4     payload length, bytes
    16      4     key id (`erasure.keyring`), zero without encryption
    20      12    nonce, zero without encryption
    32      16    authentication tag, zero without encryption
    48      8     reserved, zero
    56      8     XXH3-64 of bytes 0..56 followed by everything after byte 64
    64            payload: the plain bytes, perhaps as one zstd frame, perhaps encrypted

All integers are little-endian.  The associated data of AES-GCM are bytes 0..20, none of which
depends on the block's name.  The checksum is of the *stored* bytes, so a repair or a scrubber
without the keys can tell a right decode from a wrong one.  Every later version keeps magic,
version and checksum where they are.

History: version 1, first.
"""

from __future__ import annotations

import enum
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash
import zstandard

from protocol.errors import ConfigInvalid, CorruptFragment, FormatUnsupported
from protocol.hashing import Buffer
from protocol.limits import BLOCK_BYTES_MAX, ENVELOPE_BYTES, KIB

if TYPE_CHECKING:
    from erasure.keyring import Keyring

MAGIC: Final = b"HVSB"
VERSION: Final = 1

COMPRESSION_LEVEL: Final = 1
"""Level 3 costs 1.6 times as much for a tenth less (docs/design/004-fragment-format.md)."""

SAMPLE_WINDOWS: Final = 4
SAMPLE_WINDOW_BYTES: Final = 16 * KIB
"""A block longer than all windows together is sampled at as many evenly spaced places."""

KEEP_NUMERATOR: Final = 7
KEEP_DENOMINATOR: Final = 8
"""Compressed bytes are kept if they are at most this share: less would not repay the reads."""

_ASSOCIATED = struct.Struct("<4sBBHIII")
_SEALING = struct.Struct("<12s16s8x")
_CHECKSUM = struct.Struct("<Q")
_FLAGS_OFFSET = 5
_PLAIN_LENGTH = slice(8, 12)
_CHECKSUM_OFFSET = _ASSOCIATED.size + _SEALING.size
assert _CHECKSUM_OFFSET + _CHECKSUM.size == ENVELOPE_BYTES

_NO_SEALING = _SEALING.pack(b"", b"")


class Flags(enum.IntFlag):
    """How the payload was made from the plain bytes."""

    RAW = 0
    ZSTD = 1
    AES_256_GCM = 2


_KNOWN_FLAGS = int(Flags.ZSTD | Flags.AES_256_GCM)


class _Zstd(threading.local):
    """Contexts of the calling thread: making them costs more than compressing a small block."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=BLOCK_BYTES_MAX)


_zstd = _Zstd()


class _Header(NamedTuple):
    """The fields of a verified envelope."""

    flags: Flags
    plain_length: int
    key_id: int
    nonce: bytes
    tag: bytes
    associated: bytes


def seal(
    parts: Sequence[Buffer], plain_length: int, *, keyring: Keyring | None, compress: bool
) -> bytes:
    """The stored block of a plain block that is held in `parts` of `plain_length` bytes together.

    The bytes are copied once, by the final join; compression and encryption each replace the
    copy's source.  The result is a function of the plain bytes, the current key and the release of
    zstd: gateways that put one block at once write the same bytes.
    """
    assert sum(map(len, parts)) == plain_length <= BLOCK_BYTES_MAX
    flags = Flags.RAW
    payload = parts
    if compress:
        compressed = _compress_if_it_pays(parts, plain_length)
        if compressed is not None:
            flags |= Flags.ZSTD
            payload = (compressed,)
    payload_length = sum(map(len, payload))
    if keyring is None:
        associated = _pack_associated(flags, plain_length, payload_length, 0)
        sealing = _NO_SEALING
    else:
        flags |= Flags.AES_256_GCM
        associated = _pack_associated(flags, plain_length, payload_length, keyring.current_id)
        nonce = keyring.nonce_for(associated, payload)
        payload, tag = keyring.encrypt(nonce, associated, payload)
        sealing = _SEALING.pack(nonce, tag)
    digest = xxhash.xxh3_64(associated + sealing)
    for piece in payload:
        digest.update(piece)
    return b"".join((associated, sealing, _CHECKSUM.pack(digest.intdigest()), *payload))


def unseal(stored: Buffer, keyring: Keyring | None) -> Buffer:
    """The plain bytes of a stored block; a view into `stored` if it holds them as they are.

    Raises `CorruptFragment` for bytes that `seal` did not write, `FormatUnsupported` for those of
    a newer version, `ConfigInvalid` if the key is missing.  The caller still has to compare
    SHA-256 wherever a decode used parity.
    """
    view = memoryview(stored)
    header = _verify(view[:ENVELOPE_BYTES], (view[ENVELOPE_BYTES:],))
    payload: Buffer = view[ENVELOPE_BYTES:]
    if header.flags & Flags.AES_256_GCM:
        if keyring is None:
            raise ConfigInvalid(
                f"a block is sealed with key {header.key_id:08x} and no key file is configured",
                {"key_id": f"{header.key_id:08x}"},
            )
        payload = keyring.decrypt(
            header.key_id, header.nonce, header.associated, payload, header.tag
        )
    if header.flags & Flags.ZSTD:
        payload = _decompress(payload, header.plain_length)
    if len(payload) != header.plain_length:
        raise CorruptFragment(
            f"stored block declares {header.plain_length} plain bytes and holds {len(payload)}"
        )
    return payload


def unseal_pieces(pieces: Sequence[Buffer], keyring: Keyring | None) -> tuple[Buffer, ...]:
    """`unseal` for a stored block that is held in pieces: together, its plain bytes.

    A block that is stored as it is comes back as views of the pieces, so that the bytes of a
    healthy read are not copied between two sockets.  Raises what `unseal` raises.
    """
    first = memoryview(pieces[0])
    raw = len(first) >= ENVELOPE_BYTES and first[_FLAGS_OFFSET] == Flags.RAW
    if len(pieces) == 1 or not raw:
        stored = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return (unseal(stored, keyring),)
    payload = (first[ENVELOPE_BYTES:], *pieces[1:])
    header = _verify(first[:ENVELOPE_BYTES], payload)
    if header.flags is not Flags.RAW or sum(map(len, payload)) != header.plain_length:
        raise CorruptFragment(f"stored block declares {header.plain_length} plain bytes")
    return payload


def verify_pieces(pieces: Sequence[Buffer]) -> int:
    """Check a stored block without opening it, which needs no key; its plain length.

    It is held in pieces, the first of which has all of the envelope.  Raises `CorruptFragment` for
    bytes that `seal` did not write, `FormatUnsupported` for those of a newer version.
    """
    first = memoryview(pieces[0])
    return _verify(first[:ENVELOPE_BYTES], (first[ENVELOPE_BYTES:], *pieces[1:])).plain_length


def peek_plain_length(stored: Buffer) -> int:
    """The plain length that an envelope declares, unverified; zero if there is none."""
    if len(stored) < ENVELOPE_BYTES:
        return 0
    return int.from_bytes(stored[_PLAIN_LENGTH], "little")


def _verify(view: memoryview, payload: Sequence[Buffer]) -> _Header:
    """Check magic, checksum, version and lengths, in this order; the fields of version 1.

    `view` is the envelope, `payload` what follows it.
    """
    if len(view) < ENVELOPE_BYTES:
        raise CorruptFragment(f"stored block of {len(view)} bytes is shorter than its envelope")
    associated = bytes(view[: _ASSOCIATED.size])
    magic, version, flags, _, plain_length, payload_length, key_id = _ASSOCIATED.unpack(associated)
    if magic != MAGIC:
        raise CorruptFragment(f"stored block starts with {magic!r} instead of its magic")
    digest = xxhash.xxh3_64(view[:_CHECKSUM_OFFSET])
    for piece in payload:
        digest.update(piece)
    (checksum,) = _CHECKSUM.unpack_from(view, _CHECKSUM_OFFSET)
    if digest.intdigest() != checksum:
        raise CorruptFragment("stored block does not match the checksum in its envelope")
    if version != VERSION or flags & ~_KNOWN_FLAGS:
        raise FormatUnsupported(
            f"stored block of version {version}, flags {flags:#04x}: this program reads version "
            f"{VERSION}; upgrade it"
        )
    if plain_length > BLOCK_BYTES_MAX:
        raise CorruptFragment(f"stored block declares {plain_length} plain bytes, over the limit")
    held = sum(map(len, payload))
    if payload_length != held:
        raise CorruptFragment(
            f"stored block declares a payload of {payload_length} bytes and holds {held}"
        )
    nonce, tag = _SEALING.unpack_from(view, _ASSOCIATED.size)
    return _Header(Flags(flags), plain_length, key_id, nonce, tag, associated)


def _pack_associated(flags: Flags, plain_length: int, payload_length: int, key_id: int) -> bytes:
    return _ASSOCIATED.pack(MAGIC, VERSION, flags, 0, plain_length, payload_length, key_id)


def _compress_if_it_pays(parts: Sequence[Buffer], plain_length: int) -> bytes | None:
    """One zstd frame, or None where a sample, or the frame itself, saves too little."""
    compressor = _zstd.compressor
    if plain_length > SAMPLE_WINDOWS * SAMPLE_WINDOW_BYTES:
        sample = _sample(parts, plain_length)
        if not _pays(len(compressor.compress(sample)), len(sample)):
            return None
    # Joined first, so that the frame does not depend on how the parts arrived.
    compressed = compressor.compress(parts[0] if len(parts) == 1 else b"".join(parts))
    return compressed if _pays(len(compressed), plain_length) else None


def _pays(compressed_length: int, length: int) -> bool:
    return compressed_length * KEEP_DENOMINATOR <= length * KEEP_NUMERATOR


def _sample(parts: Sequence[Buffer], plain_length: int) -> bytes:
    """The start of each `SAMPLE_WINDOWS`-th of the block; cut short where a part ends."""
    stride = plain_length // SAMPLE_WINDOWS
    pieces = []
    next_window, part_start = 0, 0
    for part in parts:
        view = memoryview(part)
        while next_window < part_start + len(view):
            begin = next_window - part_start
            pieces.append(view[begin : begin + SAMPLE_WINDOW_BYTES])
            next_window += stride
        part_start += len(view)
    return b"".join(pieces)


def _decompress(payload: Buffer, plain_length: int) -> bytes:
    """Exactly one zstd frame of exactly `plain_length` bytes.

    The library allocates what the frame declares, so that is compared before it is called.
    Raises `CorruptFragment`.
    """
    try:
        declared = zstandard.frame_content_size(payload)
        # Nothing is never compressed; asked for it, the library would not even read the frame.
        if declared != plain_length or declared == 0:
            raise CorruptFragment(
                f"compressed payload declares {declared} bytes, its envelope {plain_length}"
            )
        return _zstd.decompressor.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFragment(f"compressed payload cannot be read: {error}") from error
