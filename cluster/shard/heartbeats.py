"""Heartbeats between members, beside the exchanges: a member that is stopped or cut off does not answer.

A death is told by the end of its connections. This is for what leaves them open: a process that is stopped, a host that
hangs, a cable that is pulled. Datagrams from a thread in C (model/transport/heartbeats.h): neither a step, nor a busy
event loop, nor what holds Python's lock for seconds silences a member that lives. A process answers from its beginning
on, whichever epoch it is in, and what gets lost is made up for by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import socket
from collections.abc import Iterable

from model.transport.address import EndpointAddress, Secret
from model.transport.library import load_library

INTERVAL_S = 0.125      # what it costs an idle member grows as it shrinks; six may get lost within the default limit
_HOST_BYTES, _ID_BYTES, _KEY_BYTES = 64, 16, 16


class _Watched(ctypes.Structure):
    """As in heartbeats.h."""

    _fields_ = (("host", ctypes.c_char * _HOST_BYTES), ("port", ctypes.c_int32), ("id", ctypes.c_ubyte * _ID_BYTES),
                ("key", ctypes.c_ubyte * _KEY_BYTES))


class Heartbeats:
    """Asks the watched peers and answers everybody who knows the token, until `close`. One thread calls its methods."""

    def __init__(self, own: EndpointAddress, limit_s: float) -> None:
        """Bind a free port of the endpoint's address. limit_s: who has not answered for so long is silent.

        Raises OSError, TransportLibraryError.
        """
        self._library = load_library()
        self._own = own
        self._limit_s = limit_s
        self._peer_ids: tuple[str, ...] = ()
        family = socket.AF_INET6 if ":" in own.host else socket.AF_INET
        with contextlib.ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            bound.bind((own.host, 0))
            self.port = int(bound.getsockname()[1])
            self.news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)     # to be read when somebody falls silent
            undo.callback(os.close, self.news)
            self._handle: int | None = self._library.heartbeats_new(
                bound.fileno(), self.news, bytes.fromhex(own.peer_id), _key(own.token), round(INTERVAL_S * 1e9),
                round(limit_s * 1e9))
            if self._handle is None:
                raise OSError("out of file descriptors, threads or memory")
            undo.pop_all()
            bound.detach()

    def watch(self, peers: Iterable[tuple[EndpointAddress, int]]) -> None:
        """Ask these from now on, at their ports, and nobody else: none of them is silent yet."""
        others = [(peer, port) for peer, port in peers if peer.peer_id != self._own.peer_id]
        watched = (_Watched * len(others))(*(_watched(peer, port) for peer, port in others))
        if self._library.heartbeats_watch(self._handle, len(others), watched):
            raise MemoryError("no memory to watch members")
        self._peer_ids = tuple(peer.peer_id for peer, _ in others)

    def silence_s(self, peer_id: str) -> float:
        """Return for how long that peer has not answered, less the time in which this process was stopped itself."""
        return float(self._library.heartbeats_silence_ns(self._handle, bytes.fromhex(peer_id))) / 1e9

    def silent(self) -> tuple[str, ...]:
        """Return the peer ids of those that have not answered for the limit."""
        return tuple(peer_id for peer_id in self._peer_ids if self.silence_s(peer_id) > self._limit_s)

    def close(self) -> None:
        """End the thread. May be called twice; nothing else may be called after it."""
        if self._handle is not None:
            self._library.heartbeats_close(self._handle)
            self._handle = None
            os.close(self.news)


def _watched(peer: EndpointAddress, port: int) -> _Watched:
    return _Watched(peer.host.encode(), port, (ctypes.c_ubyte * _ID_BYTES)(*bytes.fromhex(peer.peer_id)),
                    (ctypes.c_ubyte * _KEY_BYTES)(*_key(peer.token)))


def _key(token: Secret) -> bytes:
    """Return what is signed with: whoever knows the token may ask, and can tell an answer."""
    return hashlib.sha256(b"heartbeat " + token.reveal().encode()).digest()[:_KEY_BYTES]
