"""StepPlan in, StepResult out: what is drawn, what is scored, what is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import read_model_args
from model.dispatch.dispatcher import LocalDispatcher
from model.kernels.torch_kernels import TorchKernels
from model.runner import Runner
from model.step import SamplingSpec, ScheduledRequest, StepPlan
from model.weights import load_decoder
from tests.placements import contiguous_placement

PROMPT = tuple(range(1, 11))
GREEDY = SamplingSpec(temperature=0.0)


@pytest.fixture
def runner(write_tiny: Callable[..., Path]) -> Runner:
    folder, kernels = write_tiny(), TorchKernels()
    args = read_model_args(folder)
    placement = contiguous_placement(args.num_moe_layers, args.num_experts, (args.num_experts,))
    decoder, _ = load_decoder(folder, args, torch.float32, kernels, placement, 0)
    return Runner(decoder, LocalDispatcher(kernels, placement), num_blocks=64, block_size=4)


def plan(*requests: ScheduledRequest, step_index: int = 0) -> StepPlan:
    return StepPlan(3, step_index, requests)


def whole(spec: SamplingSpec | None = GREEDY) -> ScheduledRequest:
    return ScheduledRequest("r", PROMPT, 0, (4, 1, 7, 2), spec)


def test_result_follows_the_plan(runner: Runner) -> None:
    result = runner.execute(plan(whole()._replace(request_id="a"),
                                 ScheduledRequest("b", PROMPT[:3], 0, (9,)), step_index=5), (13,))
    assert (result.epoch_number, result.step_index) == (3, 5)
    assert [token.request_id for token in result.tokens] == ["a", "b"]
    assert result.tokens[0].token_id is not None and result.tokens[1].token_id is None
    assert result.stats.num_expert_rows == 13 * 2       # one MoE layer, top-2
    assert len(result.stats.expert_rows) == 1 and sum(result.stats.expert_rows[0]) == 26
    assert len(result.stats.expert_rows[0]) == 4


def test_empty_plan(runner: Runner) -> None:
    result = runner.execute(plan(step_index=2), (0,))
    assert result.tokens == () and result.step_index == 2
    assert result.stats.num_expert_rows == 0 and result.stats.expert_rows == ((0, 0, 0, 0),)


def test_a_step_can_be_run_again(runner: Runner) -> None:
    first = runner.execute(plan(whole()), (10,))
    assert runner.execute(plan(whole()), (10,)).tokens == first.tokens


def test_prompt_logprobs_in_chunks(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the prompt is cut, token i + 1 is scored by the logits after token i."""
    scored = whole()._replace(num_prompt_logprobs=2, prompt_targets=PROMPT[1:])
    expected = runner.execute(plan(scored), (10,)).tokens[0]
    assert [entry.token_id for entry in expected.prompt_logprobs] == list(PROMPT[1:])
    assert all(len(entry.top) == 2 and entry.logprob <= entry.top[0][1] for entry in expected.prompt_logprobs)
    with torch.inference_mode():
        hidden = runner.decoder.forward(torch.tensor(PROMPT), _attention(), runner.caches, runner.dispatcher)
        log_probs = torch.log_softmax(runner.decoder.logits(hidden), dim=-1)
    for row, entry in enumerate(expected.prompt_logprobs):
        assert entry.logprob == pytest.approx(log_probs[row, entry.token_id].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == log_probs[row].topk(2).indices.tolist()
    monkeypatch.setattr("model.runner._PROMPT_ROWS_AT_ONCE", 3)
    assert runner.execute(plan(scored), (10,)).tokens[0] == expected
    first = scored._replace(token_ids=PROMPT[:4], prompt_targets=PROMPT[1:5], sampling=None)
    second = scored._replace(token_ids=PROMPT[4:], prompt_targets=PROMPT[5:], num_computed_tokens=4)
    pieces = [runner.execute(plan(request), (len(request.token_ids),)).tokens[0] for request in (first, second)]
    assert pieces[0].prompt_logprobs + pieces[1].prompt_logprobs == expected.prompt_logprobs
    assert pieces[1].token_id == expected.token_id


def _attention() -> object:
    from model.batch import build_batch
    return build_batch(plan(whole()), 4, 64).attention


def test_position_of_a_draw_is_that_of_the_new_token(runner: Runner) -> None:
    """Drawn after a whole prompt or after its last token alone, the number drawn is the same."""
    spec = SamplingSpec(temperature=5.0, seed=11)
    expected = runner.execute(plan(whole(spec)), (10,)).tokens[0].token_id
    runner.execute(plan(whole(None)._replace(token_ids=PROMPT[:9])), (9,))
    last = whole(spec)._replace(token_ids=PROMPT[9:], num_computed_tokens=9)
    assert runner.execute(plan(last), (1,)).tokens[0].token_id == expected
