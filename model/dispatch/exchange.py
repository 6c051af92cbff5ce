"""Does what the distributed dispatchers share: layers whose rows stay, arrival, and the way back.

T tokens of this member, D hidden size, K experts per token, M members, S rows that arrived,
R (row, expert) pairs computed on this member
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.arrays import IdArray, IntArray
from model.dispatch.carriers import RowGroup
from model.dispatch.collectives import Collectives
from model.dispatch.dispatcher import DispatchHandle, compute_experts
from model.dispatch.row_plan import RowPlan
from model.dispatch.row_planner import row_planners
from model.host_threads import HostThreads
from model.kernels.protocol import ExpertWeights, Kernels
from model.pace import UNTIMED, Pace
from model.placement import Placement


@dataclass(slots=True)
class ExchangeHandle(DispatchHandle):
    """Says what goes back to others, and what comes back."""

    departure_R: Tensor
    num_departures_M: list[int]
    num_returns_M: list[int]


class Scratch:
    """Keeps memory that every layer uses again: fresh pages cost more than the copies into them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elements: Tensor | None = None

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialized [num_rows, width], valid until the next take."""
        num_elements = num_rows * width
        if self._elements is None or self._elements.dtype != dtype or self._elements.numel() < num_elements:
            self._elements = torch.empty(num_elements, dtype=dtype, device=self._device)
        return self._elements[:num_elements].view(num_rows, width)


def pick_rows(rows_RD: Tensor, index_S: Tensor, picked_SD: Tensor) -> None:
    """Copy rows by their numbers, which are on the device of the rows, into a buffer that may be elsewhere."""
    if picked_SD.device == rows_RD.device:
        torch.index_select(rows_RD, 0, index_S, out=picked_SD)
    else:
        picked_SD.copy_(rows_RD.index_select(0, index_S))


class RowExchange:
    """Holds one member's tables of a placement, and takes the steps of an exchange that do not depend on how rows
    travel. The dispatchers of a member share it; in a step one of them uses it."""

    def __init__(self, kernels: Kernels, placement: Placement, rank: int, group: RowGroup,
                 pace: Pace = UNTIMED, threads: HostThreads | None = None) -> None:
        """`threads`: None for a member that shares its machine with no other, or goes at an emulated speed."""
        self.rank = rank
        self.placement = placement
        self.num_members = placement.num_members
        self.collectives = collectives = Collectives(group, rank, placement.num_members, kernels.device, pace)
        self.planners = row_planners(placement, rank)
        self.sent = Scratch(collectives.wire_device)
        self.received = Scratch(collectives.wire_device)
        self.kernels = kernels
        self.pace = pace
        self._on_cpu = kernels.device.type == "cpu"
        self._host_threads = threads
        self._num_threads = kernels.num_threads         # for own rows
        self._num_tokens_M: tuple[int, ...] = (0,) * self.num_members
        self._lacks_LM = np.array(
            [[len(placement.experts_of(layer, member)) < len(placement.holders[layer])
              for member in range(self.num_members)] for layer in range(placement.num_layers)], dtype=np.bool_)
        self._travels_L: list[bool] = [False] * placement.num_layers

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        """Take the agreed row counts. A layer's rows travel when any member with rows lacks any of its experts."""
        if num_tokens_of_member != self._num_tokens_M:
            self._num_tokens_M = num_tokens_of_member
            with_rows_M = np.array(num_tokens_of_member) > 0
            self._travels_L = [bool((lacks_M & with_rows_M).any()) for lacks_M in self._lacks_LM]
            if self._host_threads is not None:
                self._num_threads = self._host_threads.for_own_rows(num_tokens_of_member)
        self.kernels.run_on(self._num_threads)

    def travels(self, layer: int) -> bool:
        """Return whether rows of the layer leave their members: the same answer on all."""
        return self._travels_L[layer]

    def compute_here(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> tuple[Tensor, list[int]] | None:
        """See Dispatcher. Where rows stay, a member that has any holds every expert, in the slot of its id."""
        if self._travels_L[layer]:
            return None
        return compute_experts(self.kernels, self.pace, x_TD, weights_TK, expert_ids_TK, experts)

    def plan(self, layer: int, ids_SK: IdArray, owner_S: IntArray, num_rows_M: list[int]) -> RowPlan:
        """Plan a layer. From here on this member works for experts, until `combine` has what comes back. num_rows_M:
        see `own`."""
        self.kernels.run_on(self.kernels.num_threads)
        self.pace.begin_experts()
        plan = self.planners[layer].plan(ids_SK, owner_S, self.own(num_rows_M))
        self.pace.end_planning()
        return plan

    def own(self, num_rows_M: list[int]) -> slice:
        """Return where this member's tokens are among the rows of all; num_rows_M count the padding too."""
        first = sum(num_rows_M[:self.rank])
        return slice(first, first + self._num_tokens_M[self.rank])

    def arrive(self, received_SD: Tensor, received_row_R: IntArray, plan: RowPlan) -> tuple[Tensor, ExchangeHandle]:
        """Pick this member's pairs from what arrived -> rows [R, D] sorted by slot, and the handle for the way back."""
        rows_RD = received_SD.index_select(0, torch.from_numpy(received_row_R).to(received_SD.device))
        arrivals, returns = plan.arrivals, plan.returns
        return rows_RD if self._on_cpu else rows_RD.to(self.kernels.device), ExchangeHandle(
            arrivals.num_rows_E, self._index(returns.row_of_TK), self._index(arrivals.departure_R),
            arrivals.num_departures_M, returns.num_returns_M)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        """Send every output to the owner of its row, which adds up its own. One collective."""
        assert isinstance(handle, ExchangeHandle)
        returned_ND = self._send_back(rows_RD, weights_TK.numel(), handle)
        self.pace.end_experts()
        self.kernels.run_on(self._num_threads)
        if weights_TK.shape[0] == 0:
            return rows_RD.new_empty(0, rows_RD.shape[1])
        return self.kernels.combine(returned_ND, handle.row_of_TK, weights_TK)

    def _send_back(self, rows_RD: Tensor, num_returns: int, handle: ExchangeHandle) -> Tensor:
        num_rows, hidden_size = rows_RD.shape
        returned_ND = self.received.take(num_returns, hidden_size, rows_RD.dtype)
        leaving_RD = self.sent.take(num_rows, hidden_size, rows_RD.dtype)
        pick_rows(rows_RD, handle.departure_R, leaving_RD)
        self.collectives.all_to_all(returned_ND, leaving_RD, handle.num_returns_M, handle.num_departures_M)
        return returned_ND if self._on_cpu else returned_ND.to(rows_RD.device)

    def _index(self, numbers: IntArray) -> Tensor:
        index = torch.from_numpy(numbers)
        return index if self._on_cpu else index.to(self.kernels.device)
