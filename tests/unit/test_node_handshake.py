"""The proof of the cluster secret."""

from __future__ import annotations

import pytest

from protocol.errors import HandshakeRefused
from protocol.messages import Challenge, Hello, Prove
from storage_node.handshake import NONCE_BYTES, challenge, check_hello, check_proof, prove

SECRET = b"s" * 32
HELLO = Hello("cluster", "node-01", b"c" * NONCE_BYTES)
SERVER_NONCE = b"n" * NONCE_BYTES
SENT = challenge(SECRET, HELLO, 7, SERVER_NONCE)


def test_both_ends_with_the_secret_agree() -> None:
    check_hello(HELLO, "cluster", "node-01")
    check_proof(SECRET, HELLO, SENT, prove(SECRET, HELLO, SENT))


def test_a_client_without_the_secret_is_refused() -> None:
    honest = prove(SECRET, HELLO, SENT)
    for proof in (b"", bytes(32), honest.proof[:-1], SENT.proof):
        with pytest.raises(HandshakeRefused):
            check_proof(SECRET, HELLO, SENT, Prove(proof))
    with pytest.raises(HandshakeRefused):
        check_proof(b"t" * 32, HELLO, SENT, honest)


def test_a_server_without_the_secret_gets_no_proof() -> None:
    for impostor in (
        challenge(b"t" * 32, HELLO, 7, SERVER_NONCE),
        Challenge(SERVER_NONCE, 8, SENT.proof),
        Challenge(b"m" * NONCE_BYTES, 7, SENT.proof),
        Challenge(SERVER_NONCE, 7, b""),
    ):
        with pytest.raises(HandshakeRefused):
            prove(SECRET, HELLO, impostor)


def test_a_proof_is_good_for_one_connection_only() -> None:
    old = prove(SECRET, HELLO, SENT)
    again = challenge(SECRET, HELLO, 7, b"m" * NONCE_BYTES)
    with pytest.raises(HandshakeRefused):
        check_proof(SECRET, HELLO, again, old)
    other = Hello("cluster", "node-02", HELLO.client_nonce)
    with pytest.raises(HandshakeRefused):
        check_proof(SECRET, other, SENT, old)


def test_fields_cannot_be_shifted_into_each_other() -> None:
    one = Hello("cluster", "node-01", b"c" * NONCE_BYTES)
    two = Hello("clustern", "ode-01", b"c" * NONCE_BYTES)
    assert challenge(SECRET, one, 7, SERVER_NONCE) != challenge(SECRET, two, 7, SERVER_NONCE)


@pytest.mark.parametrize(
    "hello",
    [
        Hello("other", "node-01", b"c" * NONCE_BYTES),
        Hello("cluster", "node-02", b"c" * NONCE_BYTES),
        Hello("cluster", "node-01", b""),
        Hello("cluster", "node-01", b"c" * 1000),
    ],
)
def test_a_client_that_means_another_node_is_refused(hello: Hello) -> None:
    with pytest.raises(HandshakeRefused):
        check_hello(hello, "cluster", "node-01")


def test_the_proof_is_the_documented_one() -> None:
    assert SENT.proof.hex() == GOLDEN


GOLDEN = "e520338af56dac3e5cc0bb6d77cf4eacbdc2e50c207fb01a0420ad2644a828c1"
"""HMAC-SHA256 of version 1 for the values above; computed once, never to change."""
