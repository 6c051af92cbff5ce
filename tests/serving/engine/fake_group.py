"""Fakes for the tests of scheduler and engine: a model that is a function of what the KV cache holds, and a group of
executors that meet in memory."""

from __future__ import annotations

import asyncio
import random
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from model.errors import GroupError
from model.step import SampledToken, SamplingSpec, ScheduledRequest, StepHeader, StepPlan, StepResult, TokenLogprob
from serving.engine.agreement import Agreement
from serving.engine.block_manager import BlockManager
from serving.engine.request import FinishReason, Submission
from serving.engine.state_slots import StateSlots

VOCAB = 40


def next_token(context: Sequence[int], spec: SamplingSpec) -> int:
    """Depends on every token before it, and on the seed."""
    token_id = zlib.crc32(array("q", [*context, spec.seed]).tobytes()) % VOCAB
    while token_id in spec.banned_token_ids:
        token_id = (token_id + 1) % VOCAB
    return token_id


def prompt_logprob(context: Sequence[int], target: int) -> TokenLogprob:
    return TokenLogprob(target, -float(zlib.crc32(array("q", [*context, target]).tobytes()) % 1000))


@dataclass(frozen=True)
class Expected:
    token_ids: tuple[int, ...]      # without the journal's
    finish_reason: FinishReason
    prompt_logprobs: tuple[TokenLogprob, ...]


def expected(submission: Submission) -> Expected:
    """Return what a sequence must come to, computed alone and in one piece."""
    prompt, output = submission.prompt_token_ids, list(submission.journal_token_ids)
    reason = None
    while reason is None:
        if output and output[-1] in submission.stop_token_ids and len(output) > submission.min_tokens:
            reason = FinishReason.STOP
        elif len(output) >= submission.max_tokens:
            reason = FinishReason.LENGTH
        else:
            banned = submission.stop_token_ids if len(output) < submission.min_tokens else ()
            spec = SamplingSpec(seed=submission.sampling.seed, banned_token_ids=banned)
            output.append(next_token((*prompt, *output), spec))
    logprobs: tuple[TokenLogprob, ...] = ()
    if submission.num_prompt_logprobs is not None and not submission.journal_token_ids:
        logprobs = tuple(prompt_logprob(prompt[:i], prompt[i]) for i in range(1, len(prompt)))
    return Expected(tuple(output[len(submission.journal_token_ids):]), reason, logprobs)


class KvModel:
    """Writes tokens into the slots of KV blocks, draws from what it reads there: a block given to the wrong sequence,
    or shared before it was computed, changes the tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}
        self.states: dict[int, tuple[int, ...]] = {}        # a state is all tokens before it

    def run(self, plan: StepPlan) -> StepResult:
        for request in plan.requests:
            self._write(request, request.token_ids)
        states = [() if request.state_read is None else self.states[request.state_read] for request in plan.requests]
        for request, state in zip(plan.requests, states, strict=True):
            self._write_states(request, state)
        return StepResult(plan.epoch_number, plan.step_index, tuple(self._sample(request) for request in plan.requests))

    def spoil(self, plan: StepPlan) -> None:
        """Leave what a step that fails half-way leaves behind."""
        for request in plan.requests:
            self._write(request, [-1] * len(request.token_ids))
            for slot in written_slots(request):
                self.states[slot] = (-1,)

    def move(self, new_number_of: dict[int, int]) -> None:
        """Go on with the blocks that a resize keeps, under their new numbers."""
        self.slots = {(new_number_of[block], offset): token_id for (block, offset), token_id in self.slots.items()
                      if block in new_number_of}

    def _write_states(self, request: ScheduledRequest, state: tuple[int, ...]) -> None:
        if request.state_write is None:
            return
        context = tuple(self.slots[self._slot(request, position)] for position in range(request.num_computed_tokens))
        assert state == context, "the state is another sequence's, or of another position"
        for num_tokens, slot in (*request.state_snapshots, (len(request.token_ids), request.state_write)):
            self.states[slot] = state + request.token_ids[:num_tokens]

    def _slot(self, request: ScheduledRequest, position: int) -> tuple[int, int]:
        return request.block_table[position // self.block_size], position % self.block_size

    def _write(self, request: ScheduledRequest, token_ids: Iterable[int]) -> None:
        for i, token_id in enumerate(token_ids):
            self.slots[self._slot(request, request.num_computed_tokens + i)] = token_id

    def _sample(self, request: ScheduledRequest) -> SampledToken:
        start, end = request.num_computed_tokens, request.num_computed_tokens + len(request.token_ids)
        context = [self.slots[self._slot(request, position)] for position in range(end)]
        scores = tuple(prompt_logprob(context[:start + i], target)
                       for i, target in enumerate(request.prompt_targets, start=1))
        if request.sampling is None:
            return SampledToken(request.request_id, None, prompt_logprobs=scores)
        if request.sampling.needs_history:
            assert [*request.prompt_token_ids, *request.output_token_ids] == context
        token_id = next_token(context, request.sampling)
        logprob = TokenLogprob(token_id, -1.0) if request.sampling.num_logprobs is not None else None
        return SampledToken(request.request_id, token_id, logprob, scores)


def written_slots(request: ScheduledRequest) -> list[int]:
    """The state slots that a step writes for a request."""
    slots = [slot for _, slot in request.state_snapshots]
    return slots if request.state_write is None else [*slots, request.state_write]


def check_state_slots(states: StateSlots, running: Iterable[str]) -> None:
    """Exactly the slots of running sequences are held, and every other one can be had."""
    assert set(states._held) == (set(running) if states.num_slots else set())
    num_holders = [0] * states.num_slots
    for held in states._held.values():
        slots = [held.write, held.spare, held.current, *held.on_the_way.values()]
        for slot in slots:
            if slot is not None:
                num_holders[slot] += 1
        assert held.spare is not None or (held.current is not None and not held.is_kept)
    blocks = states._slots
    assert num_holders == blocks._num_holders, "reference counts differ from what sequences hold"
    unheld = [slot for slot, count in enumerate(num_holders) if count == 0]
    assert sorted([*blocks._empty, *blocks._cached]) == unheld, "a slot is lost or free twice"
    assert blocks._block_of == {name: slot for slot, name in blocks._hash_of.items()}


def check_blocks(blocks: BlockManager, block_tables: Iterable[Sequence[int]]) -> None:
    """Exactly the blocks of these tables are held, each as often as it occurs, and every other one can be had."""
    num_holders = [0] * blocks.num_blocks
    for block_table in block_tables:
        assert len(set(block_table)) == len(block_table), f"{block_table} holds a block twice"
        for block in block_table:
            num_holders[block] += 1
    assert num_holders == blocks._num_holders, "reference counts differ from the block tables"
    unheld = [block for block, count in enumerate(num_holders) if count == 0]
    assert sorted([*blocks._empty, *blocks._cached]) == unheld, "a block is lost or free twice"
    known = blocks._hash_of
    assert set(blocks._cached) <= set(known) and not set(blocks._empty) & set(known)
    assert blocks._block_of == {name: block for block, name in known.items()}
    assert all(count <= 1 or block in known for block, count in enumerate(num_holders)), "an unknown block is shared"


@dataclass
class Group:
    """The members of one epoch. `rng` delays everything that could happen at different moments on different members."""

    num_members: int
    epoch_number: int = 1
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    max_delay: int = 0              # turns of the event loop
    fail_at: tuple[str, int] | None = None      # ("agree" | "execute", step index)
    num_agreements: int = 0
    num_steps: int = 0
    headers: dict[int, dict[int, StepHeader]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_broken: bool = False

    async def delay(self) -> None:
        for _ in range(self.rng.randint(0, self.max_delay)):
            await asyncio.sleep(0)

    async def wait_for(self, headers: dict[int, StepHeader]) -> None:
        while len(headers) < self.num_members:
            if self.is_broken:
                raise GroupError("the group is broken")
            self.changed.clear()
            await self.changed.wait()

    def abort(self) -> None:
        self.is_broken = True
        self.changed.set()

    def break_down(self) -> None:
        self.abort()
        raise GroupError("the group is broken")


class FakeExecutor:
    """One member's place in a Group."""

    def __init__(self, group: Group, rank: int, model: KvModel) -> None:
        self.group = group
        self.rank = rank
        self.model = model
        self.plans: list[StepPlan] = []
        self.in_flight: asyncio.Event | None = None     # set it to let the step under way end
        self.preparing: dict[str, asyncio.Future[None]] = {}    # by request; ended by the test
        self.agreed_step_index = -1
        self.prepared_revision = 0
        self.running_revision = 0
        self.switches: list[tuple[int, int]] = []       # (revision, step before which it came)

    async def agree(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        agreement = Agreement(await self._headers(header))
        await asyncio.sleep(0)
        at_once = agreement.is_step_at_once(self.running_revision)
        return agreement, await self.execute(plan, agreement) if at_once else None

    async def _headers(self, header: StepHeader) -> tuple[StepHeader, ...]:
        group = self.group
        assert header.prepared_revision == self.prepared_revision
        await group.delay()
        assert header.epoch_number == group.epoch_number
        headers = group.headers.setdefault(header.step_index, {})
        assert self.rank not in headers, "an agreement is entered once"
        headers[self.rank] = header
        self.agreed_step_index = header.step_index
        group.num_agreements += 1
        group.changed.set()
        if group.fail_at == ("agree", header.step_index):
            group.break_down()
        await group.wait_for(headers)
        await group.delay()
        return tuple(headers[rank] for rank in range(group.num_members))

    async def prepare(self, submission: Submission) -> None:
        await self.preparing.setdefault(submission.request_id, asyncio.get_running_loop().create_future())

    async def switch(self, revision: int) -> None:
        headers = self.group.headers[self.agreed_step_index].values()
        assert [header.prepared_revision for header in headers] == [revision] * self.group.num_members
        await self.group.delay()
        self.switches.append((revision, self.agreed_step_index))
        self.running_revision = revision

    async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
        group, num_tokens_of_member = self.group, agreement.num_tokens_of_member
        headers = group.headers[plan.step_index]
        assert plan.num_tokens == num_tokens_of_member[self.rank] == headers[self.rank].num_tokens
        assert any(num_tokens_of_member)
        self.plans.append(plan)
        if self.in_flight is not None:
            await self.in_flight.wait()
        await group.delay()
        if group.fail_at == ("execute", plan.step_index) or group.is_broken:
            self.model.spoil(plan)
            group.break_down()
        group.num_steps += 1
        return self.model.run(plan)
