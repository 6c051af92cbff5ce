"""Logits are bit-identical alone or batched, whole or in chunks, on a cached prefix or not, preempted or not.

On the CPU, for every kernel implementation, in bf16 and fp32 (ARCHITECTURE.md, "Numbers never depend on where or with
whom"). Members and placements are in test_distributed_invariance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.protocol import Kernels
from model.kernels.torch_kernels import TorchKernels
from model.step import SamplingSpec, ScheduledRequest

SaveTiny = Callable[..., Path]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Sizes that fit no vector width, windows, dense layers: wherever a scalar tail could show.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_moe": ("qwen3_moe", {"hidden_size": 72, "moe_intermediate_size": 27, "intermediate_size": 53, "head_dim": 18,
                                "vocab_size": 333, "mlp_only_layers": [1], "attention_bias": True, "num_experts": 9,
                                "num_experts_per_tok": 3}),
    "mixtral": ("mixtral", {"hidden_size": 60, "intermediate_size": 37, "head_dim": 10, "vocab_size": 333,
                            "sliding_window": 21, "num_local_experts": 7}),
    "qwen2_moe": ("qwen2_moe", {"hidden_size": 72, "moe_intermediate_size": 27, "intermediate_size": 53,
                                "shared_expert_intermediate_size": 31, "vocab_size": 333, "mlp_only_layers": [1]}),
    "qwen3_next": ("qwen3_next", {"hidden_size": 72, "moe_intermediate_size": 27, "intermediate_size": 53,
                                  "head_dim": 24, "vocab_size": 333, "mlp_only_layers": [1],
                                  "linear_key_head_dim": 19, "linear_value_head_dim": 71, "num_experts": 9}),
    "qwen3_5": ("qwen3_5_moe_text", {"hidden_size": 60, "vocab_size": 333, "linear_num_key_heads": 1,
                                     "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3,
                                     "full_attention_interval": 2, "attention_bias": True}),
}
LENGTH = 75


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 333, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(scope="module")
def folders(save_tiny: SaveTiny) -> dict[str, Path]:
    return {name: save_tiny(family, seed=5, **fields) for name, (family, fields) in MODELS.items()}


@pytest.fixture(params=list(MODELS))
def engine(request: pytest.FixtureRequest, folders: dict[str, Path], dtype: torch.dtype, kernels: Kernels,
           engine_of: Any) -> Any:
    return engine_of(folders[request.param], dtype, kernels, num_blocks=2048)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    different = (ours != expected).any(dim=1).nonzero().flatten().tolist()
    assert not different, f"rows {different[:10]} differ, by {(ours - expected).abs().max()}"


def test_whole_or_in_chunks(engine: Any) -> None:
    whole = engine.prefill_logits(ids(LENGTH, 0))
    for chunk in (1, 2, 3, 5, 7, 11, 16, 33, 64):
        assert_equal(engine.prefill_logits(ids(LENGTH, 0), chunk), whole)


def test_alone_or_batched(engine: Any) -> None:
    """Nine sequences of uneven lengths advance together, each by its own stride; one by one they give the same."""
    strides = (1, 2, 3, 1, 9, 20, 5, 1, 64)
    prompts = [ids(LENGTH - 3 * i, i) for i in range(len(strides))]
    alone = [engine.prefill_logits(prompt) for prompt in prompts]
    tables = [engine.blocks(len(prompt)) for prompt in prompts]
    done = [0] * len(prompts)
    found: list[list[Tensor]] = [[] for _ in prompts]
    while any(done[i] < len(prompts[i]) for i in range(len(prompts))):
        active = [i for i in range(len(prompts)) if done[i] < len(prompts[i])]
        requests = [ScheduledRequest(str(i), prompts[i][done[i]:done[i] + strides[i]], done[i], tables[i])
                    for i in active]
        rows = torch.split(engine.logits(*requests), [len(request.token_ids) for request in requests])
        for i, request, logits in zip(active, requests, rows, strict=True):
            found[i].append(logits)
            done[i] += len(request.token_ids)
    for logits, expected in zip(found, alone, strict=True):
        assert_equal(torch.cat(logits), expected)


def test_cached_prefix(engine: Any) -> None:
    """A second sequence reads the first one's blocks and state for the prefix that they share."""
    prefix, tail = ids(48, 0), ids(20, 1)
    expected = engine.prefill_logits(prefix + tail)
    table = engine.blocks(len(prefix))
    engine.run(ScheduledRequest("first", prefix, 0, table))
    shared = table + engine.blocks(len(tail))
    second = ScheduledRequest("second", tail, len(prefix), shared, state_read=engine.state_slot("first"))
    for _ in range(2):      # nothing that the second does changes what it began from
        assert_equal(engine.logits(second), expected[len(prefix):])


def test_a_snapshot_in_the_middle_of_a_chunk(engine: Any) -> None:
    """States kept on the way of one chunk are those that chunks which end there would have left."""
    if not engine.args.linear_layers:
        pytest.skip("no layer keeps a state")
    tokens = ids(40, 3)
    expected = engine.prefill_logits(tokens)
    table = engine.blocks(len(tokens))
    kept = {1: 60, 2: 61, 16: 62, 39: 63}
    engine.run(ScheduledRequest("r", tokens, 0, table, state_snapshots=tuple(kept.items())))
    for num_tokens, slot in kept.items():
        rest = ScheduledRequest("rest", tokens[num_tokens:], num_tokens, table, state_read=slot)
        assert_equal(engine.logits(rest), expected[num_tokens:])


def test_a_step_that_failed_is_run_again(engine: Any) -> None:
    """The same plan twice gives the same, whatever the first try had written."""
    tokens = ids(40, 3)
    expected = engine.prefill_logits(tokens)
    table = engine.blocks(len(tokens))
    engine.run(ScheduledRequest("r", tokens[:30], 0, table))
    read = engine.state_slot("r")
    engine.run(ScheduledRequest("r", tokens[30:35], 30, table))
    again = engine.logits(ScheduledRequest("again", tokens[30:], 30, table, state_read=read))
    assert_equal(again, expected[30:])


def test_preempted_and_recomputed(engine: Any) -> None:
    """Decoded one by one, then recomputed at once into other blocks, then decoded on: as if nothing happened."""
    prompt, output = ids(30, 0), ids(12, 1)
    expected = engine.prefill_logits(prompt + output)
    engine.prefill_logits(prompt + output[:5], chunk=1)
    table = tuple(reversed(engine.blocks(LENGTH)))
    again = engine.logits(ScheduledRequest("r", prompt + output[:6], 0, table))
    assert_equal(again, expected[:36])
    for i in range(6, len(output)):
        row = engine.logits(ScheduledRequest("r", output[i:i + 1], 30 + i, table))
        assert_equal(row, expected[30 + i:31 + i])


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", list(MODELS))
def test_number_of_threads(folders: dict[str, Path], dtype: torch.dtype, engine_of: Any, model: str,
                           torch_threads: Callable[[int], None]) -> None:
    torch_found, packed_found = [], []
    for count in (1, 2, 3):
        torch_threads(count)
        torch_found.append(engine_of(folders[model], dtype, TorchKernels()).prefill_logits(ids(LENGTH, 0)))
        packed_found.append(engine_of(folders[model], dtype, PackedCpuKernels(count)).prefill_logits(ids(LENGTH, 0)))
    assert_equal(packed_found[1], packed_found[0])
    assert_equal(packed_found[2], packed_found[0])
    # torch's GEMM may split sums over threads
    torch.testing.assert_close(torch_found[1], torch_found[0], atol=0.5 if dtype == torch.bfloat16 else 1e-3, rtol=0)


def test_draws_do_not_depend_on_the_batch(engine: Any) -> None:
    """Sampled text, log-probabilities and penalties included: alone as in a batch of mixed requests."""
    specs = [SamplingSpec(temperature=0.0), SamplingSpec(temperature=1.0, seed=1),
             SamplingSpec(temperature=0.7, top_p=0.9, seed=2, num_logprobs=3),
             SamplingSpec(temperature=1.3, top_k=20, min_p=0.01, seed=3, num_logprobs=0)]
    requests = [ScheduledRequest(str(i), ids(9 + i, i), 0, engine.blocks(40), spec) for i, spec in enumerate(specs)]
    for step in range(6):
        requests = [request._replace(state_read=engine.state_slot(str(i)) if step else None)
                    for i, request in enumerate(requests)]
        alone = tuple(engine.run(request)[0] for request in requests)
        assert engine.run(*requests) == alone
        assert engine.run(*reversed(requests)) == alone[::-1]
        requests = [request._replace(token_ids=(token.token_id,),
                            num_computed_tokens=request.num_computed_tokens + len(request.token_ids))
                    for request, token in zip(requests, alone, strict=True)]
