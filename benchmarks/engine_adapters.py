"""The engines that benchmarks/engine.py measures, behind one Protocol. All decode greedily and never stop early.

Loading this file loads none of them: an adapter imports its engine when it is made, so that each can run in the
interpreter of its own virtual environment. Other servers' engines are in engine_peers.py.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BLOCK_SIZE = 16
MAX_SEQUENCES = 64      # in one batch, of models whose layers keep a state


@dataclass(frozen=True)
class Timing:
    """One batch. The decode window opens when every sequence has its first token."""

    prefill_s: float            # from the submission to the moment the window opens
    decode_s: float             # length of the window
    num_decoded: int            # tokens drawn within it, all sequences together
    best_step_s: float | None = None    # shortest time between steps in which every sequence got a token

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.num_decoded / self.decode_s if self.num_decoded else None


@dataclass(frozen=True)
class Greedy:
    """The tokens that each prompt is continued with, so that engines can be seen to compute the same."""

    token_ids: list[list[int]]
    margins: list[list[float]] | None = None    # log-probability of each over that of the next likely, where it is told


class BenchEngine(Protocol):
    vocab_size: int

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, time_limit_s: float) -> Timing:
        """Run the prompts as one batch; decoding stops after num_tokens each, or when the time is over."""

    def greedy(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> Greedy:
        """Continue the prompts as one batch, untimed."""

    def close(self) -> None: ...


# ==== moesaic: Engine + Scheduler + Runner in one process, the model on a thread of its own, as a shard runs it ====


class MoesaicEngine:
    def __init__(self, folder: Path, num_threads: int, num_kv_tokens: int, device: str, dtype: str) -> None:
        import torch

        from model.args import read_model_args
        from model.dispatch.dispatcher import LocalDispatcher
        from model.kernels.select import select_kernels
        from model.placement import Placement
        from model.runner import Runner
        from model.step import StepHeader, StepPlan, StepResult, TokenLogprob
        from model.weights import load_decoder
        from serving.config import SchedulerConfig
        from serving.engine.agreement import Agreement
        from serving.engine.engine import Engine
        from serving.engine.request import Submission, TokenEvent
        from serving.engine.scheduler import Scheduler

        args = read_model_args(folder)
        kernels = select_kernels(device, num_threads)
        placement = Placement(1, (((0,),) * args.num_experts,) * args.num_moe_layers)
        decoder, _ = load_decoder(folder, args, getattr(torch, dtype), kernels, placement, 0)
        num_blocks = num_kv_tokens // BLOCK_SIZE
        num_state_slots = 2 * MAX_SEQUENCES if args.linear_layers else 0        # a running sequence needs two
        runner = Runner(decoder, LocalDispatcher(kernels, placement), num_blocks, BLOCK_SIZE,
                        num_state_slots=num_state_slots)
        model_thread = ThreadPoolExecutor(1, "model")

        class OneMember:
            prepared_revision = 0

            async def switch(self, revision: int) -> None:
                raise AssertionError("nothing is prepared")

            async def agree(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
                agreement = Agreement((header,))
                return agreement, await self.execute(plan, agreement) if agreement.is_step else None

            async def prepare(self, submission: Submission) -> None:
                assert runner.grammars is not None
                await asyncio.wrap_future(runner.grammars.prepare(
                    submission.request_id, submission.sampling.grammar, submission.journal_token_ids))

            async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
                return await asyncio.get_running_loop().run_in_executor(
                    model_thread, runner.execute, plan, agreement.num_tokens_of_member)

        async def ring_nobody(step_index: int) -> None:
            pass

        def deliver(router_id: str, step_index: int, events: list[TokenEvent]) -> None:
            now_s = time.perf_counter()
            for event in events:
                self._times[event.request_id] += [now_s] * len(event.token_ids)
                self._drawn[event.request_id] += event.logprobs
                if event.finish_reason is not None:
                    self._num_open -= 1
            if self._num_open == 0:
                self._all_ended.set()

        self.runner = runner
        self.vocab_size = args.vocab_size
        self.kernels_name = kernels.name
        self._times: dict[str, list[float]] = {}
        self._drawn: dict[str, list[TokenLogprob]] = {}
        self._num_open = self._num_submitted = 0
        self._all_ended = asyncio.Event()
        config = SchedulerConfig(prefix_caching=False)
        scheduler = Scheduler(config, num_blocks, args.max_position_embeddings, num_state_slots)
        self._engine = Engine(scheduler, OneMember(), 1, time.monotonic, ring_nobody, deliver)
        self._loop = asyncio.new_event_loop()
        self._engine_task = self._loop.create_task(self._engine.run())

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, time_limit_s: float,
                 grammar: str = "") -> Timing:
        """See BenchEngine. `grammar`: of llguidance, which all follow; `runner.grammars` must have been set."""
        return self._loop.run_until_complete(self._generate(prompts, num_tokens, time_limit_s, None, grammar))

    def greedy(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> Greedy:
        self._loop.run_until_complete(self._generate(prompts, num_tokens, 600.0, num_logprobs=2))
        drawn = self._drawn.values()
        return Greedy([[one.token_id for one in sequence] for sequence in drawn],
                      [[round(one.top[0][1] - one.top[1][1], 4) for one in sequence] for sequence in drawn])

    async def _generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, time_limit_s: float,
                        num_logprobs: int | None, grammar: str = "") -> Timing:
        from model.step import SamplingSpec
        from serving.engine.request import Submission

        self._all_ended.clear()
        self._times, self._drawn, self._num_open = {}, {}, len(prompts)
        sampling = SamplingSpec(temperature=0.0, num_logprobs=num_logprobs, grammar=grammar)
        start_s = time.perf_counter()
        for prompt in prompts:
            self._num_submitted += 1
            request_id = str(self._num_submitted)
            self._times[request_id], self._drawn[request_id] = [], []
            self._engine.submit("bench", Submission(request_id, prompt, sampling, num_tokens))
        waiter = asyncio.create_task(self._all_ended.wait())
        await asyncio.wait({waiter, self._engine_task}, timeout=time_limit_s, return_when=asyncio.FIRST_COMPLETED)
        if self._engine_task.done():
            self._engine_task.result()
        if not waiter.done():
            for request_id in self._times:
                self._engine.cancel("bench", request_id)
            await waiter
        return timing_of(start_s, list(self._times.values()))

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.stop())
        self._loop.close()


def timing_of(start_s: float, times_of_sequence: list[list[float]]) -> Timing:
    """Return the timing that follows from the moments at which each sequence got its tokens."""
    if not all(times_of_sequence):
        raise SystemExit("the time limit passed before every sequence had a token: raise --time-limit-s")
    open_s = max(times[0] for times in times_of_sequence)
    end_s = max(times[-1] for times in times_of_sequence)
    num_decoded = sum(moment > open_s for times in times_of_sequence for moment in times)
    whole_steps = sorted(set.intersection(*map(set, times_of_sequence)))        # in which every sequence got a token
    best_step_s = min((after - before for before, after in itertools.pairwise(whole_steps)), default=None)
    return Timing(open_s - start_s, end_s - open_s, num_decoded, best_step_s)


# ==== transformers: its own forward in the leanest loop, sdpa attention, grouped_mm experts ====


class TransformersEngine:
    def __init__(self, folder: Path, num_threads: int, num_kv_tokens: int, device: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(num_threads)
        self._torch = torch
        self._device = device
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation="grouped_mm")
        self._model.to(device).eval()
        self.vocab_size = self._model.config.vocab_size

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, time_limit_s: float) -> Timing:
        start_s = time.perf_counter()
        moments = [moment for moment, _ in self._steps(prompts, num_tokens, start_s + time_limit_s)]
        return timing_of(start_s, [moments] * len(prompts))

    def greedy(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> Greedy:
        steps = self._steps(prompts, num_tokens, float("inf"))
        return Greedy([list(drawn) for drawn in zip(*(token_ids for _, token_ids in steps), strict=True)])

    def _steps(self, prompts: Sequence[tuple[int, ...]], num_tokens: int,
               until_s: float) -> list[tuple[float, list[int]]]:
        """Decode -> of each step when it ended, and the token of each sequence."""
        from transformers import DynamicCache

        torch = self._torch
        token_ids, steps = torch.tensor(prompts, device=self._device), list[tuple[float, list[int]]]()
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            while len(steps) < num_tokens and time.perf_counter() < until_s:
                output = self._model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token_ids = output.logits[:, -1].argmax(-1, keepdim=True)
                drawn = token_ids[:, 0].tolist()        # as a server would need them, and waits for the device
                steps.append((time.perf_counter(), drawn))
        return steps

    def close(self) -> None:
        pass
