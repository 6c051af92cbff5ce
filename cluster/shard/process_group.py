"""The group of one epoch's members: it agrees on steps, and carries their rows.

Headers go by the transport, and rows too unless all members have them on accelerators whose library moves them (NCCL).
With group.backend gloo torch's Gloo carries both. The collectives of the MoE layers are in model/dispatch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cluster.shard.torch_group import TorchGroup
from model.dispatch.carriers import RowGroup
from model.errors import GroupError
from model.step import StepHeader
from model.transport.address import EndpointAddress
from model.transport.endpoint import Endpoint
from model.transport.group import TransportGroup

logger = logging.getLogger(__name__)

Backend = Literal["transport", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Says who forms a group, and where."""

    number: int                                 # of the epoch
    members: tuple[EndpointAddress, ...]        # by rank
    rendezvous: str                             # tcp://host:port of rank 0's store; only a torch group meets there


def choose_backend(wanted: Literal["auto", "gloo", "nccl"], devices: Sequence[str]) -> Backend:
    """Return what carries the rows of members with these devices: all of them get the same answer. Pure."""
    if wanted == "auto":
        return "nccl" if all(device.startswith("cuda") for device in devices) else "transport"
    return wanted


class Headers(Protocol):
    def exchange_ints(self, own: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return everybody's, by rank. Raises RuntimeError, GroupError."""


class ProcessGroup:
    """Lets the members of one epoch talk. Made by `join`; all methods but `abort` are called from one thread."""

    def __init__(self, rank: int, num_members: int, timeout_s: float, transport: TransportGroup | None,
                 torch_group: TorchGroup | None) -> None:
        self.rank = rank
        self.num_members = num_members
        self.rows: RowGroup         # for the collectives of the MoE layers
        self._headers: Headers
        if torch_group is not None:
            self.rows, self._headers = torch_group.rows, torch_group
        if transport is not None:
            self.rows, self._headers = self.rows if torch_group else transport, TransportHeaders(transport)
        self._transport = transport
        self._torch_group = torch_group
        self._timeout_s = timeout_s
        self._failed = False
        self._closed = False

    @staticmethod
    def join(endpoint: Endpoint, meeting: Meeting, rank: int, timeout_s: float, backend: Backend,
             device: str) -> ProcessGroup:
        """Meet the other members and form the group.

        Blocks until all are there, at most timeout_s seconds, which is also the bound of every later collective.
        Raises GroupError.
        """
        num_members = len(meeting.members)
        with contextlib.ExitStack() as undo:
            transport = torch_group = None
            try:
                if backend != "gloo":
                    transport = endpoint.open_group(meeting.number, meeting.members, rank, timeout_s)
                    undo.callback(transport.close)
                if backend != "transport":
                    torch_group = TorchGroup.join(meeting.rendezvous, rank, num_members, timeout_s, backend == "nccl",
                                                  device)
            except (RuntimeError, OSError, GroupError) as error:
                raise _not_formed(meeting, rank, timeout_s, error) from error
            undo.pop_all()
        logger.info("group_joined epoch=%d rank=%d num_members=%d backend=%s", meeting.number, rank, num_members,
                    backend)
        return ProcessGroup(rank, num_members, timeout_s, transport, torch_group)

    def agree(self, header: StepHeader) -> tuple[StepHeader, ...]:
        """Exchange headers, index = rank. Blocks for at most the group's timeout.

        Raises GroupError when a member is gone or late, or is in another epoch or step.
        """
        if self._closed:
            raise GroupError(f"rank {self.rank} has left its group", fix="join the next epoch's group")
        if self.num_members == 1:
            return (header,)
        try:
            gathered = self._headers.exchange_ints(header.to_ints())
        except (RuntimeError, GroupError) as error:
            self._failed = True
            raise GroupError(
                f"rank {self.rank}: the members did not agree on step {header.step_index} of epoch "
                f"{header.epoch_number}: {getattr(error, 'message', error)}",
                fix="a member died or is too slow: wait for the next epoch, or raise group.collective_timeout_s",
            ) from error
        headers = tuple(StepHeader.from_ints(ints) for ints in gathered)
        for rank, other in enumerate(headers):
            if (other.epoch_number, other.step_index) != (header.epoch_number, header.step_index):
                self._failed = True
                raise GroupError(
                    f"rank {rank} is at step {other.step_index} of epoch {other.epoch_number}, rank {self.rank} at "
                    f"step {header.step_index} of epoch {header.epoch_number}",
                    fix="all members must join the next epoch")
        return headers

    def check(self) -> None:
        """Raise PeerError when the connection with a member has ended; from any thread, and while nothing is exchanged.
        Torch's connections cannot be looked at."""
        if self._transport is not None:
            self._transport.check()

    def abort(self) -> None:
        """End what waits for other members, from any thread: the epoch is over. Torch's collectives cannot be told."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Leave the group; after it this process can join the next epoch's. May be called twice, never raises."""
        if self._closed:
            return
        self._closed = True
        logger.info("group_left rank=%d num_members=%d failed=%s", self.rank, self.num_members, self._failed)
        if self._transport is not None:
            self._transport.close()
        if self._torch_group is not None:
            self._torch_group.close()


class TransportHeaders:
    """See Headers."""

    def __init__(self, group: TransportGroup) -> None:
        self._group = group

    def exchange_ints(self, own: tuple[int, ...]) -> list[tuple[int, ...]]:
        sent = np.array(own, dtype=np.int64)
        received = np.empty((self._group.num_members, len(own)), dtype=np.int64)
        self._group.gather(sent.ctypes.data, received.ctypes.data, sent.nbytes)
        return [tuple(ints) for ints in received.tolist()]


def _not_formed(meeting: Meeting, rank: int, timeout_s: float, error: Exception) -> GroupError:
    return GroupError(
        f"rank {rank} could not form the group of {len(meeting.members)} of epoch {meeting.number} in {timeout_s:g} s: "
        f"{getattr(error, 'message', error)}",
        fix="check that every member runs and that nodes reach each other's TCP ports, or raise "
            "group.collective_timeout_s")
