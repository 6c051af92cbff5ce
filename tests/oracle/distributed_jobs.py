"""One member's part of the distributed invariance tests: the same sequences, cut into any steps, on any member."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.args import read_model_args
from model.decoder import Decoder
from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import Dispatcher, LocalDispatcher
from model.dispatch.exchange import RowExchange
from model.host_threads import HostThreads
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.protocol import Kernels
from model.kernels.torch_kernels import TorchKernels
from model.placement import Placement
from model.runner import Runner
from model.step import SampledToken, ScheduledRequest, StepPlan
from model.weights import load_decoder
from tests.process_pool import Worker

BLOCK_SIZE = 4
NUM_BLOCKS = 256
NUM_STATE_SLOTS = 32
Mode = Literal["auto", "all_to_all", "gather"]


@dataclass(frozen=True)
class Part:
    """Says what one member does: its requests in each step, beside the agreed row counts of each step."""

    folder: Path
    dtype: torch.dtype
    kernels: Literal["torch", "packed"]
    placement: Placement
    mode: Mode
    requests_of_step: tuple[tuple[ScheduledRequest, ...], ...]
    num_tokens_of_step: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Seen:
    """Holds what one sampled position of one sequence gave."""

    token: SampledToken
    logits_sha: str


def run_part(worker: Worker, part: Part) -> dict[str, list[Seen]]:
    kernels, num_members = kernels_of(part.kernels), part.placement.num_members
    threads = HostThreads((kernels.num_threads,) * num_members, worker.index, num_cpus=4)
    exchange = RowExchange(kernels, part.placement, worker.index, worker.kept[f"group_of_{num_members}"],
                           threads=threads)
    dispatcher = AutoDispatcher(exchange, part.mode)
    return run_steps(part, kernels, dispatcher, worker.index)


def run_alone(part: Part) -> dict[str, list[Seen]]:
    """In this process, which holds everything."""
    kernels = kernels_of(part.kernels)
    return run_steps(part, kernels, LocalDispatcher(kernels, part.placement), 0)


def run_steps(part: Part, kernels: Kernels, dispatcher: Dispatcher, rank: int) -> dict[str, list[Seen]]:
    decoder, _ = load_decoder(part.folder, read_model_args(part.folder), part.dtype, kernels, part.placement, rank)
    shas: list[str] = []
    keep_hashes(decoder, shas)
    runner = Runner(decoder, dispatcher, NUM_BLOCKS, BLOCK_SIZE, num_state_slots=NUM_STATE_SLOTS)
    seen: dict[str, list[Seen]] = {}
    for step_index, (requests, num_tokens) in enumerate(
            zip(part.requests_of_step, part.num_tokens_of_step, strict=True)):
        shas.clear()
        tokens = runner.execute(StepPlan(1, step_index, requests), num_tokens).tokens
        for token, sha in zip(tokens, shas, strict=True):
            seen.setdefault(token.request_id, []).append(Seen(token, sha))
    return seen


def keep_hashes(decoder: Decoder, shas: list[str]) -> None:
    original = decoder.logits

    def logits(hidden_SD: Tensor) -> Tensor:
        logits_SV = original(hidden_SD)
        shas.extend(hashlib.sha256(row_V.numpy().tobytes()).hexdigest() for row_V in logits_SV)
        return logits_SV

    decoder.logits = logits  # type: ignore[method-assign]


def kernels_of(name: str) -> Kernels:
    return PackedCpuKernels(1) if name == "packed" else TorchKernels("cpu")
