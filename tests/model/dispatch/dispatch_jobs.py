"""The worker processes of the dispatch tests do these jobs, and the cases they do it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cluster.shard.process_group import Meeting, ProcessGroup
from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import Dispatcher, LocalDispatcher
from model.dispatch.exchange import RowExchange
from model.dispatch.row_split import layer_copies, split_rows
from model.kernels.torch_kernels import TorchKernels
from model.placement import Placement
from tests.deadlines import BEYOND_PATIENCE_S
from tests.process_pool import ProcessPool, Worker

DISPATCHERS = ("all_to_all", "gather", "gather_fixed", "auto", "auto_up_to_4_rows")


@dataclass(frozen=True)
class Case:
    placement: Placement
    num_tokens: tuple[int, ...]     # of each member
    hidden_size: int
    num_experts_per_token: int
    dtype: torch.dtype
    seed: int

    @property
    def num_members(self) -> int:
        return self.placement.num_members


@dataclass(frozen=True)
class Outcome:
    bits: list[tuple[int, ...]]     # of each layer's output; (): its rows stay, so that nothing is dispatched
    num_rows: list[int]             # that this member computed in each layer, if its rows travel
    num_collectives: int
    bytes_sent: int


def member_input(case: Case, layer: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of one member, their experts (distinct, ascending) and weights: the same in every process."""
    random = torch.Generator().manual_seed(case.seed * 1000 + layer * 10 + rank)
    num_tokens, num_experts = case.num_tokens[rank], len(case.placement.holders[layer])
    x_TD = torch.randn(num_tokens, case.hidden_size, generator=random).to(case.dtype)
    scores_TE = torch.rand(num_tokens, num_experts, generator=random)
    expert_ids_TK = scores_TE.topk(case.num_experts_per_token).indices.sort(dim=1).values
    return x_TD, expert_ids_TK, torch.rand(expert_ids_TK.shape, generator=random)


def must_travel(case: Case, layer: int) -> bool:
    experts = len(case.placement.holders[layer])
    return any(num_tokens and len(case.placement.experts_of(layer, rank)) < experts
               for rank, num_tokens in enumerate(case.num_tokens))


def holders_of_rows(placement: Placement, layer: int, expert_ids_of_owner: list[list[list[int]]]
                    ) -> list[list[list[int]]]:
    """[owner][token][k] -> the rank that must compute it: the rule of choose_holders, row by row."""
    holders, num_members = placement.holders[layer], placement.num_members
    chosen = [[[num_members] * len(ids) for ids in rows] for rows in expert_ids_of_owner]
    pairs: list[list[tuple[int, int, int]]] = [[] for _ in holders]      # of each expert: owner, token, k
    for owner, rows in enumerate(expert_ids_of_owner):
        for token, ids in enumerate(rows):
            for k, expert in enumerate(ids):
                pairs[expert].append((owner, token, k))
    num_rows_EM = split_rows(layer_copies(holders, num_members, placement.rates),
                             np.array([len(some) for some in pairs], dtype=np.int64))
    for some, num_rows_M in zip(pairs, num_rows_EM.tolist(), strict=True):
        waiting = []
        for owner, token, k in some:
            if num_rows_M[owner]:
                num_rows_M[owner] -= 1
                chosen[owner][token][k] = owner
            else:
                waiting.append((owner, token, k))
        for owner, token, k in waiting:
            rank = next(rank for rank, left in enumerate(num_rows_M) if left)
            num_rows_M[rank] -= 1
            chosen[owner][token][k] = rank
        assert not any(num_rows_M)
    return chosen


def compute_experts(rows_RD: Tensor, num_rows_E: list[int], experts: tuple[int, ...]) -> Tensor:
    """A stand-in for SwiGLU that no two experts share and whose result for a row depends on that row alone."""
    expert_R = torch.tensor(experts, dtype=torch.int64).repeat_interleave(torch.tensor(num_rows_E, dtype=torch.int64))
    return (rows_RD.float() * (1.0 + expert_R[:, None] / 7)).to(rows_RD.dtype)


def run_layers(case: Case, dispatcher: Dispatcher, placement: Placement, rank: int,
               inputs: list[tuple[Tensor, Tensor, Tensor]], num_tokens: tuple[int, ...]) -> Outcome:
    bits, num_rows = [], []
    collectives_before, bytes_before = dispatcher.num_collectives, dispatcher.bytes_sent
    dispatcher.begin_step(num_tokens)
    for layer, (x_TD, expert_ids_TK, weights_TK) in enumerate(inputs):
        if not isinstance(dispatcher, LocalDispatcher) and not must_travel(case, layer):
            bits.append(())
            continue
        rows_RD, handle = dispatcher.dispatch(layer, x_TD, expert_ids_TK)
        assert rows_RD.shape == (sum(handle.num_rows_E), case.hidden_size)
        outputs_RD = compute_experts(rows_RD, handle.num_rows_E, placement.experts_of(layer, rank))
        sums_TD = dispatcher.combine(layer, outputs_RD, weights_TK, handle)
        assert sums_TD.shape == x_TD.shape and sums_TD.dtype == x_TD.dtype
        num_rows.append(len(rows_RD))
        bits.append(tuple(sums_TD.contiguous().view(torch.uint8).flatten().tolist()))
    return Outcome(bits, num_rows, dispatcher.num_collectives - collectives_before,
                   dispatcher.bytes_sent - bytes_before)


def run_locally(case: Case) -> list[list[tuple[int, ...]]]:
    """The oracle: one process, all tokens together -> bits[rank][layer]."""
    num_layers = case.placement.num_layers
    everything = Placement(1, tuple(((0,),) * len(holders) for holders in case.placement.holders))
    kernels = TorchKernels("cpu")
    joined = []
    for layer in range(num_layers):
        parts = [member_input(case, layer, rank) for rank in range(case.num_members)]
        joined.append((torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]),
                       torch.cat([part[2] for part in parts])))
    outcome = run_layers(case, LocalDispatcher(kernels, everything), everything, 0, joined, (sum(case.num_tokens),))
    row_bytes = case.hidden_size * case.dtype.itemsize
    starts = [sum(case.num_tokens[:rank]) * row_bytes for rank in range(case.num_members + 1)]
    return [[bits[starts[rank]:starts[rank + 1]] for bits in outcome.bits] for rank in range(case.num_members)]


def meetings(pool: ProcessPool, num_workers: int) -> list[Meeting]:
    """Return those of the first 1, 2, ... workers, and of all."""
    return [pool.meeting(size) for size in range(1, num_workers + 1)]


def join(worker: Worker, meetings: list[Meeting]) -> None:
    """Leave the last groups; form those that this worker is in, beside each other."""
    for group in worker.kept.pop("groups", []):
        group.close()
    groups = [ProcessGroup.join(worker.endpoint(), meeting, worker.index, BEYOND_PATIENCE_S, "transport", "cpu")
              for meeting in meetings if worker.index < len(meeting.members)]
    worker.kept["groups"] = groups
    worker.kept |= {f"group_of_{group.num_members}": group.rows for group in groups}


def run_distributed(worker: Worker, case: Case) -> dict[str, Outcome]:
    from model.dispatch.all_to_all import AllToAllDispatcher
    from model.dispatch.gather import GatherDispatcher

    kernels, rank = TorchKernels("cpu"), worker.index
    group = worker.kept[f"group_of_{case.num_members}"]

    def exchange() -> RowExchange:
        return RowExchange(kernels, case.placement, rank, group)
    made: dict[str, Dispatcher] = {
        "all_to_all": AllToAllDispatcher(exchange()),
        "gather": GatherDispatcher(exchange()),
        "gather_fixed": GatherDispatcher(exchange(), fixed_shapes=True),
        "auto": AutoDispatcher(exchange()),
        "auto_up_to_4_rows": AutoDispatcher(exchange(), gather_max_rows=4),
    }
    inputs = [member_input(case, layer, rank) for layer in range(case.placement.num_layers)]
    return {name: run_layers(case, made[name], case.placement, rank, inputs, case.num_tokens) for name in DISPATCHERS}


def exchange_with_the_dead(worker: Worker, case: Case, mode: Literal["all_to_all", "gather"]) -> str:
    """Dispatch until a peer's death shows -> the GroupError's text."""
    from model.errors import GroupError
    group = worker.kept[f"group_of_{case.num_members}"]
    dispatcher = AutoDispatcher(RowExchange(TorchKernels("cpu"), case.placement, worker.index, group), mode)
    inputs = [member_input(case, layer, worker.index) for layer in range(case.placement.num_layers)]
    try:
        while True:
            run_layers(case, dispatcher, case.placement, worker.index, inputs, case.num_tokens)
    except GroupError as error:
        return str(error)
