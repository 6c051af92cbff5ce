"""Draws follow the distribution, the filters and penalties mean what vLLM and OpenAI mean, rows are independent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.sampler import adjusted, draw_token, sample, uniform
from model.step import SamplingSpec, ScheduledRequest


def request(spec: SamplingSpec, position: int = 5, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (),
            ) -> ScheduledRequest:
    return ScheduledRequest("r", (0,), position - 1, (0,), spec, prompt, output)


def logits_of(*probs: float) -> np.ndarray:
    return np.log(np.array(probs, dtype=np.float32))


def tokens_drawn(logits: np.ndarray, spec: SamplingSpec, count: int = 2000) -> np.ndarray:
    return np.bincount([draw_token(logits, spec, (i + 0.5) / count) for i in range(count)], minlength=logits.shape[0])


def test_draws_follow_the_distribution() -> None:
    drawn = tokens_drawn(logits_of(0.1, 0.2, 0.3, 0.4), SamplingSpec())
    assert drawn.tolist() == [200, 400, 600, 800]


def test_draws_follow_the_distribution_over_many_chunks() -> None:
    logits = np.random.default_rng(0).normal(size=3000).astype(np.float32) * 2
    probs = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    drawn = tokens_drawn(logits, SamplingSpec(), 20_000) / 20_000
    assert np.abs(drawn - probs).max() < 1e-4


def test_temperature() -> None:
    drawn = tokens_drawn(logits_of(0.2, 0.8), SamplingSpec(temperature=0.5), 1700)      # squares: 0.04 to 0.64
    assert drawn.tolist() == [100, 1600]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1.1e-5])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 1.01, -300.0]])
    for position in range(20):
        drawn = sample(logits, [request(SamplingSpec(temperature=temperature), position + 1)])
        assert drawn[0].token_id == 1


@pytest.mark.parametrize("spec", [SamplingSpec(top_p=0.0), SamplingSpec(top_k=1), SamplingSpec(top_p=0.0, top_k=7),
                                  SamplingSpec(top_p=0.0, temperature=2.0, presence_penalty=1e-9)])
def test_top_p_of_zero_is_the_likeliest_token(spec: SamplingSpec) -> None:
    logits = torch.tensor([[0.0, 1.0, np.nextafter(np.float32(1.0), np.float32(2.0)), -300.0]])
    for position in range(20):
        assert sample(logits, [request(spec, position + 1)])[0].token_id == 2


@pytest.mark.parametrize(("spec", "kept"), [
    (SamplingSpec(top_k=2), {2, 3}),
    (SamplingSpec(top_k=100), {0, 1, 2, 3}),
    (SamplingSpec(top_p=0.39), {3}),
    (SamplingSpec(top_p=0.41), {2, 3}),
    (SamplingSpec(top_p=0.7), {2, 3}),
    (SamplingSpec(top_p=0.71), {1, 2, 3}),
    (SamplingSpec(top_p=1e-9), {3}),
    (SamplingSpec(min_p=0.6), {2, 3}),
    (SamplingSpec(min_p=1.0), {3}),
    (SamplingSpec(top_k=3, top_p=0.44), {3}),         # of the three that are left 4/9 is the first one's share
    (SamplingSpec(top_k=3, top_p=0.45), {2, 3}),
    (SamplingSpec(min_p=0.3, top_p=0.44), {3}),
])
def test_filters_keep(spec: SamplingSpec, kept: set[int]) -> None:
    drawn = tokens_drawn(logits_of(0.1, 0.2, 0.3, 0.4), spec)
    assert set(np.flatnonzero(drawn).tolist()) == kept


@pytest.mark.parametrize("spec", [SamplingSpec(top_k=2), SamplingSpec(top_p=0.4)])
def test_equal_tokens_are_kept_by_lower_id(spec: SamplingSpec) -> None:
    assert tokens_drawn(np.zeros(5, dtype=np.float32), spec, 100).tolist() == [50, 50, 0, 0, 0]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    rng = np.random.default_rng(1)
    for size in (7, 300, 2000):
        for top_p in (0.2, 0.5, 0.9, 0.999):
            logits = rng.normal(size=size).astype(np.float32) * 3
            probs = np.exp(logits - logits.max(), dtype=np.float64)
            order = np.argsort(-probs, kind="stable")
            count = int(np.searchsorted(np.cumsum(probs[order]) / probs.sum(), top_p)) + 1
            drawn = tokens_drawn(logits, SamplingSpec(top_p=top_p), 500)
            assert set(np.flatnonzero(drawn).tolist()) <= set(order[:count].tolist())
            assert draw_token(logits, SamplingSpec(top_p=top_p), 0.0) == order[:count].min()
            assert draw_token(logits, SamplingSpec(top_p=top_p), 1 - 2**-53) == order[:count].max()


def test_penalties_and_bias() -> None:
    raw = np.array([2.0, -2.0, 1.0, 0.5, 0.0], dtype=np.float32)
    spec = SamplingSpec(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias=((4, 3.0),),
                        banned_token_ids=(3,))
    found = adjusted(raw, request(spec, prompt=(0,), output=(1, 2, 2)), spec)
    # repetition: prompt and output; presence and frequency: output only
    assert found.tolist() == [1.0, -4.0 - 0.75, 0.5 - 1.0, -np.inf, 3.0]
    assert raw.tolist() == [2.0, -2.0, 1.0, 0.5, 0.0]


def test_a_token_in_prompt_and_output_is_repeated_once() -> None:
    spec = SamplingSpec(repetition_penalty=2.0)
    found = adjusted(np.array([4.0, 1.0], dtype=np.float32), request(spec, prompt=(0, 0), output=(0,)), spec)
    assert found.tolist() == [2.0, 1.0]


def test_greedy_honours_bans_and_bias() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    specs = [SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.0, banned_token_ids=(1,)),
             SamplingSpec(temperature=0.0, logit_bias=((0, 9.0),))]
    assert [draw.token_id for draw in sample(logits, [request(spec) for spec in specs])] == [1, 2, 0]


def test_ids_beyond_the_vocabulary_change_nothing() -> None:
    raw = np.array([1.0, 2.0], dtype=np.float32)
    spec = SamplingSpec(logit_bias=((2, 5.0), (-1, 5.0)), banned_token_ids=(9, -1))
    assert adjusted(raw, request(spec), spec).tolist() == [1.0, 2.0]


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros(2, 40)
    logits[:, [7, 9, 33]] = 1.0
    spec = SamplingSpec(temperature=0.0)
    assert [draw.token_id for draw in sample(logits, [request(spec)] * 2)] == [7, 7]


def test_logprobs_are_of_the_raw_logits() -> None:
    spec = SamplingSpec(temperature=0.0, num_logprobs=2, logit_bias=((0, 100.0),))
    draw = sample(torch.log(torch.tensor([[0.1, 0.3, 0.4, 0.2]])), [request(spec)])[0]
    assert draw.token_id == 0 and draw.logprob is not None
    assert draw.logprob.logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in draw.logprob.top] == [2, 1]
    assert [value for _, value in draw.logprob.top] == pytest.approx(np.log([0.4, 0.3]), abs=1e-6)


def test_uniform_depends_on_seed_and_position_only() -> None:
    numbers = {(seed, position): uniform(seed, position) for seed in (-2**63, -1, 0, 1, 2**63 - 1)
               for position in (0, 1, 2, 100_000)}
    assert len(set(numbers.values())) == len(numbers)
    assert all(0.0 <= number < 1.0 for number in numbers.values())
    assert uniform(3, 4) == uniform(3, 4)
    many = np.array([uniform(7, position) for position in range(4000)])
    assert abs(many.mean() - 0.5) < 0.02 and abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.05


def test_the_same_numbers_in_every_release() -> None:
    """Philox is a fixed algorithm: a seed given by a client draws the same after an upgrade."""
    assert [uniform(0, 0), uniform(42, 7)] == [0.011546754286331562, 0.4074136540795371]


def test_a_row_does_not_depend_on_its_place() -> None:
    """Rows of a matrix start at any alignment; vectorized code must not care."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1001, generator=generator) * 3
    specs = [SamplingSpec(temperature=0.9, seed=s, top_p=p, num_logprobs=4) for s in range(6) for p in (1.0, 0.9)]
    for spec in specs:
        alone = sample(row[None], [request(spec)])[0]
        for num_rows in (2, 3, 7):
            batch = torch.randn(num_rows, 1001, generator=generator)
            batch[num_rows - 1] = row
            others = [request(SamplingSpec(temperature=0.0))] * (num_rows - 1)
            assert sample(batch, [*others, request(spec)])[-1] == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_on_cuda_are_those_of_the_cpu() -> None:
    logits = torch.randn(5, 1001, generator=torch.Generator().manual_seed(0))
    for spec in (SamplingSpec(temperature=0.0), SamplingSpec(seed=3, top_p=0.8, num_logprobs=2)):
        assert sample(logits.cuda(), [request(spec)] * 5) == sample(logits, [request(spec)] * 5)
