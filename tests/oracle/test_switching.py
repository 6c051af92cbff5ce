"""Placements that change in the middle of the sequences, and members that hold experts only, change no bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.placement import Placement
from tests.model.dispatch.dispatch_jobs import meetings
from tests.oracle.distributed_jobs import Part, Seen, run_alone
from tests.oracle.switching_jobs import SwitchingPart
from tests.oracle.test_distributed_invariance import (
    MODELS,
    NUM_MOE_LAYERS,
    NUM_WORKERS,
    Sequence,
    parts_of,
    some_placement,
    some_sequences,
    spread,
)
from tests.process_pool import ProcessPool

pytestmark = pytest.mark.multinode
SaveTiny = Callable[..., Path]


@pytest.fixture(scope="module")
def pool(worker_pool: ProcessPool) -> ProcessPool:
    met = meetings(worker_pool, NUM_WORKERS)
    worker_pool.run("tests.model.dispatch.dispatch_jobs:join", [(met,)] * NUM_WORKERS)
    return worker_pool


@pytest.fixture(scope="module")
def folders(save_tiny: SaveTiny) -> dict[str, Path]:
    return {name: save_tiny(name, seed=5, **fields) for name, (_, fields) in MODELS.items()}


def alone(folder: Path, family: str, dtype: torch.dtype, kernels: str,
          sequences: list[Sequence]) -> dict[str, list[Seen]]:
    everything = Placement(1, (((0,),) * MODELS[family][0],) * NUM_MOE_LAYERS[family])
    one_by_one = [[(sequence.request(step),) for sequence in sequences for step in range(len(sequence.chunks))]]
    return run_alone(parts_of(folder, dtype, kernels, everything, "auto", one_by_one)[0])


def jobs_of(rng: random.Random, parts: list[Part], num_takers: int, placements: list[Placement]) -> list[SwitchingPart]:
    num_steps = len(parts[0].requests_of_step)
    switch_steps = tuple(sorted(rng.choices(range(1, num_steps), k=len(placements))))
    return [SwitchingPart(part, tuple(placements), switch_steps, rank < num_takers) for rank, part in enumerate(parts)]


def run(pool: ProcessPool, jobs: list[SwitchingPart]) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = {}
    for seen in pool.run("tests.oracle.switching_jobs:run_switching_part", [(job,) for job in jobs]):
        found |= seen
    return found


@pytest.mark.parametrize("kernels", ["packed", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", list(MODELS))
def test_switching_in_the_middle_of_sequences_equals_one_member(
        pool: ProcessPool, folders: dict[str, Path], family: str, dtype: torch.dtype, kernels: str) -> None:
    rng = random.Random(f"switching {family} {dtype} {kernels}")
    sequences = some_sequences(rng, 6)
    expected = alone(folders[family], family, dtype, kernels, sequences)
    for num_members, num_takers in ((2, 2), (3, 3), (3, 1), (4, 3), (4, 4)):
        first, *others = (some_placement(rng, num_members, NUM_MOE_LAYERS[family], MODELS[family][0]) for _ in range(4))
        steps = spread(rng, sequences, num_takers)
        steps += [[()] * len(steps[0])] * (num_members - num_takers)
        parts = parts_of(folders[family], dtype, kernels, first, "auto", steps)
        found = run(pool, jobs_of(rng, parts, num_takers, others))
        assert found == expected, f"{num_members} members, {num_takers} with requests, {first}, {others}"
