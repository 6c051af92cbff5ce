"""The worker processes of the tests of the gather in C do these jobs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import Dispatcher, LocalDispatcher
from model.dispatch.exchange import RowExchange
from model.errors import GroupError
from model.host_threads import HostThreads
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.protocol import ExpertWeights, Kernels
from model.pace import UNTIMED, TimedPace
from model.placement import Placement
from model.step import StepWork
from tests.model.dispatch.dispatch_jobs import Case, member_input
from tests.process_pool import Worker

INTERMEDIATE = 24


@dataclass(frozen=True)
class Computed:
    bits: list[tuple[int, ...]]         # of each layer's output
    num_rows_E: list[list[int]]         # of each layer's local slots
    num_collectives: int
    bytes_sent: int
    was_at_once: list[bool]             # each layer
    work: StepWork | None


def experts_of(kernels: Kernels, case: Case, layer: int, experts: tuple[int, ...]) -> ExpertWeights:
    weights = kernels.new_experts(len(experts), INTERMEDIATE, case.hidden_size, case.dtype)
    for slot, expert in enumerate(experts):
        random = torch.Generator().manual_seed(1000 * layer + expert)

        def some(rows: int, columns: int, random: torch.Generator = random) -> Tensor:
            return torch.randn(rows, columns, generator=random).to(case.dtype)
        weights.load_gate(slot, some(INTERMEDIATE, case.hidden_size))
        weights.load_up(slot, some(INTERMEDIATE, case.hidden_size))
        weights.load_down(slot, some(case.hidden_size, INTERMEDIATE))
    return weights


def compute(kernels: Kernels, dispatcher: Dispatcher, layer: int, own: tuple[Tensor, Tensor, Tensor],
            experts: ExpertWeights) -> tuple[Tensor, list[int], bool]:
    """Do what model/moe.py does with a layer -> output, rows of each slot, whether it was one call."""
    x_TD, expert_ids_TK, weights_TK = own
    computed = dispatcher.compute_at_once(layer, x_TD, weights_TK, expert_ids_TK, experts)
    if computed is not None:
        return *computed, True
    rows_RD, handle = dispatcher.dispatch(layer, x_TD, expert_ids_TK)
    rows_RD = kernels.experts(rows_RD, handle.num_rows_E, experts)
    return dispatcher.combine(layer, rows_RD, weights_TK, handle), handle.num_rows_E, False


def run_gathers(worker: Worker, case: Case, num_threads: int, is_emulated: bool) -> Computed:
    """A member with an emulated speed runs the gather in Python."""
    rank, kernels = worker.index, PackedCpuKernels(num_threads)
    pace = TimedPace(1.0, time.thread_time if is_emulated else time.perf_counter)
    threads = HostThreads((num_threads,) * case.num_members, rank, 4)
    exchange = RowExchange(kernels, case.placement, rank, worker.kept[f"group_of_{case.num_members}"], pace, threads)
    dispatcher = AutoDispatcher(exchange, "gather")
    pace.begin_step()
    dispatcher.begin_step(case.num_tokens)
    bits, num_rows_E, was_at_once = [], [], []
    for layer in range(case.placement.num_layers):
        experts = experts_of(kernels, case, layer, case.placement.experts_of(layer, rank))
        out_TD, rows_E, at_once = compute(kernels, dispatcher, layer, member_input(case, layer, rank), experts)
        bits.append(bits_of(out_TD))
        num_rows_E.append(rows_E)
        was_at_once.append(at_once)
    return Computed(bits, num_rows_E, dispatcher.num_collectives, dispatcher.bytes_sent, was_at_once, pace.end_step())


def run_alone(case: Case) -> list[list[tuple[int, ...]]]:
    """One process that has all experts, all rows together -> bits[rank][layer]."""
    kernels = PackedCpuKernels(1)
    bits_RL: list[list[tuple[int, ...]]] = [[] for _ in case.num_tokens]
    everything = Placement(1, tuple(((0,),) * len(holders) for holders in case.placement.holders))
    dispatcher = LocalDispatcher(kernels, everything)
    for layer in range(case.placement.num_layers):
        parts = [member_input(case, layer, rank) for rank in range(case.num_members)]
        x_TD, ids_TK, weights_TK = (torch.cat(some) for some in zip(*parts, strict=True))
        experts = experts_of(kernels, case, layer, everything.experts_of(layer, 0))
        out_TD, _, _ = compute(kernels, dispatcher, layer, (x_TD, ids_TK, weights_TK), experts)
        for bits_L, own_TD in zip(bits_RL, out_TD.split(list(case.num_tokens)), strict=True):
            bits_L.append(bits_of(own_TD))
    return bits_RL


def bits_of(out_TD: Tensor) -> tuple[int, ...]:
    return tuple(out_TD.contiguous().view(torch.uint8).flatten().tolist())


def gather_with_who_leaves(worker: Worker, case: Case, leaver: int) -> str:
    if worker.index != leaver:
        return gather_ids(worker, case, 0)
    worker.kept[f"group_of_{case.num_members}"].close()
    return ""


def gather_ids(worker: Worker, case: Case, expert_id: int) -> str:
    """Send an expert id of one's own with every row -> the error that comes of it."""
    rank, kernels = worker.index, PackedCpuKernels(1)
    exchange = RowExchange(kernels, case.placement, rank, worker.kept[f"group_of_{case.num_members}"], UNTIMED)
    dispatcher = AutoDispatcher(exchange, "gather")
    dispatcher.begin_step(case.num_tokens)
    x_TD, ids_TK, weights_TK = member_input(case, 0, rank)
    experts = experts_of(kernels, case, 0, case.placement.experts_of(0, rank))
    try:
        dispatcher.compute_at_once(0, x_TD, weights_TK, torch.full_like(ids_TK, expert_id), experts)
    except (ValueError, GroupError) as error:
        return str(error)
    return ""
