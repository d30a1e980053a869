"""The erasure code: one stored block to n equal payloads, and any k of them back again.

Step "encode" of the life of a put; step "join" (all data slots answered) or "decode" (some did
not) of a get; step "reconstruct" of a repair.  Called by `erasure.stripe` and
`cluster.block_client`, off the event loop: PyECLib holds the GIL.  Pure functions over bytes; must
not import the envelope or the fragment record, and checks nothing but lengths: whoever calls it
proves the result.

A payload is the bare chunk.  PyECLib's own fragments start with a header of 80 bytes that carries
its version and a checksum whose kind has changed between releases; it is cut off after the encode
(a view, no copy) and made again for the decode, where joining it to the payload is the one copy
that PyECLib's demand for `bytes` costs anyway.  `docs/design/004-fragment-format.md` has the why.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

from pyeclib.ec_iface import ECDriver, ECDriverError

from erasure import isal
from erasure.scheme import Scheme, SchemeKind
from protocol.errors import BlockUnreadable, CorruptFragment, SchemeUnsupported
from protocol.hashing import Buffer

EC_TYPE: Final = "isa_l_rs_cauchy"
"""MDS for every k and m; ISA-L's Vandermonde matrix is not (docs/design/002-erasure-code.md)."""

_LIBRARY_HEADER_BYTES = 80
_META_BYTES = 59
_SLOT_AND_SIZE = struct.Struct("<II")
_ORIGINAL_SIZE = struct.Struct("<Q")
_META_CHECKSUM = struct.Struct("<I")


class Codec:
    """Encodes and decodes every supported scheme; one per process, safe to share between threads.

    Drivers are made at first use and kept: there are as many as schemes in use.
    """

    def __init__(self) -> None:
        self._drivers: dict[Scheme, _Driver] = {}

    def encode(self, scheme: Scheme, stored: bytes) -> list[Buffer]:
        """The n payloads of a stored block of any length, data slots first.

        Each has `scheme.chunk_bytes(len(stored))` bytes; the last data payloads are padded with
        zeros.  Nothing is copied beyond what the library does; replicas are `stored` itself.
        """
        if scheme.kind is SchemeKind.REPLICA or not stored:
            return [stored] * scheme.n
        return self._driver(scheme).encode(stored)

    def join_data(self, scheme: Scheme, payloads: Sequence[Buffer], stored_length: int) -> Buffer:
        """The stored block from its k data payloads in slot order: a concatenation, no decode.

        Raises `CorruptFragment` if a payload's length is not its stripe's.
        """
        pieces = self.data_pieces(scheme, payloads, stored_length)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def data_pieces(
        self, scheme: Scheme, payloads: Sequence[Buffer], stored_length: int
    ) -> list[Buffer]:
        """What `join_data` joins: views of the k data payloads, without their padding."""
        assert len(payloads) == scheme.k
        _check_lengths(scheme, payloads, stored_length)
        if scheme.kind is SchemeKind.REPLICA:
            return [payloads[0]]
        chunk = scheme.chunk_bytes(stored_length)
        left = stored_length
        pieces: list[Buffer] = []
        for payload in payloads:
            pieces.append(payload if left >= chunk else memoryview(payload)[: max(left, 0)])
            left -= chunk
        return pieces

    def decode(self, scheme: Scheme, payloads: Mapping[int, Buffer], stored_length: int) -> Buffer:
        """The stored block from any k payloads, by slot; data slots are preferred if more come.

        Raises `BlockUnreadable` for fewer than k, `CorruptFragment` for a payload of another
        length.  Wrong bytes give a wrong block without an error: prove the result.
        """
        chosen = _choose_sources(scheme, payloads, stored_length)
        if scheme.kind is SchemeKind.REPLICA or chosen[-1] < scheme.k or stored_length == 0:
            return self.join_data(scheme, [payloads[slot] for slot in chosen], stored_length)
        sources = {slot: payloads[slot] for slot in chosen}
        driver = self._driver(scheme)
        if not driver.is_direct:
            return driver.decode(sources, stored_length)
        missing = [slot for slot in range(scheme.k) if slot not in sources]
        sources |= driver.reconstruct(sources, missing, stored_length)
        return self.join_data(scheme, [sources[slot] for slot in range(scheme.k)], stored_length)

    def reconstruct(
        self,
        scheme: Scheme,
        payloads: Mapping[int, Buffer],
        wanted: Sequence[int],
        stored_length: int,
    ) -> dict[int, Buffer]:
        """The payloads of the `wanted` slots, each computed from k others that are not wanted.

        Raises `BlockUnreadable` for fewer than k others, `CorruptFragment` for a payload of
        another length.  Wrong bytes give wrong payloads without an error.
        """
        assert all(0 <= slot < scheme.n for slot in wanted)
        others = {slot: payload for slot, payload in payloads.items() if slot not in wanted}
        chosen = _choose_sources(scheme, others, stored_length)
        if scheme.kind is SchemeKind.REPLICA or stored_length == 0:
            return dict.fromkeys(wanted, others[chosen[0]])
        sources = {slot: others[slot] for slot in chosen}
        return self._driver(scheme).reconstruct(sources, wanted, stored_length)

    def _driver(self, scheme: Scheme) -> _Driver:
        driver = self._drivers.get(scheme)
        if driver is None:
            driver = self._drivers[scheme] = _Driver(scheme)
        return driver


def _choose_sources(
    scheme: Scheme, payloads: Mapping[int, Buffer], stored_length: int
) -> list[int]:
    """The k lowest slots given: data before parity."""
    assert all(0 <= slot < scheme.n for slot in payloads)
    if len(payloads) < scheme.k:
        raise BlockUnreadable(
            f"{len(payloads)} fragments of a {scheme} stripe are left; a read needs {scheme.k}"
        )
    chosen = sorted(payloads)[: scheme.k]
    _check_lengths(scheme, [payloads[slot] for slot in chosen], stored_length)
    return chosen


def _check_lengths(scheme: Scheme, payloads: Sequence[Buffer], stored_length: int) -> None:
    chunk = scheme.chunk_bytes(stored_length)
    for payload in payloads:
        if len(payload) != chunk:
            raise CorruptFragment(
                f"payload of {len(payload)} bytes in a {scheme} stripe whose slots have {chunk}"
            )


class _Driver:
    """PyECLib for one RS scheme, with its 80-byte headers taken off and put on again."""

    def __init__(self, scheme: Scheme) -> None:
        """Raises `SchemeUnsupported` if this build of PyECLib lacks the code, or frames its
        fragments in a way that we do not know."""
        self._scheme = scheme
        try:
            self._library = ECDriver(ec_type=EC_TYPE, k=scheme.k, m=scheme.m)
            self._isal = isal.library()
            self._template: bytes = self._library.encode(bytes(scheme.k))[0][:_LIBRARY_HEADER_BYTES]
            works = self._gives_back(bytes(range(1, 3 * scheme.k)))
        except ECDriverError as error:
            raise SchemeUnsupported(
                f"PyECLib cannot do {scheme} with {EC_TYPE}: {error}"
            ) from error
        if not works:
            raise SchemeUnsupported(
                f"PyECLib's {EC_TYPE} does not read back what it wrote for {scheme}: "
                "install the version that this release names"
            )

    @property
    def is_direct(self) -> bool:
        """Whether slots are made by ISA-L itself, without PyECLib's copies."""
        return self._isal is not None

    def encode(self, stored: bytes) -> list[Buffer]:
        fragments = self._library.encode(stored)
        assert len(fragments[0]) == _LIBRARY_HEADER_BYTES + self._scheme.chunk_bytes(len(stored))
        return [memoryview(fragment)[_LIBRARY_HEADER_BYTES:] for fragment in fragments]

    def decode(self, payloads: Mapping[int, Buffer], stored_length: int) -> bytes:
        """Exactly k payloads.  Raises `BlockUnreadable` if the library refuses them."""
        try:
            stored: bytes = self._library.decode(self._framed(payloads, stored_length))
        except ECDriverError as error:
            raise BlockUnreadable(f"PyECLib refuses slots {sorted(payloads)}: {error}") from error
        assert len(stored) == stored_length
        return stored

    def reconstruct(
        self, payloads: Mapping[int, Buffer], wanted: Sequence[int], stored_length: int
    ) -> dict[int, Buffer]:
        """Exactly k payloads.  Raises `BlockUnreadable` if the library refuses them."""
        ordered = sorted(set(wanted))
        if self._isal is not None:
            return isal.reconstruct(self._isal, self._scheme, payloads, ordered)
        framed = self._framed(payloads, stored_length)
        try:
            made = self._library.reconstruct(framed, list(ordered))
        except ECDriverError as error:
            raise BlockUnreadable(f"PyECLib refuses slots {sorted(payloads)}: {error}") from error
        return {
            slot: memoryview(fragment)[_LIBRARY_HEADER_BYTES:]
            for slot, fragment in zip(ordered, made, strict=True)
        }

    def _framed(self, payloads: Mapping[int, Buffer], stored_length: int) -> list[bytes]:
        return [
            b"".join((self._library_header(slot, len(payload), stored_length), payload))
            for slot, payload in payloads.items()
        ]

    def _library_header(self, slot: int, chunk: int, stored_length: int) -> bytes:
        """The header that this build of the library would write itself.

        0 slot, 4 chunk length, 8 unused, 12 original length, 20 checksums and backend, 59 magic
        and version, 67 CRC-32 of bytes 0..59, 71 padding; little-endian on the machines we run on.
        """
        template = self._template
        meta = b"".join(
            (
                _SLOT_AND_SIZE.pack(slot, chunk),
                template[8:12],
                _ORIGINAL_SIZE.pack(stored_length),
                template[20:_META_BYTES],
            )
        )
        checksum_at = _META_BYTES + 8
        return b"".join(
            (
                meta,
                template[_META_BYTES:checksum_at],
                _META_CHECKSUM.pack(zlib.crc32(meta)),
                template[checksum_at + _META_CHECKSUM.size :],
            )
        )

    def _gives_back(self, stored: bytes) -> bool:
        """Encode, lose the first slots, decode and reconstruct through headers of our making."""
        payloads = self.encode(stored)
        lost = range(self._scheme.m)
        left = {slot: payloads[slot] for slot in range(self._scheme.m, self._scheme.n)}
        made = self.reconstruct(left, lost, len(stored))
        return self.decode(left, len(stored)) == stored and all(
            made[slot] == payloads[slot] for slot in lost
        )
