"""One member's part of the switching tests: placements change in the middle of its sequences."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from model.args import read_model_args
from model.dispatch.auto import AutoDispatcher
from model.dispatch.exchange import RowExchange
from model.expert_host import ExpertHost, MemberModel
from model.expert_swap import ExpertChange, prepare_experts
from model.kernels.protocol import ExpertWeights
from model.placement import Placement
from model.runner import Runner
from model.step import StepPlan
from model.weights import WeightLoader
from tests.oracle.distributed_jobs import BLOCK_SIZE, NUM_BLOCKS, NUM_STATE_SLOTS, Part, Seen, keep_hashes, kernels_of
from tests.process_pool import Worker


@dataclass(frozen=True)
class SwitchingPart:
    part: Part
    placements: tuple[Placement, ...]       # after part.placement, one after the other
    switch_steps: tuple[int, ...]           # before which each of them comes
    takes_requests: bool


class Member:
    """A runner, and the next placement that is prepared beside its steps."""

    def __init__(self, worker: Worker, job: SwitchingPart) -> None:
        part, self.rank = job.part, worker.index
        self.kernels = kernels_of(part.kernels)
        self.loader = WeightLoader(part.folder, read_model_args(part.folder), part.dtype, self.kernels)
        self.group = worker.kept[f"group_of_{part.placement.num_members}"]
        self.mode = part.mode
        self.placement = part.placement
        self.model: MemberModel
        if job.takes_requests:
            self.model, _ = self.loader.load_decoder(part.placement, self.rank)
        else:
            self.model, _ = self.loader.load_expert_host(part.placement, self.rank)
        num_blocks, num_slots = (NUM_BLOCKS, NUM_STATE_SLOTS) if job.takes_requests else (0, 0)
        self.runner = Runner(self.model, self.dispatcher(), num_blocks, BLOCK_SIZE, num_state_slots=num_slots)

    def dispatcher(self) -> AutoDispatcher:
        return AutoDispatcher(RowExchange(self.kernels, self.placement, self.rank, self.group), self.mode)

    def prepare(self, placement: Placement) -> dict[int, ExpertWeights]:
        return prepare_experts(ExpertChange(self.placement, placement, self.rank), self.model, self.loader,
                               lambda: None)

    def switch(self, placement: Placement, weights_of_layer: dict[int, ExpertWeights]) -> None:
        self.placement = placement
        self.runner.switch(self.dispatcher(), weights_of_layer)


def run_switching_part(worker: Worker, job: SwitchingPart) -> dict[str, list[Seen]]:
    member = Member(worker, job)
    shas: list[str] = []
    if not isinstance(member.model, ExpertHost):
        keep_hashes(member.model, shas)  # type: ignore[arg-type]
    seen: dict[str, list[Seen]] = {}
    placements = iter(job.placements)
    with ThreadPoolExecutor(1) as thread:

        def prepare_next() -> tuple[Placement, Future[dict[int, ExpertWeights]]] | None:
            placement = next(placements, None)
            return None if placement is None else (placement, thread.submit(member.prepare, placement))
        coming = prepare_next()
        for step_index, (requests, num_tokens) in enumerate(
                zip(job.part.requests_of_step, job.part.num_tokens_of_step, strict=True)):
            for _ in range(job.switch_steps.count(step_index)):
                assert coming is not None
                member.switch(coming[0], coming[1].result())
                coming = prepare_next()
            shas.clear()
            tokens = member.runner.execute(StepPlan(1, step_index, requests), num_tokens).tokens
            for token, sha in zip(tokens, shas, strict=True):
                seen.setdefault(token.request_id, []).append(Seen(token, sha))
        assert coming is None
    return seen
