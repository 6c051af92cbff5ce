"""Carries rows between members: the transport where they are in host memory, deepspeed.comm where a library of the
accelerators moves them, or Gloo is asked for.

The only file of model/ that imports deepspeed, and only for a torch group.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from model.dispatch.silent_group import SilentGroup
from model.transport.group import TransportGroup

RowGroup = dist.ProcessGroup | TransportGroup | SilentGroup


class Carrier(Protocol):
    """Takes 2-D contiguous tensors of bytes, on the wire's device. Raises RuntimeError or GroupError."""

    is_nccl: bool

    def all_to_all(self, received: Tensor, sent: Tensor, num_received_M: list[int], num_sent_M: list[int],
                   rank: int) -> None:
        """Send sent[rows of member m] to each m, fill `received` in the order of ranks."""

    def all_gather(self, gathered: Tensor, own: Tensor, rank: int) -> None:
        """Fill `gathered` with every member's `own`, in the order of ranks."""


class TransportCarrier:
    """See Carrier. One call in C a collective."""

    is_nccl = False

    def __init__(self, group: TransportGroup) -> None:
        self._group = group

    def all_to_all(self, received: Tensor, sent: Tensor, num_received_M: list[int], num_sent_M: list[int],
                   rank: int) -> None:
        self._group.exchange(sent.data_ptr(), num_sent_M, received.data_ptr(), num_received_M, sent.shape[1])

    def all_gather(self, gathered: Tensor, own: Tensor, rank: int) -> None:
        self._group.gather(own.data_ptr(), gathered.data_ptr(), own.numel())


class TorchCarrier:
    """See Carrier. NCCL, HCCL or Gloo by deepspeed.comm."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        # Here, because DeviceProbe measures where deepspeed is not installed.
        from deepspeed import comm
        self._comm = comm
        self._group = group
        self.is_nccl = "nccl" in str(dist.get_backend(group))
        if self.is_nccl:                # renamed in torch 2.13; deepspeed 0.19 still calls it by the old name
            warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)

    def all_to_all(self, received: Tensor, sent: Tensor, num_received_M: list[int], num_sent_M: list[int],
                   rank: int) -> None:
        self._comm.all_to_all_single(received, sent, num_received_M, num_sent_M, group=self._group)

    def all_gather(self, gathered: Tensor, own: Tensor, rank: int) -> None:
        self._comm.all_gather_into_tensor(gathered, own, group=self._group)


def carrier_of(group: RowGroup) -> Carrier:
    if isinstance(group, SilentGroup):
        return group
    return TransportCarrier(group) if isinstance(group, TransportGroup) else TorchCarrier(group)
