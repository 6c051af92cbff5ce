"""Runs the collectives of the MoE layers: they are counted, and every failure is a GroupError."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.dispatch.carriers import RowGroup, carrier_of
from model.dispatch.silent_group import SilentGroup
from model.errors import GroupError
from model.pace import UNTIMED, Pace
from model.transport.group import TransportGroup

FIX = "a member died or is too slow: wait for the next epoch, or raise group.collective_timeout_s"


class Collectives:
    """Runs the collectives of one group. All members call the same ones in the same order."""

    def __init__(self, group: RowGroup, rank: int, num_members: int, device: torch.device,
                 pace: Pace = UNTIMED) -> None:
        self.num_collectives = 0
        self.bytes_sent = 0             # payload that left this member
        self._carrier = carrier_of(group)
        self.transport = group if isinstance(group, TransportGroup) else None
        self.uses_nccl = self._carrier.is_nccl or (isinstance(group, SilentGroup) and device.type == "cuda")
        # Others move host memory: a cuda member of a mixed group stages its rows there.
        self.wire_device = device if self.uses_nccl else torch.device("cpu")
        self._rank = rank
        self._num_members = num_members
        self._pace = pace

    def all_to_all(self, received: Tensor, sent: Tensor, num_received_M: list[int], num_sent_M: list[int]) -> None:
        """Send sent[rows of member m] to each m, fill `received` in the order of ranks. 2-D, contiguous, equal widths.

        What a member sends to itself is copied within its memory. Raises GroupError.
        """
        self.bytes_sent += (len(sent) - num_sent_M[self._rank]) * sent.shape[1] * sent.element_size()
        self._run("all_to_all", lambda: self._carrier.all_to_all(
            received.view(torch.uint8), sent.view(torch.uint8), num_received_M, num_sent_M, self._rank))

    def all_gather(self, gathered: Tensor, own: Tensor) -> None:
        """Fill `gathered` [M * S, W] with every member's `own` [S, W], in the order of ranks. Raises GroupError."""
        self.bytes_sent += (self._num_members - 1) * own.numel() * own.element_size()
        self._run("all_gather", lambda: self._carrier.all_gather(
            gathered.view(torch.uint8), own.view(torch.uint8), self._rank))

    def count(self, num_collectives: int, bytes_sent: int) -> None:
        """Count collectives that C has run."""
        self.num_collectives += num_collectives
        self.bytes_sent += bytes_sent

    def failed(self, name: str, error: Exception) -> GroupError:
        return GroupError(f"rank {self._rank}: {name} of MoE rows failed: {getattr(error, 'message', error)}", fix=FIX)

    def _run(self, name: str, collective: Callable[[], None]) -> None:
        self.num_collectives += 1
        self._pace.settle()
        try:
            collective()
        except (RuntimeError, GroupError) as error:
            raise self.failed(name, error) from error
        self._pace.begin()
