"""A gather's layer in one call in C, against one process alone, and beside members that run it in Python."""

from __future__ import annotations

import random

import pytest
import torch

from model.dispatch.compiled_gather import compiled_gather_of
from model.dispatch.exchange import RowExchange
from model.dispatch.silent_group import SilentGroup
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.packed_cpu_library import library_path
from model.placement import ExpertRate, Placement
from tests.model.dispatch.dispatch_jobs import Case, meetings
from tests.model.dispatch.gather_jobs import Computed, run_alone
from tests.placements import contiguous_placement
from tests.process_pool import ProcessPool

pytestmark = [pytest.mark.multinode,
              pytest.mark.skipif(library_path() is None, reason="no packed kernels for this CPU")]
NUM_WORKERS = 3
JOBS = "tests.model.dispatch"
ONE = Case(contiguous_placement(2, 8, (3, 5)), (3, 2), 32, 2, torch.bfloat16, 7)


@pytest.fixture(scope="module")
def pool(worker_pool: ProcessPool) -> ProcessPool:
    worker_pool.run(f"{JOBS}.dispatch_jobs:join", [(meetings(worker_pool, NUM_WORKERS),)] * NUM_WORKERS)
    return worker_pool


def some_case(seed: int) -> Case:
    """Experts with one and with several holders, members without rows, without experts, or without either."""
    draw = random.Random(seed)
    num_members, num_experts = draw.randint(2, NUM_WORKERS), draw.randint(1, 12)

    def holders() -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(num_members), draw.choice([1, 1, num_members]))))
    layers = tuple(tuple(holders() for _ in range(num_experts)) for _ in range(2))
    rates = tuple(ExpertRate(draw.choice([0.0, 1e-3]), draw.choice([1e-5, 1e-3])) for _ in range(num_members))
    return Case(Placement(num_members, layers, draw.choice([(), rates])),
                tuple(draw.choice([0, 1, 9, 40]) for _ in range(num_members)), draw.choice([1, 33, 64]),
                draw.randint(1, num_experts), draw.choice([torch.bfloat16, torch.float16, torch.float32]), seed)


def run(pool: ProcessPool, case: Case, num_threads: int, emulated: tuple[bool, ...]) -> list[Computed]:
    return pool.run(f"{JOBS}.gather_jobs:run_gathers",
                    [(case, num_threads, emulated[rank]) for rank in range(case.num_members)])


@pytest.mark.parametrize("seed", range(40))
def test_the_bits_of_one_process_whoever_runs_it_in_c_and_on_how_many_threads(pool: ProcessPool, seed: int) -> None:
    case, alone = some_case(seed), run_alone(some_case(seed))
    in_python = run(pool, case, 1, (True,) * NUM_WORKERS)
    for num_threads, emulated in ((1, (False,) * NUM_WORKERS), (3, (False,) * NUM_WORKERS), (2, (False, True, False))):
        computed = run(pool, case, num_threads, emulated)
        for rank, (one, plain) in enumerate(zip(computed, in_python, strict=True)):
            assert one.bits == plain.bits == alone[rank]
            assert one.num_rows_E == plain.num_rows_E
            assert (one.num_collectives, one.bytes_sent) == (plain.num_collectives, plain.bytes_sent)


EVERYWHERE, APART = (tuple(range(3)),) * 4, ((0,), (1,), (2,), (2,))


@pytest.mark.parametrize(("placement", "num_tokens", "num_collectives"), [
    (Placement(3, (EVERYWHERE, APART, EVERYWHERE)), (2, 3, 1), 2),      # only one layer's rows travel
    (contiguous_placement(2, 8, (3, 5)), (0, 0), 0),
    (contiguous_placement(2, 8, (8, 0)), (5, 0), 0)])                   # who lacks experts has no rows
def test_rows_that_need_not_travel_cost_no_collective(pool: ProcessPool, placement: Placement,
                                                      num_tokens: tuple[int, ...], num_collectives: int) -> None:
    case = Case(placement, num_tokens, 8, 2, torch.float32, 3)
    for emulated in (False, True):
        computed = run(pool, case, 1, (emulated,) * NUM_WORKERS)
        assert [one.bits for one in computed] == run_alone(case)
        assert [one.num_collectives for one in computed] == [num_collectives] * placement.num_members


def test_it_is_one_call_unless_a_speed_is_emulated(pool: ProcessPool) -> None:
    computed = run(pool, ONE, 1, (False, True, False))
    assert [one.was_at_once for one in computed] == [[True] * ONE.placement.num_layers,
                                                     [False] * ONE.placement.num_layers]


def test_its_work_is_counted_in_the_same_parts(pool: ProcessPool) -> None:
    num_layers = ONE.placement.num_layers
    for one in run(pool, ONE, 1, (False, True, False)):
        assert one.work is not None
        assert (len(one.work.own_s), len(one.work.planning_s), len(one.work.experts_s)) == (
            num_layers + 1, num_layers, num_layers)
        assert min(*one.work.own_s, *one.work.planning_s, *one.work.experts_s) > 0


@pytest.mark.parametrize("expert_id", [-1, 9])
def test_ids_that_no_expert_has_are_refused_by_all(pool: ProcessPool, expert_id: int) -> None:
    told = pool.run(f"{JOBS}.gather_jobs:gather_ids", [(ONE, expert_id)] * 2)
    assert all("the members do not run the same model" in text for text in told)


def test_a_member_that_leaves_ends_the_layer_of_the_others(pool: ProcessPool) -> None:
    leaves, told = pool.run(f"{JOBS}.gather_jobs:gather_with_who_leaves", [(ONE, 0), (ONE, 0)])
    assert leaves == "" and "rank 1: gather of MoE rows failed: rank 0 has left the group" in told
    pool.run(f"{JOBS}.dispatch_jobs:join", [(meetings(pool, NUM_WORKERS),)] * NUM_WORKERS)


def test_nothing_but_the_transport_is_called_from_c() -> None:
    assert compiled_gather_of(RowExchange(PackedCpuKernels(1), ONE.placement, 0, SilentGroup())) is None
