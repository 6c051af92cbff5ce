"""Calls another endpoint, and shakes hands."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from dataclasses import dataclass

from model.transport.address import EndpointAddress
from model.transport.handshake import CHALLENGE_BYTES, WELCOME, HandshakeError, write_hello, write_proof
from model.transport.segment import new_segment

_ATTEMPT_S = 5.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Holds file descriptors of a connection; the last two are None over TCP."""

    socket: int
    segment: int | None = None
    bell: int | None = None         # of the other side


def dial(own: EndpointAddress, peer: EndpointAddress, own_bell: int, segment_bytes: int, deadline_s: float) -> Pair:
    """Connect as both sides know to. Raises OSError, HandshakeError."""
    timeout_s = max(min(deadline_s - time.monotonic(), _ATTEMPT_S), 1e-3)
    shares_memory = own.shares_memory_with(peer)
    with contextlib.ExitStack() as undo:
        caller = undo.enter_context(_connect(peer, shares_memory, timeout_s))
        hello = write_hello(bytes.fromhex(own.peer_id), bytes.fromhex(peer.peer_id))
        caller.sendall(hello)
        proof = write_proof(peer.token.reveal(), hello, _receive(caller, CHALLENGE_BYTES))
        segment = bell = None
        if shares_memory:
            segment = new_segment(segment_bytes)
            undo.callback(os.close, segment)
            # All of it fits: the socket is empty.
            socket.send_fds(caller, [proof], [segment, own_bell])
            bell = _receive_bell(caller)
        else:
            caller.sendall(proof)
            if _receive(caller, len(WELCOME)) != WELCOME:
                raise HandshakeError("it did not say welcome")
        caller.setblocking(False)
        undo.pop_all()
        return Pair(caller.detach(), segment, bell)


def prepare_socket(connected: socket.socket) -> None:
    """Let small messages leave at once, and let the system look now and then whether the other machine is there."""
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def _connect(peer: EndpointAddress, shares_memory: bool, timeout_s: float) -> socket.socket:
    if not shares_memory:
        caller = socket.create_connection((peer.host, peer.port), timeout_s)
        prepare_socket(caller)
        return caller
    caller = socket.socket(socket.AF_UNIX)
    try:
        caller.settimeout(timeout_s)
        caller.connect(peer.socket_name)
    except OSError:
        caller.close()
        raise
    return caller


def _receive(caller: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = caller.recv(num_bytes - len(received))
        if not part:
            raise HandshakeError("it hung up")
        received += part
    return received


def _receive_bell(caller: socket.socket) -> int:
    size = array.array("i").itemsize
    message, control, _, _ = caller.recvmsg(len(WELCOME), socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and message == WELCOME:
            return int.from_bytes(content[:size], "little")
    raise HandshakeError("it did not say welcome" if message else "it hung up")
