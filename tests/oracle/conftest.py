"""Tiny random checkpoints written by transformers, and a generate loop over Runner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.args import ModelArgs, read_model_args
from model.decoder import Decoder
from model.dispatch.dispatcher import LocalDispatcher
from model.kernels.protocol import Kernels
from model.kernels.torch_kernels import TorchKernels
from model.runner import Runner
from model.step import SampledToken, SamplingSpec, ScheduledRequest, StepPlan
from model.weights import load_decoder
from tests.placements import contiguous_placement

GREEDY = SamplingSpec(temperature=0.0)
Tokens = tuple[int, ...]


class Engine:
    """One member that holds a whole tiny model. Blocks of sequence i are its own; nothing is ever freed."""

    block_size = 4

    def __init__(self, folder: Path, dtype: torch.dtype, kernels: Kernels, num_blocks: int = 256) -> None:
        self.args: ModelArgs = read_model_args(folder)
        placement = contiguous_placement(self.args.num_moe_layers, self.args.num_experts, (self.args.num_experts,))
        self.decoder: Decoder
        self.decoder, self.report = load_decoder(folder, self.args, dtype, kernels, placement, 0)
        self.runner = Runner(self.decoder, LocalDispatcher(kernels, placement), num_blocks, self.block_size,
                             num_state_slots=64)
        self._free_blocks = itertools.count()
        self._states: dict[str, tuple[int, int]] = {}       # of a request: the slot of its state, and the other one
        self._steps = itertools.count()

    def blocks(self, num_tokens: int) -> Tokens:
        return tuple(itertools.islice(self._free_blocks, -(-num_tokens // self.block_size)))

    def run(self, *requests: ScheduledRequest) -> tuple[SampledToken, ...]:
        requests = tuple(map(self._with_state, requests)) if self.args.linear_layers else requests
        plan = StepPlan(1, next(self._steps), requests)
        return self.runner.execute(plan, (plan.num_tokens,)).tokens

    def _with_state(self, request: ScheduledRequest) -> ScheduledRequest:
        """Each request has two slots of its own; it goes on from where it stands unless it says from which slot."""
        name = request.request_id
        current, other = self._states.setdefault(name, (2 * len(self._states) + 1, 2 * len(self._states)))
        read = current if request.state_read is None else request.state_read
        write = other if read != other else current
        self._states[name] = (write, other if write == current else current)
        return request._replace(state_read=read if request.num_computed_tokens else None, state_write=write)

    def state_slot(self, request_id: str) -> int | None:
        """The slot of a request's state after its last step; None where no layer keeps one."""
        return self._states[request_id][0] if self.args.linear_layers else None

    def logits(self, *requests: ScheduledRequest) -> Tensor:
        """Logits of every row of one step, [T, V]."""
        rows: list[Tensor] = []
        original = self.decoder.forward

        def keep_hidden(*args: object) -> Tensor:
            rows.append(original(*args))    # type: ignore[arg-type]
            return rows[-1]

        self.decoder.forward = keep_hidden  # type: ignore[method-assign]
        try:
            self.run(*requests)
        finally:
            self.decoder.forward = original  # type: ignore[method-assign]
        with torch.inference_mode():
            return self.decoder.logits(rows[0])

    def prefill_logits(self, token_ids: Tokens, chunk: int | None = None) -> Tensor:
        table = self.blocks(len(token_ids))
        chunk = chunk or len(token_ids)
        return torch.cat([self.logits(ScheduledRequest("r", token_ids[i:i + chunk], i, table))
                          for i in range(0, len(token_ids), chunk)])

    def generate(self, prompt: Tokens, num_tokens: int, spec: SamplingSpec = GREEDY) -> Tokens:
        table = self.blocks(len(prompt) + num_tokens)
        request = ScheduledRequest("r", prompt, 0, table, spec)
        output: list[int] = []
        while True:
            token_id = self.run(request)[0].token_id
            assert token_id is not None
            output.append(token_id)
            if len(output) == num_tokens:
                return tuple(output)
            done = request.num_computed_tokens + len(request.token_ids)
            request = request._replace(token_ids=(token_id,), num_computed_tokens=done)


def _packed() -> Kernels:
    from model.kernels.packed_cpu import PackedCpuKernels
    return PackedCpuKernels(2)


KERNELS: dict[str, Callable[[], Kernels]] = {"torch": TorchKernels, "packed": _packed}


@pytest.fixture(params=list(KERNELS))
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return KERNELS[request.param]()


@pytest.fixture
def engine_of() -> type[Engine]:
    return Engine


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """save_tiny(family, seed, save={...save_pretrained options...}, **config fields) -> folder."""

    def save(family: str, seed: int = 0, save: dict[str, object] | None = None, dtype: torch.dtype = torch.float32,
             **fields: object) -> Path:
        from transformers import (
            AutoModelForCausalLM,
            MixtralConfig,
            Qwen2MoeConfig,
            Qwen3_5MoeTextConfig,
            Qwen3MoeConfig,
            Qwen3NextConfig,
        )
        common: dict[str, object] = {
            "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 40, "num_experts_per_tok": 2, "max_position_embeddings": 256,
            "initializer_range": 0.2}
        qwen: dict[str, object] = {"moe_intermediate_size": 24, "num_experts": 6, "head_dim": 16}
        shared: dict[str, object] = {"moe_intermediate_size": 24, "num_experts": 6,
                                     "shared_expert_intermediate_size": 20}
        hybrid = shared | {"head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2,
                           "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
                           "initializer_range": 0.1}     # with 0.2 transformers is 1e-4 from its own float64
        own, config_class = {
            "qwen2_moe": (shared, Qwen2MoeConfig), "qwen3_moe": (qwen, Qwen3MoeConfig),
            "mixtral": ({"num_local_experts": 5}, MixtralConfig), "qwen3_next": (hybrid, Qwen3NextConfig),
            "qwen3_5_moe_text": (hybrid, Qwen3_5MoeTextConfig)}[family]
        torch.manual_seed(seed)
        config = config_class(**{key: value for key, value in (common | own | fields).items() if value is not None})
        module = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():       # norms and biases start as ones and zeros, which would hide a mistake
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path_factory.mktemp(family)
        module.to(dtype).save_pretrained(folder, **(save or {}))
        return folder

    yield save
