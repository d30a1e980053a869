"""Keys for encryption at rest: which key seals new blocks, which ones still open old blocks.

Called by `erasure.envelope`, step "seal" of a put and "unseal" of a get.  Pure data: whoever
starts the process reads the key file and passes its text.  Imports `cryptography`, so a process
without encryption never loads it; must not import `erasure.envelope`.

A key file is text: one key a line as 64 hex digits, `#` starts a comment.  The *last* key seals
new blocks, so rotation appends a line; a key whose blocks still exist must stay in the file.  A
key's id is derived from the key itself, so that a wrong key can never be tried under a right id.

Nonces are synthetic: the first 96 bits of HMAC-SHA256, under a key derived from the block key, over
all that is encrypted.  So sealing is a function of key and content: two gateways that put one block
into one volume write the same bytes, and a repeated nonce can only repeat the same message.  As
with random nonces, a key is good for 2^32 blocks (NIST SP 800-38D): append one long before that.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocol.errors import ConfigInvalid, CorruptFragment
from protocol.hashing import Buffer

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16

_KEY_ID_LABEL = b"haversack key id v1\0"
_NONCE_LABEL = b"haversack nonce key v1\0"


class Encrypted(NamedTuple):
    """Ciphertext in as many pieces as the plain text had, and its authentication tag."""

    pieces: list[bytes]
    tag: bytes


def key_id_of(key: bytes) -> int:
    """32-bit name of a key: says which key, tells nothing about it."""
    return int.from_bytes(hashlib.sha256(_KEY_ID_LABEL + key).digest()[:4], "little")


class Keyring:
    """AES-256-GCM under one of several keys.  Immutable; safe to share between threads."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """`keys`: 32 bytes each, the last seals.  Raises `ConfigInvalid` without a usable key."""
        if not keys:
            raise ConfigInvalid("the key file holds no key: write 64 hex digits on a line")
        self._keys: dict[int, bytes] = {}
        for number, key in enumerate(keys, start=1):
            if len(key) != KEY_BYTES:
                raise ConfigInvalid(f"key {number} has {len(key)} bytes; AES-256 needs {KEY_BYTES}")
            if self._keys.setdefault(key_id_of(key), key) != key:
                raise ConfigInvalid(f"key {number} has the id of another key: generate a new one")
        self._current_id = key_id_of(keys[-1])
        self._nonce_key = hashlib.sha256(_NONCE_LABEL + keys[-1]).digest()

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read the text of a key file.  Raises `ConfigInvalid`, never quoting the line."""
        keys = []
        for number, line in enumerate(text.splitlines(), start=1):
            digits = line.partition("#")[0].strip()
            if not digits:
                continue
            try:
                key = bytes.fromhex(digits)
            except ValueError:
                # Without its cause: bytes.fromhex may quote the digits.
                raise ConfigInvalid(f"line {number} of the key file is not hex digits") from None
            keys.append(key)
        return cls(keys)

    def __repr__(self) -> str:
        return f"Keyring({len(self._keys)} key(s), current {self._current_id:08x})"

    @property
    def current_id(self) -> int:
        """Id of the key that seals new blocks."""
        return self._current_id

    def nonce_for(self, associated: bytes, pieces: Sequence[Buffer]) -> bytes:
        """The nonce under which the current key encrypts this message and no other."""
        digest = hmac.new(self._nonce_key, associated, hashlib.sha256)
        for piece in pieces:
            digest.update(piece)
        return digest.digest()[:NONCE_BYTES]

    def encrypt(self, nonce: bytes, associated: bytes, pieces: Sequence[Buffer]) -> Encrypted:
        """Encrypt `pieces` as one message under the current key; `associated` is authenticated."""
        cipher = Cipher(algorithms.AES(self._keys[self._current_id]), modes.GCM(nonce))
        encryptor = cipher.encryptor()
        encryptor.authenticate_additional_data(associated)
        encrypted = [encryptor.update(piece) for piece in pieces]
        encryptor.finalize()
        return Encrypted(encrypted, encryptor.tag)

    def decrypt(
        self, key_id: int, nonce: bytes, associated: bytes, message: Buffer, tag: bytes
    ) -> bytes:
        """Plain bytes of one message.

        Raises `ConfigInvalid` if the key is not in the ring, `CorruptFragment` if message, tag,
        nonce or associated data are not what the key's holder wrote.
        """
        key = self._keys.get(key_id)
        if key is None:
            raise ConfigInvalid(
                f"a block is sealed with key {key_id:08x}, which is not in the key file: "
                "put that key back",
                {"key_id": f"{key_id:08x}"},
            )
        decryptor = Cipher(algorithms.AES(key), modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(associated)
        plain = decryptor.update(message)
        try:
            decryptor.finalize()
        except InvalidTag as error:
            raise CorruptFragment(
                f"stored block does not authenticate under key {key_id:08x}"
            ) from error
        return plain


def read_keyring(path: Path | None) -> Keyring | None:
    """Keys of encryption at rest from their file; None when it is off.  Raises `ConfigInvalid`."""
    if path is None:
        return None
    try:
        return Keyring.parse(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"the key file {path} cannot be read") from error
