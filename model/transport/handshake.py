"""What two processes say before they trust each other. Each proves that it knows the token; nobody sends it.

    dialer  -> acceptor   hello: magic, version, both ids, a nonce
    acceptor -> dialer    its nonce, and its proof
    dialer  -> acceptor   its proof; with shared memory the segment and its bell come along
    acceptor -> dialer    welcome; with shared memory its bell comes along
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct

MAGIC = b"MOESAIC\0"
VERSION = 1             # of the handshake and of what is said after it; with it changes the layout of the rings
_HELLO = struct.Struct("<8sQ16s16s16s")
NONCE_BYTES, PROOF_BYTES = 16, 32
HELLO_BYTES = _HELLO.size
CHALLENGE_BYTES = NONCE_BYTES + PROOF_BYTES
WELCOME = b"W"


class HandshakeError(Exception):
    """The other side is a stranger, or speaks another version."""


def write_hello(own_id: bytes, peer_id: bytes) -> bytes:
    return _HELLO.pack(MAGIC, VERSION, own_id, peer_id, secrets.token_bytes(NONCE_BYTES))


def read_hello(hello: bytes, own_id: bytes) -> bytes:
    """Return the id of who dials. Raises HandshakeError."""
    magic, version, dialer_id, wanted_id, _ = _HELLO.unpack(hello)
    if magic != MAGIC:
        raise HandshakeError("it is no endpoint")
    if version != VERSION:
        raise HandshakeError(f"it speaks version {version}, this one {VERSION}")
    if wanted_id != own_id:
        raise HandshakeError("it looks for another process")
    return bytes(dialer_id)


def write_challenge(token: str, hello: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + _proof(token, b"acceptor", hello, nonce)


def write_proof(token: str, hello: bytes, challenge: bytes) -> bytes:
    """Answer a challenge. Raises HandshakeError when the acceptor does not know the token."""
    nonce, proof = challenge[:NONCE_BYTES], challenge[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"acceptor", hello, nonce)):
        raise HandshakeError("it does not know the token")
    return _proof(token, b"dialer", hello, nonce)


def check_proof(token: str, hello: bytes, challenge: bytes, proof: bytes) -> None:
    """Raise HandshakeError when the dialer does not know the token."""
    if not hmac.compare_digest(proof, _proof(token, b"dialer", hello, challenge[:NONCE_BYTES])):
        raise HandshakeError("it does not know the token")


def _proof(token: str, who: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), who + hello + nonce, hashlib.sha256)
