from __future__ import annotations

import pytest

from model.transport.handshake import (
    HELLO_BYTES,
    HandshakeError,
    check_proof,
    read_hello,
    write_challenge,
    write_hello,
    write_proof,
)

OWN, PEER = b"a" * 16, b"b" * 16


def test_who_knows_the_token_is_believed() -> None:
    hello = write_hello(OWN, PEER)
    assert len(hello) == HELLO_BYTES and read_hello(hello, PEER) == OWN
    challenge = write_challenge("secret", hello)
    check_proof("secret", hello, challenge, write_proof("secret", hello, challenge))


def test_who_does_not_know_the_token_is_not() -> None:
    hello = write_hello(OWN, PEER)
    challenge = write_challenge("secret", hello)
    with pytest.raises(HandshakeError, match="does not know the token"):
        write_proof("guess", hello, challenge)
    proof = write_proof("guess", hello, write_challenge("guess", hello))
    with pytest.raises(HandshakeError, match="does not know the token"):
        check_proof("secret", hello, challenge, proof)


def test_a_proof_serves_once() -> None:
    """Neither what was heard before, nor what the acceptor itself said, opens the door."""
    hello = write_hello(OWN, PEER)
    challenge = write_challenge("secret", hello)
    proof = write_proof("secret", hello, challenge)
    with pytest.raises(HandshakeError):
        check_proof("secret", hello, write_challenge("secret", hello), proof)
    with pytest.raises(HandshakeError):
        check_proof("secret", hello, challenge, challenge[16:])


@pytest.mark.parametrize(("at", "why"), [(0, "no endpoint"), (8, "speaks version"), (32, "another process")])
def test_a_hello_that_fits_not_is_refused(at: int, why: str) -> None:
    hello = bytearray(write_hello(OWN, PEER))
    hello[at] ^= 1
    with pytest.raises(HandshakeError, match=why):
        read_hello(bytes(hello), PEER)
