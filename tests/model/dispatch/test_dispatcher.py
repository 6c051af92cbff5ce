"""The distributed dispatchers against the local one, over real gloo processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import LocalDispatcher
from model.dispatch.exchange import RowExchange
from model.dispatch.silent_group import SilentGroup
from model.host_threads import HostThreads
from model.kernels.torch_kernels import TorchKernels
from model.placement import ExpertRate, Placement
from tests.model.dispatch.dispatch_jobs import (
    Case,
    Outcome,
    holders_of_rows,
    meetings,
    member_input,
    must_travel,
    run_locally,
)
from tests.placements import contiguous_placement
from tests.process_pool import ProcessPool

pytestmark = pytest.mark.multinode
NUM_WORKERS = 4
JOBS = "tests.model.dispatch.dispatch_jobs"


@pytest.fixture(scope="module")
def pool(worker_pool: ProcessPool) -> ProcessPool:
    worker_pool.run(f"{JOBS}:join", [(meetings(worker_pool, NUM_WORKERS),)] * NUM_WORKERS)
    return worker_pool


def rates_of(num_members: int) -> st.SearchStrategy[tuple[ExpertRate, ...]]:
    """None, or any: reading alone counts, rows alone, or both."""
    rate = st.builds(ExpertRate, st.sampled_from([0.0, 1e-4, 1e-3]), st.sampled_from([1e-5, 1e-4, 5e-4]))
    rate = st.builds(lambda rate, part: replace(rate, start_s=part * rate.read_s), rate, st.sampled_from([0.0, 0.5]))
    return st.just(()) | st.lists(rate, min_size=num_members, max_size=num_members).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_members = draw(st.integers(1, NUM_WORKERS))
    num_experts = draw(st.integers(1, 9))
    ranks = st.lists(st.integers(0, num_members - 1), min_size=1, max_size=num_members, unique=True)
    layers = st.lists(st.lists(ranks.map(lambda some: tuple(sorted(some))), min_size=num_experts, max_size=num_experts)
                      .map(tuple), min_size=1, max_size=2)
    return Case(
        placement=Placement(num_members, tuple(draw(layers)), draw(rates_of(num_members))),
        num_tokens=tuple(draw(st.lists(st.integers(0, 9), min_size=num_members, max_size=num_members))),
        hidden_size=draw(st.sampled_from([1, 8, 33])),
        num_experts_per_token=draw(st.integers(1, num_experts)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        seed=draw(st.integers(0, 1000)))


def one_case(shares: tuple[int, ...], num_tokens: tuple[int, ...], num_experts_per_token: int = 2) -> Case:
    return Case(contiguous_placement(2, sum(shares), shares), num_tokens, 16, num_experts_per_token, torch.bfloat16, 7)


def copies_case(num_tokens: tuple[int, ...], speeds: tuple[float, ...]) -> Case:
    """Every expert but the last on two or three members, which need a row for as long as speed says."""
    layer = ((0, 1), (1, 2), (2, 3), (0, 3), (0, 1, 2), (1, 3), (0, 2), (3,))
    rates = tuple(ExpertRate(4.0 / speed, 1.0 / speed) for speed in speeds)
    return Case(Placement(4, (layer, layer[::-1]), rates), num_tokens, 16, 3, torch.bfloat16, 7)


def run(pool: ProcessPool, case: Case) -> list[dict[str, Outcome]]:
    return pool.run(f"{JOBS}:run_distributed", [(case,)] * case.num_members)


def num_rows_to_compute(case: Case, layer: int, rank: int) -> int:
    ids = [member_input(case, layer, owner)[1].tolist() for owner in range(case.num_members)]
    return sum(row.count(rank) for rows in holders_of_rows(case.placement, layer, ids) for row in rows)


def gathered_row_bytes(case: Case) -> int:
    size = case.dtype.itemsize
    return (case.hidden_size + -(-2 * case.num_experts_per_token // size)) * size


def expected_bytes(case: Case, rank: int, kind: str) -> int:
    """Payload that must leave `rank`, counted row by row."""
    total, others = 0, case.num_members - 1
    for layer in filter(lambda layer: must_travel(case, layer), range(case.placement.num_layers)):
        row_bytes = case.hidden_size * case.dtype.itemsize
        ids = [member_input(case, layer, owner)[1].tolist() for owner in range(case.num_members)]
        for owner, rows in enumerate(holders_of_rows(case.placement, layer, ids)):
            for holders_of_row in rows:
                if owner == rank and kind == "all_to_all":
                    total += len(set(holders_of_row) - {rank}) * row_bytes
                if owner != rank:
                    total += holders_of_row.count(rank) * row_bytes
        if kind == "all_to_all":
            total += others * case.num_tokens[rank] * 2 * case.num_experts_per_token
        else:
            rows = max(case.num_tokens) if kind == "gather_fixed" else case.num_tokens[rank]
            total += others * rows * gathered_row_bytes(case)
    return total


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(case=one_case((4, 0, 2, 2), (3, 2, 0, 5)))         # a member without experts, one without tokens
@example(case=one_case((0, 8), (0, 4)))                     # one attention-only member, without work
@example(case=one_case((2, 2, 2, 2), (0, 0, 0, 0)))
@example(case=one_case((9,), (6,)))
@example(case=one_case((1, 3, 4), (1, 0, 40), 5))           # one member prefills
@example(case=copies_case((20, 3, 0, 9), (1, 1, 1, 1)))
@example(case=copies_case((20, 3, 0, 9), (8, 2, 1, 1)))
@example(case=copies_case((2, 1, 1, 1), (4, 0.5, 1, 2)))    # too few rows to split an expert
def test_every_dispatcher_equals_the_local_one_bit_for_bit(pool: ProcessPool, case: Case) -> None:
    oracle = run_locally(case)
    travelling = [layer for layer in range(case.placement.num_layers) if must_travel(case, layer)]
    for rank, outcomes in enumerate(run(pool, case)):
        for name, outcome in outcomes.items():
            for layer, bits in enumerate(outcome.bits):
                assert bits == (oracle[rank][layer] if layer in travelling else ()), f"{name} differs on rank {rank}"
            assert outcome.num_rows == [num_rows_to_compute(case, layer, rank) for layer in travelling]
        for name, most in (("all_to_all", 3), ("gather", 2), ("gather_fixed", 2)):
            assert outcomes[name].num_collectives == most * len(travelling)
            assert outcomes[name].bytes_sent == expected_bytes(case, rank, name), name
        assert outcomes["auto"].num_collectives <= 3 * len(travelling)
        bounded = 2 if sum(case.num_tokens) <= 4 else 3
        assert outcomes["auto_up_to_4_rows"].num_collectives == bounded * len(travelling)


def test_local_dispatch_sorts_rows_by_expert() -> None:
    dispatcher = LocalDispatcher(TorchKernels("cpu"), contiguous_placement(1, 4, (4,)))
    x_TD, expert_ids_TK = torch.arange(3.0)[:, None], torch.tensor([[0, 3], [1, 3], [0, 1]])
    rows_RD, handle = dispatcher.dispatch(0, x_TD, expert_ids_TK)
    assert rows_RD[:, 0].tolist() == [0, 2, 1, 2, 0, 1]
    assert handle.num_rows_E == [2, 2, 0, 2]
    assert torch.equal(rows_RD[handle.row_of_TK], x_TD[:, None].expand(3, 2, 1))


class CountingKernels(TorchKernels):
    def __init__(self) -> None:
        super().__init__()
        self.ran_on: list[int] = []

    @property
    def num_threads(self) -> int:
        return 2

    def run_on(self, num_threads: int) -> None:
        self.ran_on.append(num_threads)


@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
def test_threads_are_lent_for_own_rows_and_not_for_experts(mode: Literal["all_to_all", "gather"]) -> None:
    kernels, threads = CountingKernels(), HostThreads((2, 2), 0, 8)
    exchange = RowExchange(kernels, contiguous_placement(2, 4, (2, 2)), 0, SilentGroup(), threads=threads)
    dispatcher = AutoDispatcher(exchange, mode)
    for others_rows, own in ((0, 4), (1, 2)):
        kernels.ran_on.clear()
        dispatcher.begin_step((3, others_rows))
        rows_RD, handle = dispatcher.dispatch(0, torch.ones(3, 8), torch.tensor([[0, 1]] * 3))
        assert set(kernels.ran_on[:-1]) == {own} and kernels.ran_on[-1] == 2
        dispatcher.combine(0, rows_RD, torch.ones(3, 2), handle)
        assert kernels.ran_on[-1] == own


def test_a_member_alone_has_its_own_threads_again() -> None:
    kernels = CountingKernels()
    LocalDispatcher(kernels, contiguous_placement(1, 4, (4,))).begin_step((3,))
    assert kernels.ran_on == [2]


def test_local_dispatch_refuses_a_placement_of_several_members() -> None:
    with pytest.raises(ValueError, match="use AutoDispatcher"):
        LocalDispatcher(TorchKernels("cpu"), contiguous_placement(1, 4, (2, 2)))


@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
def test_a_dead_member_breaks_the_dispatch_of_the_others(pool: ProcessPool, mode: str) -> None:
    case, last = one_case((2, 3, 2, 1), (2, 1, 2, 1)), NUM_WORKERS - 1
    pool.start(f"{JOBS}:exchange_with_the_dead", [(case, mode)] * NUM_WORKERS)
    pool.kill(last)
    try:
        for message in pool.results(range(last)):
            assert "all_to_all of MoE rows failed" in message and "wait for the next epoch" in message
    finally:
        pool.restart(last)
        pool.run(f"{JOBS}:join", [(meetings(pool, NUM_WORKERS),)] * NUM_WORKERS)
    assert run_locally(case)[0] == run(pool, case)[0][mode].bits      # the survivors' next group works
