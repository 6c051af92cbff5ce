"""A group of members that exchange rows: one call in C a collective."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable

from model.transport.peer_error import PeerError, Reason

_CONFIRMATION_BYTES = 32


class TransportGroup:
    """Made by Endpoint.open_group. All members make the same exchanges in the same order, each on one thread at a time.

    After an error the group is of no more use: close it, and open another.
    """

    def __init__(self, library: ctypes.CDLL, endpoint: int, group_id: int, num_members: int, rank: int,
                 timeout_s: float, flush: Callable[[], None]) -> None:
        self.num_members = num_members
        self.rank = rank
        self.timeout_s = timeout_s
        self._library = library
        self._endpoint = endpoint
        self._group_id = group_id
        self._flush = flush
        self._timeout_ns = round(timeout_s * 1e9)
        self._sent_rows_M = (ctypes.c_long * num_members)()
        self._received_rows_M = (ctypes.c_long * num_members)()
        self._failed_rank = ctypes.c_int()
        self._closing = threading.Lock()
        self._is_closed = False

    def exchange(self, sent: int, num_sent_M: list[int], received: int, num_received_M: list[int],
                 row_bytes: int) -> None:
        """Send rows to each member, receive rows of each, both one after the other in memory and in the order of ranks.

        `sent` and `received` are addresses. What a member sends to itself is copied. Raises PeerError.
        """
        self._sent_rows_M[:] = [*num_sent_M]
        self._received_rows_M[:] = [*num_received_M]
        self._exchange(sent, received, row_bytes, False, self._timeout_ns)

    def gather(self, own: int, received: int, num_bytes: int) -> None:
        """Send the same bytes to everybody, receive as many of each member. Raises PeerError."""
        self._gather(own, received, num_bytes, self._timeout_ns)

    def confirm(self, members: bytes, timeout_s: float) -> None:
        """See that everybody is in the group, and means the same members by it. Raises PeerError."""
        own = ctypes.create_string_buffer(hashlib.sha256(members).digest(), _CONFIRMATION_BYTES)
        received = ctypes.create_string_buffer(_CONFIRMATION_BYTES * self.num_members)
        self._gather(ctypes.addressof(own), ctypes.addressof(received), _CONFIRMATION_BYTES, round(timeout_s * 1e9))
        for rank in range(self.num_members):
            if received.raw[rank * _CONFIRMATION_BYTES:(rank + 1) * _CONFIRMATION_BYTES] != own.raw:
                raise PeerError(Reason.OUT_OF_STEP, rank, self.timeout_s)

    def exchange_call(self) -> dict[str, int | None]:
        """Return what C needs to make this group's exchanges itself: the function, and its arguments that stay."""
        function = ctypes.cast(self._library.transport_exchange, ctypes.c_void_p).value
        return {"exchange": function, "endpoint": self._endpoint, "group": self._group_id,
                "timeout_ns": self._timeout_ns}

    def error_of(self, failure: int, rank: int) -> PeerError:
        """Return what an exchange's answer says."""
        return PeerError(Reason(failure), None if rank in (self.rank, -1) else rank, self.timeout_s)

    def check(self) -> None:
        """Raise PeerError when the connection with a member has ended. From any thread; nothing waits for it."""
        rank = self._library.transport_lost(self._endpoint, self._group_id)
        if rank >= 0:
            raise PeerError(Reason.CLOSED, rank, self.timeout_s)

    def abort(self) -> None:
        """End the exchange that runs, from any thread, and all later ones: they raise PeerError at once."""
        self._library.transport_abort(self._endpoint, self._group_id)

    def close(self) -> None:
        """Leave the group; others that wait for this member learn it at once. May be called twice."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                if not self._library.transport_leave(self._endpoint, self._group_id):
                    self._flush()

    def _gather(self, own: int, received: int, num_bytes: int, timeout_ns: int) -> None:
        self._sent_rows_M[:] = self._received_rows_M[:] = [1] * self.num_members
        self._exchange(own, received, num_bytes, True, timeout_ns)

    def _exchange(self, sent: int, received: int, row_bytes: int, same_to_all: bool, timeout_ns: int) -> None:
        failure = self._library.transport_exchange(
            self._endpoint, self._group_id, sent, self._sent_rows_M, received, self._received_rows_M, row_bytes,
            same_to_all, timeout_ns, self._failed_rank)
        if failure:
            raise self.error_of(failure, self._failed_rank.value)
