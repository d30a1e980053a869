"""Proof of the cluster secret on the data port: HMAC-SHA256 over fresh nonces of both ends.

First step of every connection between `port_client` and `port_server`.  Pure functions: nonces
come from the caller.  The secret never travels; the roles are in the text that is authenticated,
so that neither end's proof can be sent back to it.  Bytes after the handshake are guarded against
accidents (checksums), not against someone who owns the network between the ends: use TLS or a
private network there.

Authenticated text: the fields below, each with its length in front (4 bytes, little-endian):
b"haversack data port 1", role, cluster id, node id, incarnation (decimal), client nonce, server
nonce.  History: version 1, first.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final

from protocol.errors import HandshakeRefused
from protocol.messages import Challenge, Hello, Prove

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
_CONTEXT = b"haversack data port 1"
_SERVER = b"server"
_CLIENT = b"client"


def challenge(secret: bytes, hello: Hello, incarnation: int, server_nonce: bytes) -> Challenge:
    """The server's answer to `hello`, which it has checked against its own names."""
    proof = _proof(secret, _SERVER, hello, incarnation, server_nonce)
    return Challenge(server_nonce, incarnation, proof)


def check_hello(hello: Hello, cluster_id: str, node_id: str) -> None:
    """Raise `HandshakeRefused` unless the client means this node and sent a whole nonce."""
    if hello.cluster_id != cluster_id:
        raise HandshakeRefused(f"this node belongs to another cluster than {hello.cluster_id[:80]}")
    if hello.node_id != node_id:
        raise HandshakeRefused(
            f"this is {node_id}, not {hello.node_id[:80]}: refresh the map", {"node": node_id}
        )
    if len(hello.client_nonce) != NONCE_BYTES:
        raise HandshakeRefused(f"a nonce has {NONCE_BYTES} bytes")


def prove(secret: bytes, hello: Hello, received: Challenge) -> Prove:
    """The client's proof.  Raises `HandshakeRefused` if the server did not prove itself first."""
    expected = _proof(secret, _SERVER, hello, received.incarnation, received.server_nonce)
    if not hmac.compare_digest(expected, received.proof):
        raise HandshakeRefused(f"the node at the other end of {hello.node_id} holds another secret")
    if len(received.server_nonce) != NONCE_BYTES:
        raise HandshakeRefused(f"a nonce has {NONCE_BYTES} bytes")
    return Prove(_proof(secret, _CLIENT, hello, received.incarnation, received.server_nonce))


def check_proof(secret: bytes, hello: Hello, sent: Challenge, received: Prove) -> None:
    """Raise `HandshakeRefused` unless the client holds the secret."""
    expected = _proof(secret, _CLIENT, hello, sent.incarnation, sent.server_nonce)
    if not hmac.compare_digest(expected, received.proof):
        raise HandshakeRefused("the client does not hold the cluster secret")


def _proof(
    secret: bytes, role: bytes, hello: Hello, incarnation: int, server_nonce: bytes
) -> bytes:
    fields = (
        _CONTEXT,
        role,
        hello.cluster_id.encode(),
        hello.node_id.encode(),
        str(incarnation).encode(),
        hello.client_nonce,
        server_nonce,
    )
    text = b"".join(struct.pack("<I", len(field)) + field for field in fields)
    return hmac.new(secret, text, hashlib.sha256).digest()
