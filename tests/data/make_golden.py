"""Write the golden fragments of format version 1, once.

    python tests/data/make_golden.py

The files in `tests/data/golden-v1/` are read for ever by `tests/unit/test_erasure_golden.py`: a
release that cannot read them cannot read anybody's disks.  So this script refuses to replace a
file; a new format version gets a new directory, and keeps this one.

    plain.bin               the plain block
    SCHEME-FORM.fragments   the n records of its stripe, one after the other, all of one length
    manifest.json           key, names and the fields that every record must show
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from erasure.codec import Codec
from erasure.envelope import seal
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import make_stripe
from protocol.hashing import hash_block
from protocol.ids import VolumeId

DIRECTORY = Path(__file__).parent / "golden-v1"
KEY = bytes(range(32))
VOLUME = VolumeId(1_234_567_890_123)
EPOCH = 42
PLAIN = b"".join(b"%d pairs of socks in the haversack\n" % number for number in range(60))[:1501]


def main() -> None:
    DIRECTORY.mkdir()
    keyring = Keyring([KEY])
    forms = {
        "raw": seal([PLAIN], len(PLAIN), keyring=None, compress=False),
        "zstd": seal([PLAIN], len(PLAIN), keyring=None, compress=True),
        "aes": seal([PLAIN], len(PLAIN), keyring=keyring, compress=False),
        "zstd-aes": seal([PLAIN], len(PLAIN), keyring=keyring, compress=True),
        "raw-empty": seal([], 0, keyring=None, compress=True),
    }
    files = {}
    for form, stored in forms.items():
        plain = b"" if form == "raw-empty" else PLAIN
        for scheme in (Scheme.rs(6, 3), Scheme.replica(4)):
            stripe = make_stripe(Codec(), scheme, hash_block(plain), VOLUME, EPOCH, stored)
            name = f"{scheme}-{form}.fragments"
            (DIRECTORY / name).write_bytes(b"".join(bytes(h) + bytes(p) for h, p in stripe))
            files[name] = {
                "scheme": scheme.name,
                "form": form,
                "hash": str(hash_block(plain)),
                "plain_length": len(plain),
                "stored_length": len(stored),
            }
    (DIRECTORY / "plain.bin").write_bytes(PLAIN)
    manifest = {
        "key": KEY.hex(),
        "volume": int(VOLUME),
        "epoch": EPOCH,
        "files": files,
    }
    (DIRECTORY / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
