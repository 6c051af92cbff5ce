"""What a process has of the transport: where others find it, its connections with them, and the groups it opens.

Connections are made when a group first needs them, and last as long as both processes do; groups come and go on them.
Of a pair the one with the lower peer id dials. Whether it shares memory or goes over TCP follows from both addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence

from model.errors import GroupError
from model.transport.address import EndpointAddress, Secret, this_machine
from model.transport.dialer import Pair, dial
from model.transport.doorman import Doorman
from model.transport.group import TransportGroup
from model.transport.handshake import HandshakeError
from model.transport.library import load_library
from model.transport.peer_error import PeerError, Reason

logger = logging.getLogger(__name__)

YIELD_S = 50e-6         # a waiting thread lets others run for so long before it blocks: never more, cores are shared
_RETRY_S = 0.02         # between attempts to reach a member that does not listen yet
_BACKLOG = 128


class Endpoint:
    """Is open until `close`. Groups may be used on several threads, each on one at a time."""

    def __init__(self, host: str, port: int = 0, machine: str | None = None, yield_s: float = YIELD_S) -> None:
        """Listen on an IP address of this machine; port 0: any free one. machine: see EndpointAddress, None: found out.

        Raises OSError, TransportLibraryError.
        """
        self._library = load_library()
        machine = this_machine() if machine is None else machine
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                                        backlog=_BACKLOG)
        self.address = EndpointAddress(secrets.token_hex(16), host, int(listener.getsockname()[1]), machine,
                                       Secret(secrets.token_hex(32)))
        listeners = [listener]
        if machine:
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[1].bind(self.address.socket_name)
            listeners[1].listen(_BACKLOG)
        self._handle = self._library.transport_new(round(yield_s * 1e9))
        if not self._handle:
            raise OSError("out of file descriptors or memory")
        self.hangups = select.epoll()       # has an event when a connection has ended: TransportGroup.check says whose
        self._arrived = threading.Condition()
        self._aborted_id = 0        # groups up to this one need not form any more
        self._is_closed = False
        self._doorman = Doorman(self.address, listeners, self._library.transport_bell(self._handle),
                                self._library.transport_segment_bytes(), self._add)
        _forget_in_children(self)

    def open_group(self, group_id: int, members: Sequence[EndpointAddress], rank: int, timeout_s: float
                   ) -> TransportGroup:
        """Form a group with the others, who open the same one with the same members; this process has that rank.

        Its number is above those of all groups that this endpoint has opened: what still comes of those that it has not
        open is thrown away. timeout_s bounds this, and every exchange of the group. Raises GroupError.
        """
        deadline_s = time.monotonic() + timeout_s
        for peer_rank, peer in enumerate(members):
            if peer_rank != rank:
                self._connect(peer, peer_rank, group_id, deadline_s, timeout_s)
        peer_ids = b"".join(bytes.fromhex(member.peer_id) for member in members)
        failed_rank = ctypes.c_int()
        failure = self._library.transport_open(self._handle, group_id, len(members), rank, peer_ids,
                                               ctypes.byref(failed_rank))
        if failure == Reason.OUT_OF_STEP:
            raise GroupError(f"group {group_id} is not above the groups before it",
                             fix="number groups in the order in which they are opened")
        if failure:
            raise PeerError(Reason(failure), failed_rank.value, timeout_s)
        if group_id <= self._aborted_id:
            self._library.transport_abort(self._handle, group_id)
        group = TransportGroup(self._library, self._handle, group_id, len(members), rank, timeout_s, self._flush)
        try:
            group.confirm(peer_ids, max(deadline_s - time.monotonic(), 0.0))
        except GroupError:
            group.close()
            raise
        return group

    def close(self) -> None:
        """End all groups and connections; other processes learn it at once. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._doorman.close()
            self._library.transport_close(self._handle)
            self.hangups.close()

    def abort_groups(self, up_to_id: int) -> None:
        """End the groups up to this one, from any thread, also one that has yet to form: what waits in them raises
        PeerError at once."""
        self._aborted_id = max(self._aborted_id, up_to_id)
        self._library.transport_abort(self._handle, up_to_id)
        with self._arrived:
            self._arrived.notify_all()

    def _connect(self, peer: EndpointAddress, rank: int, group_id: int, deadline_s: float, timeout_s: float) -> None:
        """Have a connection with `peer`, by dialing or by waiting for its call."""
        peer_id, dials, why = bytes.fromhex(peer.peer_id), self.address.peer_id < peer.peer_id, "it did not call"
        while not self._library.transport_is_connected(self._handle, peer_id):
            if self._is_closed:
                raise PeerError(Reason.ENDPOINT_OVER, None, timeout_s)
            if group_id <= self._aborted_id:
                raise PeerError(Reason.ABORTED, None, timeout_s)
            if time.monotonic() >= deadline_s:
                raise GroupError(f"no connection with rank {rank} at {peer.host}:{peer.port} in {timeout_s:g} s: {why}",
                                 fix="check that it runs, and that nodes reach each other's TCP ports"
                                 ) from PeerError(Reason.DEADLINE, rank, timeout_s)
            if dials:
                try:
                    self._add(peer_id, self._dial(peer, deadline_s))
                    continue
                except (OSError, HandshakeError) as error:
                    why = str(error)
            with self._arrived:
                if dials or not self._library.transport_is_connected(self._handle, peer_id):
                    self._arrived.wait(_RETRY_S if dials else max(deadline_s - time.monotonic(), 0.0))

    def _dial(self, peer: EndpointAddress, deadline_s: float) -> Pair:
        return dial(self.address, peer, self._library.transport_bell(self._handle),
                    self._library.transport_segment_bytes(), deadline_s)

    def _add(self, peer_id: bytes, pair: Pair) -> None:
        """Use a connection from now on, for every group that is opened."""
        segment, bell = -1 if pair.segment is None else pair.segment, -1 if pair.bell is None else pair.bell
        is_first = bytes.fromhex(self.address.peer_id) < peer_id
        with contextlib.suppress(ValueError):       # the endpoint is closed
            self.hangups.register(pair.socket, select.EPOLLRDHUP | select.EPOLLET)
        taken = self._library.transport_add(self._handle, peer_id, pair.socket, segment, bell, is_first)
        for fd in (segment, *((pair.socket, bell) if taken != 0 else ())):
            if fd >= 0:
                os.close(fd)
        with self._arrived:
            self._arrived.notify_all()

    def _flush(self) -> None:
        """Write what a group left behind, beside whatever else this process does."""
        threading.Thread(target=self._library.transport_flush, args=(self._handle, 10_000), daemon=True).start()

    def _forget(self) -> None:
        """Let go of everything in the child of a fork: it would keep connections open that the parent's death ends."""
        self._is_closed = True
        self._doorman.forget()
        self.hangups.close()
        self._library.transport_forget(self._handle)


def _forget_in_children(endpoint: Endpoint) -> None:
    found = weakref.ref(endpoint)

    def forget() -> None:
        forked = found()
        if forked is not None:
            with contextlib.suppress(OSError):
                forked._forget()
    os.register_at_fork(after_in_child=forget)
