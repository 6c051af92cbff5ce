"""Answers who calls at an endpoint: shakes hands with members, and hangs up on everybody else.

One thread for all callers; a stranger that sends garbage, or nothing, keeps nobody waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

from model.transport.address import EndpointAddress
from model.transport.dialer import Pair, prepare_socket
from model.transport.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    WELCOME,
    HandshakeError,
    check_proof,
    read_hello,
    write_challenge,
)
from model.transport.segment import check_segment

logger = logging.getLogger(__name__)

_MAX_CALLERS = 64       # that have yet to prove themselves; the oldest makes room for one more
_PATIENCE_S = 5.0
_PAUSE_S = 0.1          # without file descriptors the caller would be announced again at once


class _Caller:
    """Is somebody who called and has yet to prove who it is."""

    def __init__(self, connected: socket.socket, own: EndpointAddress) -> None:
        self.socket = connected
        self.came_s = time.monotonic()
        self.peer_id = b""
        self.fds: list[int] = []
        self._own = own
        self._received = b""
        self._hello = b""
        self._challenge = b""
        self._shares_memory = connected.family == socket.AF_UNIX

    def read(self) -> bool:
        """Take what has come, and answer -> whether it has proved itself. Raises HandshakeError, OSError."""
        needed = PROOF_BYTES if self._hello else HELLO_BYTES
        if self._shares_memory:
            part, fds, _, _ = socket.recv_fds(self.socket, needed - len(self._received), 2, socket.MSG_CMSG_CLOEXEC)
            self.fds += fds
        else:
            part = self.socket.recv(needed - len(self._received))
        if not part:
            raise HandshakeError("it hung up")
        self._received += part
        if len(self._received) < needed:
            return False
        message, self._received = self._received, b""
        if not self._hello:
            self.peer_id = read_hello(message, bytes.fromhex(self._own.peer_id))
            self._hello, self._challenge = message, write_challenge(self._own.token.reveal(), message)
            self.socket.sendall(self._challenge)
            return False
        check_proof(self._own.token.reveal(), self._hello, self._challenge, message)
        return True

    def welcome(self, own_bell: int, segment_bytes: int) -> Pair:
        """Take it in. Raises HandshakeError, OSError."""
        if not self._shares_memory:
            self.socket.sendall(WELCOME)
            return Pair(self.socket.detach())
        if len(self.fds) != 2:
            raise HandshakeError("it came without its segment and bell")
        check_segment(self.fds[0], segment_bytes)
        socket.send_fds(self.socket, [WELCOME], [own_bell])
        segment, bell = self.fds
        self.fds = []
        return Pair(self.socket.detach(), segment, bell)

    def hang_up(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Doorman:
    """Listens until `close`. on_member(peer id, what connects us) is called on the doorman's thread, before the member
    hears that it is welcome: it may send at once."""

    def __init__(self, own: EndpointAddress, listeners: list[socket.socket], own_bell: int, segment_bytes: int,
                 on_member: Callable[[bytes, Pair], None]) -> None:
        self._own = own
        self._listeners = listeners
        self._own_bell = own_bell
        self._segment_bytes = segment_bytes
        self._on_member = on_member
        self._callers: list[_Caller] = []
        self._selector = selectors.DefaultSelector()
        self._wakes, self._waker = socket.socketpair()
        for listener in (*listeners, self._wakes):
            self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="moesaic-doorman", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and hang up on who is not in yet."""
        self._waker.send(b"x")
        self._thread.join()
        self.forget()

    def forget(self) -> None:
        """Close the file descriptors: the thread has ended, or has never been in this child of a fork."""
        for caller in self._callers:
            caller.hang_up()
        for listener in (*self._listeners, self._wakes, self._waker):
            listener.close()
        self._selector.close()

    def _run(self) -> None:
        while True:
            timeout_s = self._callers[0].came_s + _PATIENCE_S - time.monotonic() if self._callers else None
            for key, _ in self._selector.select(None if timeout_s is None else max(timeout_s, 0.0)):
                if key.fileobj is self._wakes:
                    return
                if isinstance(key.data, _Caller):
                    self._listen_to(key.data)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._open(key.fileobj)
            while self._callers and self._callers[0].came_s + _PATIENCE_S <= time.monotonic():
                self._turn_away(self._callers[0], "it took too long")

    def _open(self, listener: socket.socket) -> None:
        try:
            connected, _ = listener.accept()
        except OSError as error:        # it has gone again, or there are no file descriptors left
            logger.warning("transport_accept_failed error=%s", error)
            time.sleep(_PAUSE_S)
            return
        connected.setblocking(False)
        with contextlib.suppress(OSError):
            prepare_socket(connected)
        while len(self._callers) >= _MAX_CALLERS:
            self._turn_away(self._callers[0], "too many call at once")
        caller = _Caller(connected, self._own)
        self._callers.append(caller)
        self._selector.register(connected, selectors.EVENT_READ, caller)

    def _listen_to(self, caller: _Caller) -> None:
        if caller not in self._callers:     # turned away in this round
            return
        try:
            if not caller.read():
                return
            self._selector.unregister(caller.socket)
            self._callers.remove(caller)
            self._on_member(caller.peer_id, caller.welcome(self._own_bell, self._segment_bytes))
        except (HandshakeError, OSError) as error:
            self._turn_away(caller, str(error))

    def _turn_away(self, caller: _Caller, why: str) -> None:
        logger.warning("transport_caller_refused why=%s", why)
        if caller in self._callers:
            self._callers.remove(caller)
            self._selector.unregister(caller.socket)
        caller.hang_up()
