"""Says which member an exchange failed with, and why."""

from __future__ import annotations

import enum

from model.errors import GroupError


class Reason(enum.IntEnum):
    """Numbers as in frames.h."""

    CLOSED = 1          # its connection has ended: the process, or its machine, is gone
    LEFT = 2            # it has left the group
    DEADLINE = 3        # it did not answer in time
    ABORTED = 4         # somebody in this process ended the group
    OUT_OF_STEP = 5     # it exchanges something else
    NO_GROUP = 6        # the group is closed, or another thread is in an exchange of it
    ENDPOINT_OVER = 7   # the endpoint of this process is closed, or this is the child of a fork


_WHAT = {
    Reason.CLOSED: "the connection with rank {rank} has ended",
    Reason.LEFT: "rank {rank} has left the group",
    Reason.DEADLINE: "rank {rank} did not answer within {timeout_s:g} s",
    Reason.ABORTED: "the group was told to end",
    Reason.OUT_OF_STEP: "rank {rank} exchanges something else",
    Reason.NO_GROUP: "the group is closed, or another thread is in an exchange of it",
    Reason.ENDPOINT_OVER: "the endpoint of this process is closed",
}
_FIX = {
    Reason.DEADLINE: "a member died or is too slow: wait for the next epoch, or raise group.collective_timeout_s",
    Reason.OUT_OF_STEP: "all members must join the next epoch",
}


_LOST = (Reason.CLOSED, Reason.DEADLINE)


def lost_rank(error: BaseException) -> int | None:
    """Return the member that is gone or does not answer, if an error says or was caused by that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PeerError) and cause.reason in _LOST:
            return cause.rank
        cause = cause.__cause__
    return None


class PeerError(GroupError):
    """`rank` is the member that failed, None when it is none of the others."""

    def __init__(self, reason: Reason, rank: int | None, timeout_s: float) -> None:
        super().__init__(_WHAT[reason].format(rank=rank, timeout_s=timeout_s),
                         fix=_FIX.get(reason, "wait for the next epoch"))
        self.reason = reason
        self.rank = rank
