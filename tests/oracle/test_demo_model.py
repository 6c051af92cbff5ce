"""The demo model (sparse, through our Runner) says what transformers says with the dense original.

Transformers is not made to generate: it is shown our answer. The answer is also its own greedy one exactly when each
token is the most likely one after those before it, which one forward pass shows instead of 32. It runs in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from model.args import read_model_args
from model.demo_checkpoint import ensure_demo_checkpoint
from model.dispatch.dispatcher import LocalDispatcher
from model.errors import CheckpointError
from model.kernels.select import select_kernels
from model.runner import Runner
from model.step import SamplingSpec, ScheduledRequest, StepPlan
from model.weights import load_decoder
from tests.placements import contiguous_placement

NUM_TOKENS = 32
BLOCK_SIZE = 16
NUM_BLOCKS_EACH = 8
TIE_ULPS = 4            # two logits, each off by 2: bf16 moves transformers' own dense logits here by 1 to 1.4 (std)
GREEDY = SamplingSpec(temperature=0.0)
QUESTIONS = (
    "What is the capital of France?", "Write a short poem about the sea.", "Explain why the sky is blue.",
    "List five fruits.", "Who was Ada Lovelace?", "Write a Python function that adds two numbers.",
    "What is 12 times 7? Think step by step.", "Tell me a story about a fox and a crow.",
    "How do I make a cup of tea?", "Translate 'good morning' to Spanish.",
)


@pytest.fixture(scope="module")
def folders() -> Iterator[tuple[Path, Path]]:
    """The demo checkpoint and its dense original, in the user's cache folder: made once for tests and demo."""
    cache_dir = platformdirs.user_cache_path("moesaic")
    try:
        yield ensure_demo_checkpoint(cache_dir), ensure_demo_checkpoint(cache_dir, dense=True)
    except CheckpointError as error:
        pytest.skip(f"the demo model cannot be had: {error}")


@pytest.fixture(scope="module")
def prompts(folders: tuple[Path, Path]) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats]


def our_answers(folder: Path, prompts: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[int]]:
    """Greedy continuations of all prompts, decoded as one batch."""
    args, kernels = read_model_args(folder), select_kernels("cpu", 2)
    placement = contiguous_placement(args.num_moe_layers, args.num_experts, (args.num_experts,))
    decoder, _ = load_decoder(folder, args, dtype, kernels, placement, 0)
    runner = Runner(decoder, LocalDispatcher(kernels, placement), NUM_BLOCKS_EACH * len(prompts), BLOCK_SIZE)
    requests = tuple(
        ScheduledRequest(str(index), prompt, 0, tuple(range(index * NUM_BLOCKS_EACH, (index + 1) * NUM_BLOCKS_EACH)),
                         GREEDY) for index, prompt in enumerate(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    for step in range(NUM_TOKENS):
        plan = StepPlan(1, step, requests)
        drawn = [token.token_id for token in runner.execute(plan, (plan.num_tokens,)).tokens]
        for answer, token_id in zip(answers, drawn, strict=True):
            assert token_id is not None
            answer.append(token_id)
        requests = tuple(request._replace(token_ids=(answer[-1],),
                                 num_computed_tokens=request.num_computed_tokens + len(request.token_ids))
                         for request, answer in zip(requests, answers, strict=True))
    return answers


@pytest.fixture(scope="module")
def dense(folders: tuple[Path, Path]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32,
                                                                  attn_implementation="sdpa")
    return model


@torch.inference_mode()
def their_logits(dense: PreTrainedModel, prompts: list[tuple[int, ...]], answers: list[list[int]]) -> list[Tensor]:
    """For each prompt fp32 [NUM_TOKENS, V]: what the dense model thinks where each token of the answer was drawn."""
    return [dense(torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=NUM_TOKENS).logits[0]
            for prompt, answer in zip(prompts, answers, strict=True)]


def test_greedy_chat_equals_the_dense_original_in_fp32(folders: tuple[Path, Path], dense: PreTrainedModel,
                                                       prompts: list[tuple[int, ...]]) -> None:
    answers = our_answers(folders[0], prompts, torch.float32)
    for question, answer, logits in zip(QUESTIONS, answers, their_logits(dense, prompts, answers), strict=True):
        assert answer == logits.argmax(-1).tolist(), question


def test_greedy_chat_in_bf16_leaves_the_dense_original_only_at_ties(
        folders: tuple[Path, Path], dense: PreTrainedModel, prompts: list[tuple[int, ...]]) -> None:
    answers = our_answers(folders[0], prompts, torch.bfloat16)
    for question, answer, logits in zip(QUESTIONS, answers, their_logits(dense, prompts, answers), strict=True):
        first = next((index for index, ours in enumerate(answer) if logits[index].argmax() != ours), None)
        if first is None:
            continue
        best = float(logits[first].max())
        gap = best - float(logits[first, answer[first]])
        assert gap <= TIE_ULPS * bf16_ulp(best), f"{question}: token {first} is {gap:.3f} below the best, {best:.3f}"


def bf16_ulp(value: float) -> float:
    """Distance between neighbouring bf16 numbers at `value`: 8 bits of mantissa, the leading one included."""
    return 2.0 ** (math.frexp(value)[1] - 8)
