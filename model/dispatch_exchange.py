"""What the distributed dispatchers share: rows with their expert ids in one buffer, arrival, and the way back.

T tokens of this member, D hidden size, K experts per token, M members, S rows in a buffer,
W = D + columns that carry the expert ids, R (row, expert) pairs computed on this member
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.dispatch import DispatchHandle
from model.dispatch_collectives import Collectives
from model.dispatch_plan import Ids, Ints, LayerRouting, layer_routing, plan_arrivals, plan_returns
from model.kernels.protocol import Kernels
from model.placement import Placement

_ID_BYTES = 2


@dataclass(slots=True)
class ExchangeHandle(DispatchHandle):
    """`departure_R` None: nothing left this member, so nothing comes back."""

    departure_R: Tensor | None = None
    num_departures_M: list[int] | None = None
    num_returns_M: list[int] | None = None


class RowExchange:
    """One member's tables, and the steps of an exchange that do not depend on how rows travel."""

    def __init__(self, kernels: Kernels, placement: Placement, rank: int, collectives: Collectives) -> None:
        self.rank = rank
        self.num_members = placement.num_members
        self.collectives = collectives
        self.routing = [layer_routing(placement, layer, rank) for layer in range(placement.num_layers)]
        self.num_tokens_M: tuple[int, ...] = (0,) * self.num_members
        self._kernels = kernels
        self._lacks_LM = np.array(
            [[len(placement.experts_of(layer, member)) < len(placement.holders[layer])
              for member in range(self.num_members)] for layer in range(placement.num_layers)], dtype=np.bool_)
        self._travels_L: list[bool] = [False] * placement.num_layers

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        """Take the agreed row counts. A layer's rows travel when any member with rows lacks any of its experts."""
        if num_tokens_of_member != self.num_tokens_M:
            self.num_tokens_M = num_tokens_of_member
            with_rows_M = np.array(num_tokens_of_member) > 0
            self._travels_L = [bool((lacks_M & with_rows_M).any()) for lacks_M in self._lacks_LM]

    def travels(self, layer: int) -> bool:
        """The same on all members."""
        return self._travels_L[layer]

    def stay(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, ExchangeHandle]:
        """`dispatch` of a layer whose rows do not travel: this member holds all that its rows need."""
        ids_TK: Ints = expert_ids_TK.cpu().numpy()
        arrivals = plan_arrivals(self.routing[layer], ids_TK, np.full(len(ids_TK), self.rank))
        # Departures are in the order of (token, k) and name the sorted row: exactly where each output is.
        row_of_TK = torch.from_numpy(arrivals.departure_R).view(len(ids_TK), -1) if len(ids_TK) else expert_ids_TK
        rows_RD = x_TD.index_select(0, torch.from_numpy(arrivals.source_row_R).to(x_TD.device))
        return rows_RD, ExchangeHandle(arrivals.num_rows_E, row_of_TK.to(x_TD.device))

    def new_buffer(self, num_rows: int, x_TD: Tensor, num_experts_per_token: int) -> Tensor:
        """Uninitialized [num_rows, W] on the wire's device: the row, then its expert ids as raw int16."""
        width = x_TD.shape[1] + -(-num_experts_per_token * _ID_BYTES // x_TD.element_size())
        return torch.empty(num_rows, width, dtype=x_TD.dtype, device=self.collectives.wire_device)

    def ids_in(self, buffer_SW: Tensor, hidden_size: int, num_experts_per_token: int) -> Tensor:
        """View of the expert ids in a buffer, int16 [S, K]."""
        return buffer_SW[:, hidden_size:].view(torch.int16)[:, :num_experts_per_token]

    def arrive(self, layer: int, buffer_SW: Tensor, owner_S: Ints, ids_SK: Ids, own_ids_TK: Ids | Ints,
               x_TD: Tensor) -> tuple[Tensor, ExchangeHandle]:
        """Pick this member's rows out of what arrived -> rows [R, D] sorted by slot, and the handle of the way back."""
        routing: LayerRouting = self.routing[layer]
        arrivals = plan_arrivals(routing, ids_SK, owner_S)
        returns = plan_returns(routing, own_ids_TK, self.rank)
        source_row_R = torch.from_numpy(arrivals.source_row_R).to(buffer_SW.device)
        rows_RD = buffer_SW[:, :x_TD.shape[1]].index_select(0, source_row_R).to(x_TD.device)
        return rows_RD, ExchangeHandle(
            arrivals.num_rows_E, torch.from_numpy(returns.row_of_TK).to(x_TD.device),
            torch.from_numpy(arrivals.departure_R).to(x_TD.device), arrivals.num_departures_M, returns.num_returns_M)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        """Send every output to the owner of its row, which adds up its own. One collective, none if nothing left."""
        assert isinstance(handle, ExchangeHandle)
        incoming_ND = rows_RD
        if handle.departure_R is not None:
            assert handle.num_departures_M is not None and handle.num_returns_M is not None
            wire = self.collectives.wire_device
            outgoing_RD = rows_RD.index_select(0, handle.departure_R).to(wire)
            incoming_ND = torch.empty(weights_TK.numel(), rows_RD.shape[1], dtype=rows_RD.dtype, device=wire)
            self.collectives.all_to_all(incoming_ND, outgoing_RD, handle.num_returns_M, handle.num_departures_M)
            incoming_ND = incoming_ND.to(rows_RD.device)
        if not len(weights_TK):
            return rows_RD.new_empty(0, rows_RD.shape[1])
        return self._kernels.combine(incoming_ND, handle.row_of_TK, weights_TK)
