"""Runs the collectives of the MoE layers over deepspeed.comm: they are counted, and every failure is a GroupError.

The only file of model/ that imports deepspeed; only the distributed dispatchers import it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch.silent_group import Group, SilentGroup
from model.errors import GroupError
from model.pace import UNTIMED, Pace

FIX = "a member died or is too slow: wait for the next epoch, or raise group.collective_timeout_s"


class Collectives:
    """Runs the collectives of one group. All members call the same ones in the same order."""

    def __init__(self, group: Group, rank: int, num_members: int, device: torch.device,
                 pace: Pace = UNTIMED) -> None:
        self.num_collectives = 0
        self.bytes_sent = 0             # payload that left this member
        self.uses_nccl = device.type == "cuda"
        if not isinstance(group, SilentGroup):
            # Here, because DeviceProbe measures where deepspeed is not installed.
            from deepspeed import comm
            self._comm = comm
            self.uses_nccl = "nccl" in str(dist.get_backend(group))
        # Gloo moves host memory: a cuda member of a mixed group stages its rows there.
        self.wire_device = device if self.uses_nccl else torch.device("cpu")
        self._group = group
        self._rank = rank
        self._num_members = num_members
        self._pace = pace
        if self.uses_nccl:              # renamed in torch 2.13; deepspeed 0.19 still calls it by the old name
            warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)

    def all_to_all(self, received: Tensor, sent: Tensor, num_received_M: list[int], num_sent_M: list[int]) -> None:
        """Send sent[rows of member m] to each m, fill `received` in the order of ranks. 2-D, contiguous, equal widths.

        What a member sends to itself is copied within its memory. Raises GroupError.
        """
        self.bytes_sent += (len(sent) - num_sent_M[self._rank]) * sent.shape[1] * sent.element_size()
        received, sent, group = received.view(torch.uint8), sent.view(torch.uint8), self._group
        if isinstance(group, SilentGroup):
            self._run("all_to_all", lambda: group.all_to_all(received, sent, num_received_M, num_sent_M, self._rank))
        else:
            self._run("all_to_all",
                      lambda: self._comm.all_to_all_single(received, sent, num_received_M, num_sent_M, group=group))

    def all_gather(self, gathered: Tensor, own: Tensor) -> None:
        """Fill `gathered` [M * S, W] with every member's `own` [S, W], in the order of ranks. Raises GroupError."""
        self.bytes_sent += (self._num_members - 1) * own.numel() * own.element_size()
        gathered, own, group = gathered.view(torch.uint8), own.view(torch.uint8), self._group
        if isinstance(group, SilentGroup):
            self._run("all_gather", lambda: group.all_gather(gathered, own, self._rank))
        else:
            self._run("all_gather", lambda: self._comm.all_gather_into_tensor(gathered, own, group=group))

    def _run(self, name: str, collective: Callable[[], object]) -> None:
        self.num_collectives += 1
        self._pace.settle()
        try:
            collective()
        except RuntimeError as error:
            raise GroupError(f"rank {self._rank}: {name} of MoE rows failed: {error}", fix=FIX) from error
        self._pace.begin()
