"""Prompts are cut so that sequences beside them decode in time; what is computed stays the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.step import StepHeader, StepPlan, StepResult
from serving.engine.agreement import Agreement
from serving.engine.prefill_budget import SLO_PART, PrefillBudget
from tests.serving.engine.fake_group import KvModel
from tests.serving.router.fake_cluster import BLOCK, Cluster, FakeClock, submission, until

TOKEN_BUDGET, LEAST = 2048, 128
SLO_S = 0.2
DECODE_S, PROMPT_TOKEN_S = 0.05, 1e-4           # so 1,300 tokens of prompts fit


def header(num_decoding: int = 0, num_prompt_tokens: int = 0) -> StepHeader:
    return StepHeader(1, 0, num_decoding + num_prompt_tokens, num_prompt_tokens=num_prompt_tokens)


def run_step(budget: PrefillBudget, own: StepHeader, *others: StepHeader, token_s: float = PROMPT_TOKEN_S) -> float:
    agreement = Agreement((own, *others))
    step_s = DECODE_S + token_s * sum(each.num_prompt_tokens for each in agreement.headers)
    budget.hear(agreement, own)
    budget.measure(agreement, step_s)
    return step_s


def test_without_anybody_who_decodes_nothing_is_bounded() -> None:
    budget = PrefillBudget(SLO_S)
    assert budget.of_step(TOKEN_BUDGET, num_decoding=0) == TOKEN_BUDGET
    run_step(budget, header(num_prompt_tokens=TOKEN_BUDGET), header(num_prompt_tokens=10))
    assert budget.of_step(TOKEN_BUDGET, num_decoding=0) == TOKEN_BUDGET


def test_prompts_grow_up_to_the_slo_and_steps_stay_within_it() -> None:
    budget, chunks, steps_s = PrefillBudget(SLO_S), list[int](), list[float]()
    run_step(budget, header(num_decoding=4))
    for _ in range(10):
        chunks.append(budget.of_step(TOKEN_BUDGET, num_decoding=4))
        steps_s.append(run_step(budget, header(4, chunks[-1])))
    assert chunks[:4] == [LEAST, 2 * LEAST, 4 * LEAST, 8 * LEAST]       # nothing was known at first
    assert chunks[-1] == pytest.approx((SLO_PART * SLO_S - DECODE_S) / PROMPT_TOKEN_S, rel=0.01)
    assert max(steps_s) <= SLO_S


def test_a_machine_that_becomes_slow_gets_smaller_chunks() -> None:
    budget, steps_s = PrefillBudget(SLO_S), list[float]()
    run_step(budget, header(num_decoding=4))
    for step in range(40):
        chunk = budget.of_step(TOKEN_BUDGET, num_decoding=4)
        steps_s.append(run_step(budget, header(4, chunk), token_s=PROMPT_TOKEN_S * (1 if step < 10 else 4)))
    assert steps_s[10] > SLO_S >= steps_s[-1] > SLO_S / 2


def test_prompts_get_on_where_decoding_alone_takes_too_long() -> None:
    budget = PrefillBudget(DECODE_S / 2)
    for _ in range(3):
        assert budget.of_step(TOKEN_BUDGET, num_decoding=4) == LEAST
        run_step(budget, header(4, LEAST))


def test_one_slow_step_does_not_hold_prompts_back_for_long() -> None:
    budget = PrefillBudget(SLO_S)

    def chunks() -> list[int]:
        found = [budget.of_step(TOKEN_BUDGET, num_decoding=1)]
        for _ in range(8):
            run_step(budget, header(1, found[-1]))
            found.append(budget.of_step(TOKEN_BUDGET, num_decoding=1))
        return found
    run_step(budget, header(num_decoding=1))
    usual = chunks()[-1]
    assert usual > 4 * LEAST
    for slow in (header(num_decoding=1), header(1, usual)):
        budget.measure(Agreement((slow,)), 100.0)
        assert chunks()[-1] >= 0.75 * usual


def test_members_share_what_a_step_has_room_for_and_mind_who_decodes_elsewhere() -> None:
    first, second = PrefillBudget(SLO_S), PrefillBudget(SLO_S)
    decodes = header(num_decoding=8)
    chunks = [0, 0]
    for _ in range(12):
        own = [header(num_prompt_tokens=chunk) for chunk in chunks]
        run_step(first, own[0], own[1], decodes)
        step_s = run_step(second, own[1], own[0], decodes)
        chunks = [budget.of_step(TOKEN_BUDGET, num_decoding=0) for budget in (first, second)]
    assert chunks[0] == chunks[1] < TOKEN_BUDGET
    assert SLO_S / 2 < step_s <= SLO_S
    run_step(first, header(), header())                     # asleep
    assert first.of_step(TOKEN_BUDGET, num_decoding=0) == TOKEN_BUDGET


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 4000), st.floats(0, 100))), st.integers(1, 4096),
       st.integers(0, 300))
def test_a_prompt_always_gets_on_and_never_beyond_the_token_budget(
        steps: list[tuple[int, int, float]], token_budget: int, num_decoding: int) -> None:
    budget = PrefillBudget(SLO_S)
    for decoding, prompt_tokens, step_s in steps:
        agreement = Agreement((header(), header(decoding, prompt_tokens)))
        budget.hear(agreement, agreement.headers[0])
        budget.measure(agreement, step_s)
    num = budget.of_step(token_budget, num_decoding)
    assert num <= token_budget - num_decoding
    assert num >= min(1, token_budget - num_decoding)


class TimedModel(KvModel):
    """Takes a time for a step, and one for each token of a prompt."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(BLOCK)
        self.clock = clock

    def run(self, plan: StepPlan) -> StepResult:
        self.clock.now_s += DECODE_S + 0.01 * plan.num_prompt_tokens
        return super().run(plan)


async def test_a_long_prompt_is_cut_while_another_member_decodes_and_its_tokens_stay_the_same() -> None:
    async with Cluster(2) as cluster:
        streaming, prompted = cluster.shards
        prompted.model = prompted.executor.model = TimedModel(cluster.clock)
        for shard in cluster.shards:
            shard.scheduler.prefill_budget = PrefillBudget(itl_slo_s=0.1)
        streaming.submit(submission("streams", max_tokens=100))
        await until(lambda: bool(streaming.events("streams")))
        prompted.submit(submission("long", num_prompt=100, max_tokens=3))
        await until(lambda: prompted.has_ended("long"))
        assert not streaming.has_ended("streams")
        chunks = [len(plan.requests[0].token_ids) for plan in prompted.executor.plans if plan.requests]
        assert max(chunks) == 4                 # 0.09 s less those 0.05 s without prompts, at 0.01 s a token
        await cluster.until_ended()
        cluster.check()
