"""2, 3 and 4 processes with any placement and any split of rows over copies equal one process bit for bit: logits,
tokens and log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model.placement import ExpertRate, Placement
from model.step import SamplingSpec, ScheduledRequest
from tests.model.dispatch.dispatch_jobs import meetings
from tests.oracle.distributed_jobs import BLOCK_SIZE, NUM_BLOCKS, Mode, Part, Seen, run_alone
from tests.process_pool import ProcessPool

pytestmark = pytest.mark.multinode
NUM_WORKERS = 4
SaveTiny = Callable[..., Path]
# Sizes that fit no vector width, a dense layer between, a window.
MODELS: dict[str, tuple[int, dict[str, object]]] = {
    "qwen3_moe": (9, {"hidden_size": 72, "moe_intermediate_size": 27, "intermediate_size": 53, "head_dim": 18,
                      "vocab_size": 333, "mlp_only_layers": [1], "num_experts": 9, "num_experts_per_tok": 3}),
    "mixtral": (7, {"hidden_size": 60, "intermediate_size": 37, "head_dim": 10, "vocab_size": 333,
                    "sliding_window": 21, "num_local_experts": 7}),
    "qwen3_next": (9, {"hidden_size": 72, "moe_intermediate_size": 27, "intermediate_size": 53, "head_dim": 24,
                       "vocab_size": 333, "mlp_only_layers": [1], "linear_key_head_dim": 19,
                       "linear_value_head_dim": 71, "num_experts": 9}),
    "qwen3_5_moe_text": (6, {"hidden_size": 60, "vocab_size": 333, "linear_num_key_heads": 1,
                             "linear_num_value_heads": 3, "full_attention_interval": 2}),
}
NUM_MOE_LAYERS = {"qwen3_moe": 2, "mixtral": 3, "qwen3_next": 3, "qwen3_5_moe_text": 4}


@dataclass(frozen=True)
class Sequence:
    name: str
    token_ids: tuple[int, ...]
    chunks: tuple[int, ...]         # tokens of each of its steps; after each, one token is sampled and not used
    block_table: tuple[int, ...]
    sampling: SamplingSpec
    index: int                      # its two state slots are 2 * index and 2 * index + 1

    def request(self, step: int) -> ScheduledRequest:
        first = sum(self.chunks[:step])
        read, write = 2 * self.index + (step + 1) % 2, 2 * self.index + step % 2
        return ScheduledRequest(self.name, self.token_ids[first:first + self.chunks[step]], first, self.block_table,
                                self.sampling, state_read=read if step else None, state_write=write)


def some_sequences(rng: random.Random, count: int) -> list[Sequence]:
    blocks = list(range(NUM_BLOCKS))
    rng.shuffle(blocks)
    sequences = []
    for index in range(count):
        chunks = [rng.randint(1, 40)] + [rng.choice((1, 1, 1, 1, 7)) for _ in range(rng.randint(0, 6))]
        need = -(-sum(chunks) // BLOCK_SIZE)
        table, blocks = tuple(blocks[:need]), blocks[need:]
        sampling = SamplingSpec(temperature=rng.choice((0.0, 1.0)), seed=index, num_logprobs=5)
        sequences.append(Sequence(f"s{index}", tuple(rng.randrange(333) for _ in range(sum(chunks))), tuple(chunks),
                                  table, sampling, index))
    return sequences


def some_placement(rng: random.Random, num_members: int, num_layers: int, num_experts: int) -> Placement:
    """Uneven, with copies; now and then a member that holds nothing. Any speeds, or none known."""
    ranks = list(range(num_members))
    able = rng.sample(ranks, rng.randint(1, num_members))
    num_copies = rng.choice(([1, 1, 1, len(able)], range(1, len(able) + 1)))
    rates = tuple(ExpertRate(rng.choice((0.0, 1e-4, 1e-3)), rng.choice((1e-5, 1e-4, 4e-4))) for _ in ranks)
    return Placement(num_members, tuple(
        tuple(tuple(sorted(rng.sample(able, rng.choice(num_copies)))) for _ in range(num_experts))
        for _ in range(num_layers)), rng.choice((rates, rates, ())))


def spread(rng: random.Random, sequences: list[Sequence], num_members: int) -> list[list[tuple[ScheduledRequest, ...]]]:
    """Steps of each member: every sequence lives on one member and starts at a step of its own."""
    home = {sequence.name: rng.randrange(num_members) for sequence in sequences}
    start = {sequence.name: rng.randint(0, 3) for sequence in sequences}
    num_steps = max(start[sequence.name] + len(sequence.chunks) for sequence in sequences)
    return [[tuple(sequence.request(step - start[sequence.name]) for sequence in sequences
                   if home[sequence.name] == rank and 0 <= step - start[sequence.name] < len(sequence.chunks))
             for step in range(num_steps)] for rank in range(num_members)]


def parts_of(folder: Path, dtype: torch.dtype, kernels: str, placement: Placement, mode: Mode,
             steps: list[list[tuple[ScheduledRequest, ...]]]) -> list[Part]:
    num_tokens = tuple(tuple(sum(len(request.token_ids) for request in requests) for requests in step)
                       for step in zip(*steps, strict=True))
    return [Part(folder, dtype, kernels, placement, mode, tuple(own), num_tokens)       # type: ignore[arg-type]
            for own in steps]


def run(pool: ProcessPool, parts: list[Part]) -> dict[str, list[Seen]]:
    """Return what all sequences saw, whichever member had them."""
    found: dict[str, list[Seen]] = {}
    for seen in pool.run("tests.oracle.distributed_jobs:run_part", [(part,) for part in parts]):
        found |= seen
    return found


@pytest.fixture(scope="module")
def pool(worker_pool: ProcessPool) -> ProcessPool:
    met = meetings(worker_pool, NUM_WORKERS)
    worker_pool.run("tests.model.dispatch.dispatch_jobs:join", [(met,)] * NUM_WORKERS)
    return worker_pool


@pytest.fixture(scope="module")
def folders(save_tiny: SaveTiny) -> dict[str, Path]:
    return {name: save_tiny(name, seed=5, **fields) for name, (_, fields) in MODELS.items()}


@pytest.mark.parametrize("kernels", ["packed", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", list(MODELS))
def test_any_number_of_members_equals_one(pool: ProcessPool, folders: dict[str, Path], family: str, dtype: torch.dtype,
                                          kernels: str) -> None:
    rng = random.Random(f"{family} {dtype} {kernels}")
    num_layers, num_experts = NUM_MOE_LAYERS[family], MODELS[family][0]
    sequences = some_sequences(rng, 7)
    everything = Placement(1, (((0,),) * num_experts,) * num_layers)
    one_by_one = [[(sequence.request(step),) for sequence in sequences for step in range(len(sequence.chunks))]]
    expected = run_alone(parts_of(folders[family], dtype, kernels, everything, "auto", one_by_one)[0])
    modes: tuple[Mode, ...] = ("auto", "all_to_all", "gather")
    for num_members in (1, 2, 3, 4):
        for mode in modes if num_members == 3 else modes[:1]:
            placement = some_placement(rng, num_members, num_layers, num_experts)
            parts = parts_of(folders[family], dtype, kernels, placement, mode, spread(rng, sequences, num_members))
            assert run(pool, parts) == expected, f"{num_members} members, {mode}, {placement}"


@pytest.mark.parametrize("kernels", ["packed", "torch"])
def test_any_split_over_copies_equals_one(pool: ProcessPool, folders: dict[str, Path], kernels: str) -> None:
    """24 random placements, and the one in which a fast member without experts owns what two unequal copies compute."""
    rng = random.Random(f"splits {kernels}")
    num_layers, num_experts = NUM_MOE_LAYERS["qwen3_moe"], MODELS["qwen3_moe"][0]
    sequences = some_sequences(rng, 4)
    everything = Placement(1, (((0,),) * num_experts,) * num_layers)
    one_by_one = [[(sequence.request(step),) for sequence in sequences for step in range(len(sequence.chunks))]]
    expected = run_alone(parts_of(folders["qwen3_moe"], torch.bfloat16, kernels, everything, "auto", one_by_one)[0])
    unequal = Placement(3, (((1, 2),) * num_experts,) * num_layers,
                        (ExpertRate(1e-5, 1e-6), ExpertRate(3e-4, 1e-4), ExpertRate(1e-4, 3e-5)))
    placements = [some_placement(rng, rng.randint(2, 4), num_layers, num_experts) for _ in range(24)]
    for index, placement in enumerate([unequal, unequal, *placements]):
        mode: Mode = ("all_to_all", "gather")[index % 2]        # type: ignore[assignment]
        steps = spread(rng, sequences, placement.num_members)
        parts = parts_of(folders["qwen3_moe"], torch.bfloat16, kernels, placement, mode, steps)
        assert run(pool, parts) == expected, f"{mode}, {placement}"
