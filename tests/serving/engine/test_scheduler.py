from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.step import SamplingSpec, ScheduledRequest, StepPlan
from serving.config import SchedulerConfig
from serving.engine import block_names
from serving.engine import scheduler as scheduler_module
from serving.engine.block_manager import block_hash
from serving.engine.request import FinishReason, Request, RequestStatus, Submission, TokenEvent
from serving.engine.scheduler import Scheduler
from serving.errors import ContextLengthError, InvalidRequestError
from tests.serving.engine.fake_group import (
    Expected,
    KvModel,
    check_blocks,
    check_state_slots,
    expected,
    written_slots,
)

BLOCK = 4


def make_scheduler(num_blocks: int = 64, max_batch_tokens: int = 64, max_running: int = 16, *,
                   max_model_len: int = 1000, prefix_caching: bool = True, num_state_slots: int = 0,
                   snapshot_interval: int = 8) -> Scheduler:
    # Constructed unchecked, for blocks smaller than any kernel wants keep the examples small.
    config = SchedulerConfig.model_construct(max_batch_tokens=max_batch_tokens, max_running_requests=max_running,
                                             block_size=BLOCK, prefix_caching=prefix_caching,
                                             snapshot_interval_tokens=snapshot_interval)
    return Scheduler(config, num_blocks, max_model_len, num_state_slots)


def submission(request_id: str, num_prompt: int = 5, max_tokens: int = 4, **fields: object) -> Submission:
    base = Submission(request_id, tuple(range(1, num_prompt + 1)), SamplingSpec(seed=7), max_tokens)
    return replace(base, **fields)          # type: ignore[arg-type]


def add(scheduler: Scheduler, *submissions: Submission, router_id: str = "r") -> list[Request]:
    requests = [Request(each, router_id, 0.0) for each in submissions]
    for request in requests:
        assert scheduler.add(request) is None
    return requests


class Driver:
    """Steps a scheduler with the fake model and collects what comes out."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.model = KvModel(BLOCK)
        self.events: dict[str, list[TokenEvent]] = {}
        self.plans: list[tuple[ScheduledRequest, ...]] = []
        self.now_s = 0.0

    def step(self, fails: bool = False) -> tuple[ScheduledRequest, ...]:
        plan = StepPlan(1, len(self.plans), self.scheduler.schedule(self.now_s))
        self.plans.append(plan.requests)
        if fails:
            self.model.spoil(plan)
            return plan.requests
        for event in self.scheduler.apply(plan, self.model.run(plan)):
            self.events.setdefault(event.request_id, []).append(event)
        return plan.requests

    def run(self) -> None:
        for _ in range(3000):
            if not self.step():
                return
        raise AssertionError("the requests do not come to an end")

    def outcome(self, request_id: str) -> Expected:
        events = self.events[request_id]
        reasons = [event.finish_reason for event in events if event.finish_reason is not None]
        assert len(reasons) == 1 and events[-1].finish_reason is reasons[0]
        return Expected(tuple(token_id for event in events for token_id in event.token_ids), reasons[0],
                        tuple(logprob for event in events for logprob in event.prompt_logprobs))


def names(plan: tuple[ScheduledRequest, ...]) -> list[str]:
    return [scheduled.request_id for scheduled in plan]


def run_all(scheduler: Scheduler, *submissions: Submission) -> Driver:
    add(scheduler, *submissions)
    driver = Driver(scheduler)
    driver.run()
    for each in submissions:
        assert driver.outcome(each.request_id) == expected(each)
    check_blocks(scheduler.blocks, [])
    return driver


# What may be queued.


def test_a_request_may_use_the_whole_kv_cache() -> None:
    scheduler = make_scheduler(num_blocks=5)
    assert scheduler.room.max_request_tokens == 21
    run_all(scheduler, submission("a", num_prompt=11, max_tokens=10))


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    scheduler = make_scheduler(num_blocks=5)
    with pytest.raises(ContextLengthError, match=r"11 prompt tokens.*max_tokens=11.*22 tokens; at most 21.*at most 10"):
        scheduler.add(Request(submission("a", num_prompt=11, max_tokens=11), "r", 0.0))
    with pytest.raises(ContextLengthError, match="max_model_len=8"):
        make_scheduler(max_model_len=8).add(Request(submission("a", num_prompt=5, max_tokens=4), "r", 0.0))
    assert scheduler.num_waiting == 0 and not scheduler.has_work()


def test_a_shard_without_kv_blocks_takes_no_request() -> None:
    scheduler = make_scheduler(num_blocks=0)
    with pytest.raises(InvalidRequestError, match=r"experts only.*send it to a shard that has a share"):
        scheduler.add(Request(submission("a", num_prompt=1, max_tokens=1), "r", 0.0))
    assert not scheduler.has_work() and scheduler.schedule(0.0) == () and scheduler.blocks.num_free == 0


@pytest.mark.parametrize(("wrong", "param"), [
    (submission("open"), "request_id"), (submission("a", num_prompt=0), "prompt"),
    (submission("a", max_tokens=0), "max_tokens")])
def test_a_wrong_request_is_refused_by_field(wrong: Submission, param: str) -> None:
    scheduler = make_scheduler()
    add(scheduler, submission("open"))
    with pytest.raises(InvalidRequestError) as caught:
        scheduler.add(Request(wrong, "r", 0.0))
    assert caught.value.param == param


# Batching.


def test_prefill_is_chunked_and_only_its_last_chunk_draws() -> None:
    driver = run_all(make_scheduler(max_batch_tokens=16), submission("a", num_prompt=40, max_tokens=1))
    assert [len(plan[0].token_ids) for plan in driver.plans[:-1]] == [16, 16, 8]
    assert [plan[0].sampling is not None for plan in driver.plans[:-1]] == [False, False, True]


def test_decodes_go_before_prefill() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    driver = Driver(scheduler)
    add(scheduler, submission("a", num_prompt=3, max_tokens=10))
    driver.step()
    add(scheduler, submission("b", num_prompt=100))
    for _ in range(5):
        plan = driver.step()
        assert [(each.request_id, len(each.token_ids)) for each in plan] == [("a", 1), ("b", 15)]


def test_the_more_urgent_start_first_and_are_preempted_last() -> None:
    scheduler = make_scheduler(max_running=2)
    add(scheduler, *(submission(name, priority=priority) for name, priority in (
        ("late", 1), ("plain", 0), ("also plain", 0), ("urgent", -1))))
    assert names(scheduler.schedule(0.0)) == ["urgent", "plain"]
    scheduler = make_scheduler(num_blocks=3)
    late, soon = add(scheduler, submission("late", 4, 4, priority=1), submission("soon", 4, 4))
    driver = Driver(scheduler)
    driver.run()
    assert (soon.num_preemptions, late.num_preemptions > 0) == (0, True)
    assert driver.outcome("late") == expected(late.submission)


def test_waiting_makes_up_for_a_level_of_priority() -> None:
    scheduler = make_scheduler(max_running=1)
    add(scheduler, submission("late", priority=1), submission("soon"))
    assert names(scheduler.schedule(0.0)) == ["soon"]
    scheduler.cancel("soon")
    assert scheduler.add(Request(submission("other"), "r", 10.0)) is None
    assert names(scheduler.schedule(10.1)) == ["late"]


def test_a_less_urgent_sequence_gives_way_and_goes_on_later() -> None:
    driver = Driver(make_scheduler(max_running=1))
    (late,) = add(driver.scheduler, submission("late", priority=1))
    driver.step()
    add(driver.scheduler, submission("soon"))
    assert names(driver.step()) == ["soon"] and late.num_preemptions == 1
    driver.run()
    assert [driver.outcome(name) for name in ("late", "soon")] == [expected(submission("x"))] * 2


def test_a_flood_keeps_no_other_tenant_from_places_and_blocks() -> None:
    driver = Driver(make_scheduler(num_blocks=16, max_running=8, prefix_caching=False))
    flood = [submission(f"flood{index}", 10, 6, tenant=1) for index in range(20)]
    add(driver.scheduler, *flood)
    driver.step()
    assert driver.scheduler.blocks.num_free < 5
    calm = submission("calm", 20, 3, tenant=2)
    add(driver.scheduler, calm)
    driver.step()               # it is new, and the flood came first
    plan = driver.step()
    assert "calm" in names(plan) and driver.scheduler.num_preemptions > 0
    (request,) = (one for one in driver.scheduler._running if one.request_id == "calm")
    driver.run()
    assert request.num_preemptions == 0
    for each in (*flood, calm):
        assert driver.outcome(each.request_id) == expected(each)


def test_a_long_prompt_of_a_flood_is_put_off_for_a_tenant_that_was_served_less() -> None:
    driver = Driver(make_scheduler(max_batch_tokens=16, prefix_caching=False))
    add(driver.scheduler, submission("calm0", tenant=2))
    driver.run()
    add(driver.scheduler, *(submission(f"flood{index}", 100, tenant=1) for index in range(2)))
    for _ in range(3):
        driver.step()
    add(driver.scheduler, submission("calm1", 20, tenant=2))
    assert [names(driver.step()) for _ in range(2)] == [["calm1"], ["calm1", "flood0"]]
    driver.run()
    assert driver.outcome("flood0") == expected(submission("flood0", 100))


def test_without_tenants_nobody_gives_way() -> None:
    driver = Driver(make_scheduler(num_blocks=16, max_running=2))
    requests = add(driver.scheduler, *(submission(str(index), 10, 4) for index in range(6)))
    driver.run()
    assert not any(request.num_preemptions for request in requests)
    starts = [name for plan in driver.plans for name in names(plan)]
    assert list(dict.fromkeys(starts)) == [str(index) for index in range(6)]


def test_the_last_arrived_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=8)
    submissions = [submission(name, num_prompt=7, max_tokens=14, sampling=SamplingSpec(seed=seed))
                   for seed, name in enumerate("ab")]
    requests = add(scheduler, *submissions)
    driver = Driver(scheduler)
    driver.run()
    assert [request.num_preemptions > 0 for request in requests] == [False, True]
    for each in submissions:
        assert driver.outcome(each.request_id) == expected(each)
    check_blocks(scheduler.blocks, [])


def test_no_more_run_than_may() -> None:
    driver = run_all(make_scheduler(max_running=2), *(submission(name) for name in "abcd"))
    assert max(len(plan) for plan in driver.plans) == 2


def test_history_is_filled_only_when_the_sampler_needs_it() -> None:
    penalized = SamplingSpec(seed=7, presence_penalty=1.0)
    driver = run_all(make_scheduler(), submission("a"), submission("b", sampling=penalized))
    for plan in driver.plans:
        for each in plan:
            assert bool(each.prompt_token_ids) == (each.request_id == "b")


# Prefix cache.


def test_a_known_prefix_is_not_computed_again_but_never_the_whole_prompt() -> None:
    scheduler = make_scheduler()
    driver = run_all(scheduler, submission("a", num_prompt=8, max_tokens=1))
    add(scheduler, submission("b", num_prompt=8), submission("c", num_prompt=7))
    plan = driver.step()
    assert [(each.num_computed_tokens, len(each.token_ids)) for each in plan] == [(4, 4), (4, 3)]
    driver.run()
    assert driver.outcome("b") == expected(submission("b", num_prompt=8))
    assert driver.events["a"][0].num_cached_tokens == 0 and driver.events["b"][0].num_cached_tokens == 4
    assert [event.num_cached_tokens for event in driver.events["b"][1:]] == [None] * 3


def test_a_failed_step_publishes_no_prefix_and_runs_again() -> None:
    scheduler = make_scheduler()
    driver = Driver(scheduler)
    add(scheduler, submission("a", num_prompt=13))
    driver.step(fails=True)
    add(scheduler, submission("b", num_prompt=13))
    assert [each.num_computed_tokens for each in driver.step(fails=True)] == [0, 0]
    driver.run()
    assert driver.outcome("a") == expected(submission("a", num_prompt=13))
    assert driver.outcome("b") == expected(submission("b", num_prompt=13))


def test_only_computed_blocks_are_shared() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    driver = Driver(scheduler)
    same = [submission(name, num_prompt=40) for name in "ab"]
    add(scheduler, same[0])
    driver.step()
    add(scheduler, same[1])
    driver.step()
    driver.step()       # the end of a's prompt, and what is left of the budget for b
    assert [(each.request_id, each.num_computed_tokens) for each in driver.plans[-1]] == [("a", 32), ("b", 32)]
    driver.run()
    for each in same:
        assert driver.outcome(each.request_id) == expected(each)


def test_another_token_budget_counts_from_the_next_step() -> None:
    scheduler = make_scheduler(max_batch_tokens=16, prefix_caching=False)
    driver = Driver(scheduler)
    add(scheduler, submission("a", num_prompt=40, max_tokens=9), submission("b"), submission("c"), submission("d"))
    sizes = []
    for scheduler.token_budget in (16, 5, 5, 16, 2, 2):
        sizes.append([len(each.token_ids) for each in driver.step()])
    # a's prompt in chunks, then what is left for b; no more run than tokens fit, so c and d wait.
    assert sizes == [[16], [5], [5], [14, 2], [1, 1], [1, 1]]
    driver.run()
    for name in "abcd":
        assert driver.outcome(name) == expected(submission(name, 40, 9) if name == "a" else submission(name))


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    driver = run_all(scheduler, submission("a", num_prompt=8))
    add(scheduler, submission("b", num_prompt=8))
    assert driver.step()[0].num_computed_tokens == 0


def test_prompt_logprobs_skip_the_cache_and_travel_with_the_first_token() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    driver = run_all(scheduler, submission("a", num_prompt=40))
    add(scheduler, submission("b", num_prompt=40, num_prompt_logprobs=0))
    driver.run()
    assert driver.outcome("b") == expected(submission("b", num_prompt=40, num_prompt_logprobs=0))
    assert [len(event.prompt_logprobs) for event in driver.events["b"]] == [39, 0, 0, 0]


def test_prompt_logprobs_of_a_preempted_prefill_are_not_told_twice() -> None:
    scheduler = make_scheduler(num_blocks=10, max_batch_tokens=3, max_running=2)
    driver = Driver(scheduler)
    scored = submission("b", num_prompt=28, num_prompt_logprobs=0)
    add(scheduler, submission("a", num_prompt=3, max_tokens=30))
    driver.step()
    request, = add(scheduler, scored)
    while not request.num_preemptions:
        driver.step()
    assert not request.output_token_ids
    driver.run()
    assert driver.outcome("b") == expected(scored)


# Ends.


def test_min_tokens_bans_the_stop_tokens_until_then() -> None:
    plain = expected(submission("a", max_tokens=6))
    stops = plain.token_ids[1:2]
    stopped = submission("a", max_tokens=6, stop_token_ids=stops)
    driver = run_all(make_scheduler(), stopped)
    assert driver.events["a"][-1].stop_token_id == stops[0] and driver.outcome("a").finish_reason is FinishReason.STOP
    longer = replace(stopped, min_tokens=4)
    driver = run_all(make_scheduler(), longer)
    assert len(driver.outcome("a").token_ids) >= 4
    banned = [plan[0].sampling.banned_token_ids for plan in driver.plans if plan and plan[0].sampling]
    assert banned[:5] == [stops, stops, stops, stops, ()][:len(banned)]


def test_a_journal_is_computed_and_not_drawn_again() -> None:
    whole = expected(submission("a", max_tokens=9)).token_ids
    driver = run_all(make_scheduler(), submission("a", max_tokens=9, journal_token_ids=whole[:5]))
    assert driver.outcome("a").token_ids == whole[5:]
    assert len(driver.plans[0][0].token_ids) == 10


@pytest.mark.parametrize(("fields", "reason"), [
    ({"journal_token_ids": (1, 2, 3, 4)}, FinishReason.LENGTH),
    ({"journal_token_ids": (1, 2), "stop_token_ids": (2,)}, FinishReason.STOP)])
def test_a_journal_that_is_complete_ends_at_once(fields: dict[str, tuple[int, ...]], reason: FinishReason) -> None:
    scheduler = make_scheduler()
    event = scheduler.add(Request(replace(submission("a"), **fields), "r", 0.0))    # type: ignore[arg-type]
    assert event is not None and event.finish_reason is reason and event.token_ids == ()
    assert scheduler.schedule(0.0) == () and scheduler.num_waiting == scheduler.num_running == 0


def test_a_journal_shorter_than_min_tokens_does_not_end() -> None:
    early = submission("a", journal_token_ids=(1, 2), stop_token_ids=(2,), min_tokens=3)
    run_all(make_scheduler(), early)


def test_a_cancelled_request_frees_its_blocks_at_once_and_its_step_is_dropped() -> None:
    scheduler = make_scheduler()
    model = KvModel(BLOCK)
    add(scheduler, submission("a"), submission("b"))
    plan = StepPlan(1, 0, scheduler.schedule(0.0))
    event = scheduler.cancel("a")
    assert event is not None and event.finish_reason is FinishReason.CANCELLED
    assert scheduler.blocks.num_free == 64 - 2
    assert scheduler.cancel("a") is None
    add(scheduler, submission("a", num_prompt=9))       # the same id, another request
    assert [event.request_id for event in scheduler.apply(plan, model.run(plan))] == ["b"]
    driver = Driver(scheduler)
    driver.model = model
    driver.run()
    assert driver.outcome("a") == expected(submission("a", num_prompt=9))


def test_a_deadline_fails_the_request_whatever_its_state() -> None:
    scheduler = make_scheduler(max_running=1)
    add(scheduler, submission("running", deadline_s=5.0), submission("waiting", deadline_s=6.0), submission("patient"))
    scheduler.schedule(0.0)
    assert scheduler.next_deadline_s() == 5.0
    assert scheduler.expire(4.9) == []
    assert [(event.request_id, event.finish_reason) for event in scheduler.expire(6.0)] == [
        ("running", FinishReason.FAILED), ("waiting", FinishReason.FAILED)]
    assert scheduler.next_deadline_s() is None
    check_blocks(scheduler.blocks, [])


# Held routers.


def test_a_prompt_is_hashed_once_for_all_of_its_choices_and_only_as_far_as_it_is_known(
        monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []

    def count(parent: bytes, token_ids: tuple[int, ...]) -> bytes:
        hashed.append(token_ids)
        return block_hash(parent, token_ids)
    monkeypatch.setattr(block_names, "block_hash", count)
    scheduler = make_scheduler(num_blocks=200, max_batch_tokens=16)
    prompt = tuple(range(40))
    add(scheduler, *(submission(name, max_tokens=1, prompt_token_ids=prompt) for name in "abc"))
    driver = Driver(scheduler)
    driver.step()
    assert len(hashed) == 16 // BLOCK       # what the first step computed, and no block before it
    driver.run()
    assert len(hashed) == len(set(hashed)) == len(prompt) // BLOCK


def test_newcomers_with_long_known_prompts_start_a_few_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_STARTED_BLOCKS", 20)
    scheduler = make_scheduler(num_blocks=200)
    driver = run_all(scheduler, submission("first", num_prompt=41, max_tokens=1))
    add(scheduler, *(submission(str(index), num_prompt=41, max_tokens=9) for index in range(5)))
    assert [len(driver.step()) for _ in range(4)] == [2, 4, 5, 5]
    driver.run()
    assert all(len(driver.events[str(index)]) == 9 for index in range(5))


def test_a_held_router_is_skipped_and_keeps_its_blocks() -> None:
    scheduler = make_scheduler()
    driver = Driver(scheduler)
    slow, = add(scheduler, submission("slow", max_tokens=9), router_id="slow")
    add(scheduler, submission("quick", max_tokens=9), router_id="quick")
    driver.step()
    scheduler.hold("slow", True)
    block_table = slow.block_table
    driver.run()
    assert "quick" in driver.events and slow.block_table == block_table and not scheduler.has_work()
    scheduler.hold("slow", False)
    driver.run()
    assert driver.outcome("slow") == expected(submission("slow", max_tokens=9))
    assert slow.num_preemptions == 0


def test_held_sequences_give_way_when_nobody_else_could_run() -> None:
    scheduler = make_scheduler(num_blocks=4)
    driver = Driver(scheduler)
    slow, = add(scheduler, submission("slow", num_prompt=12, max_tokens=5), router_id="slow")
    driver.step()
    scheduler.hold("slow", True)
    add(scheduler, submission("quick", num_prompt=12, max_tokens=5, sampling=SamplingSpec(seed=1)), router_id="quick")
    driver.run()
    assert driver.outcome("quick").finish_reason is FinishReason.LENGTH and slow.status is RequestStatus.PREEMPTED
    scheduler.hold("slow", False)
    driver.run()
    assert driver.outcome("slow") == expected(submission("slow", num_prompt=12, max_tokens=5))


def test_held_sequences_keep_their_blocks_while_others_run() -> None:
    scheduler = make_scheduler(num_blocks=8)
    driver = Driver(scheduler)
    slow, = add(scheduler, submission("slow", num_prompt=16, max_tokens=5), router_id="slow")
    add(scheduler, submission("quick", num_prompt=3, max_tokens=4), router_id="quick")
    driver.step()
    scheduler.hold("slow", True)
    add(scheduler, submission("next", num_prompt=16, max_tokens=5, sampling=SamplingSpec(seed=1),
                              num_prompt_logprobs=0), router_id="quick")
    while "quick" not in driver.events or driver.events["quick"][-1].finish_reason is None:
        assert [each.request_id for each in driver.step()] == ["quick"]
    assert slow.num_preemptions == 0
    assert [each.request_id for each in driver.step()] == ["next"]
    assert slow.num_preemptions == 1


# Models with states.


@pytest.mark.parametrize("num_state_slots", [1, 2])
def test_slots_for_less_than_one_sequence_are_refused(num_state_slots: int) -> None:
    with pytest.raises(ValueError, match=f"num_state_slots={num_state_slots}.*needs 3"):
        make_scheduler(num_state_slots=num_state_slots)


def test_a_sequence_that_never_fits_is_refused_with_the_bytes() -> None:
    scheduler = Scheduler(make_scheduler().config, 8, 1000, 3, block_bytes=100, slot_bytes=70)
    with pytest.raises(ContextLengthError, match=r"takes 900 bytes of the cache's 800, beside 210 of states"):
        scheduler.add(Request(submission("a", num_prompt=30, max_tokens=4), "r", 0.0))
    with pytest.raises(ContextLengthError, match=r"max_model_len=1000, KV cache 300x4 tokens\)"):
        make_scheduler(num_blocks=300).add(Request(submission("a", num_prompt=1000), "r", 0.0))


def test_what_the_prefix_cache_serves_is_counted() -> None:
    driver = Driver(make_scheduler(num_state_slots=9))
    for name in ("first", "second"):
        add(driver.scheduler, submission(name, num_prompt=18))
        driver.run()
    assert driver.scheduler.num_cached_tokens == 16 and driver.events["second"][0].num_cached_tokens == 16
    assert driver.scheduler.states.num_snapshots > 0


def test_where_two_prompts_part_the_third_goes_on() -> None:
    """Blocks tell how far a prompt is known; only from then on is it known that a state there is worth keeping."""
    driver = Driver(make_scheduler(num_state_slots=20, snapshot_interval=1000))
    system = tuple(range(1, 14))
    for number, name in enumerate(("first", "second", "third")):
        prompt = (*system, *(20 + number,) * 12)
        add(driver.scheduler, submission(name, prompt_token_ids=prompt))
        driver.run()
    assert [driver.events[name][0].num_cached_tokens for name in ("first", "second", "third")] == [0, 0, 12]


# Everything at once.


@st.composite
def submissions(draw: st.DrawFn) -> Submission:
    """Few tokens and shared beginnings, so that prefixes meet; the id is the caller's."""
    prompt = draw(st.sampled_from([(1,) * 9, (1, 2, 3, 4) * 4, (5, 6) * 3])) + draw(
        st.lists(st.integers(0, 2), max_size=5).map(tuple))
    max_tokens = draw(st.integers(1, 12))
    whole = Submission(
        "", prompt, SamplingSpec(seed=draw(st.integers(0, 1)), presence_penalty=draw(st.sampled_from([0.0, 1.0]))),
        max_tokens, min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=draw(st.lists(st.integers(0, 39), max_size=6).map(tuple)),
        num_prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        deadline_s=draw(st.sampled_from([None, None, None, 4.0, 9.0])),
        priority=draw(st.sampled_from([0, 0, 1, -2])), tenant=draw(st.integers(0, 2)))
    journal = expected(whole).token_ids
    return replace(whole, journal_token_ids=journal[:draw(st.sampled_from([0, 0, 0, 1, 3]))])


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, cancellations, held routers, deadlines, failed steps and steps in flight."""

    @initialize(num_blocks=st.integers(9, 24), max_batch_tokens=st.integers(4, 24), max_running=st.integers(1, 4),
                prefix_caching=st.booleans(), num_state_slots=st.sampled_from([0, 3, 4, 7, 20]))
    def start(self, num_blocks: int, max_batch_tokens: int, max_running: int, prefix_caching: bool,
              num_state_slots: int) -> None:
        self.scheduler = make_scheduler(num_blocks, max_batch_tokens, max_running, prefix_caching=prefix_caching,
                                        num_state_slots=num_state_slots)
        self.model = KvModel(BLOCK)
        self.open: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.held: set[str] = set()
        self.now_s = 0.0
        self.num_accepted = 0
        self.num_ended = 0
        self.step_index = 0
        self.plan: StepPlan | None = None

    def take(self, event: TokenEvent | None) -> None:
        """Each event belongs to an open request; a request ends once, and right."""
        if event is None:
            return
        request = self.open[event.request_id]
        events = self.events.setdefault(event.request_id, [])
        events.append(event)
        want = expected(request.submission)
        token_ids = tuple(token_id for each in events for token_id in each.token_ids)
        assert token_ids == want.token_ids[:len(token_ids)]
        if event.finish_reason is None:
            return
        if event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (token_ids, event.finish_reason) == (want.token_ids, want.finish_reason)
            assert tuple(logprob for each in events for logprob in each.prompt_logprobs) == want.prompt_logprobs
        assert not request.block_table
        del self.open[event.request_id], self.events[event.request_id]
        self.num_ended += 1

    @rule(new=submissions(), name=st.sampled_from("abcdefgh"), router_id=st.sampled_from(["x", "y", "z"]))
    def arrive(self, new: Submission, name: str, router_id: str) -> None:
        request = Request(replace(new, request_id=name), router_id, self.now_s)
        if name in self.open:
            with pytest.raises(InvalidRequestError):
                self.scheduler.add(request)
            return
        if new.max_tokens + len(new.prompt_token_ids) > self.scheduler.room.max_request_tokens:     # since resize()
            with pytest.raises(ContextLengthError):
                self.scheduler.add(request)
            return
        event = self.scheduler.add(request)
        self.num_accepted += 1
        self.open[name] = request
        self.take(event)

    @rule(name=st.sampled_from("abcdefgh"))
    def cancel(self, name: str) -> None:
        assert (name in self.open) == ((event := self.scheduler.cancel(name)) is not None)
        self.take(event)

    @rule(router_id=st.sampled_from(["x", "y", "z"]), held=st.booleans())
    def hold(self, router_id: str, held: bool) -> None:
        self.scheduler.hold(router_id, held)
        (self.held.add if held else self.held.discard)(router_id)

    @rule(token_budget=st.integers(1, 24))
    def change_budget(self, token_budget: int) -> None:
        self.scheduler.token_budget = token_budget

    @rule(num_blocks=st.integers(5, 24))
    def resize(self, num_blocks: int) -> None:
        """Also when a step was in flight, which then has failed."""
        if self.plan is not None:
            self.model.spoil(self.plan)
            self.plan = None
        new_number_of, ended = self.scheduler.resize(num_blocks)
        self.model.move(new_number_of)
        for event in ended:
            assert event.finish_reason is FinishReason.CANCELLED
            self.take(event)
        for request in self.open.values():
            self.scheduler.room.check(request.submission)

    @rule()
    def expire(self) -> None:
        self.now_s += 1.0
        for event in self.scheduler.expire(self.now_s):
            assert event.finish_reason is FinishReason.FAILED and event.error
            self.take(event)

    @rule()
    def schedule(self) -> None:
        """Also when a step was in flight, which then has failed."""
        if self.plan is not None:
            self.model.spoil(self.plan)
        decoding = [request for request in self.open.values() if request.status is RequestStatus.RUNNING
                    and request.num_tokens - request.num_computed_tokens == 1 and request.router_id not in self.held]
        has_work = self.scheduler.has_work()
        requests = self.scheduler.schedule(self.now_s)
        assert bool(requests) == has_work == any(each.router_id not in self.held for each in self.open.values())
        planned = {each.request_id for each in requests}
        assert len(planned) == len(requests)
        assert sum(len(each.token_ids) for each in requests) <= max(self.scheduler.token_budget, len(decoding))
        assert self.scheduler.num_running <= self.scheduler.config.max_running_requests
        for request in decoding:        # a decode waits only for blocks
            assert request.request_id in planned or request.status is RequestStatus.PREEMPTED
        self.check_plan(requests)
        self.plan = StepPlan(1, self.step_index, requests)
        self.step_index += 1

    def check_plan(self, requests: tuple[ScheduledRequest, ...]) -> None:
        """Nobody writes where another sequence reads or writes."""
        for each in requests:
            assert self.open[each.request_id].router_id not in self.held
            assert each.token_ids
            last = (each.num_computed_tokens + len(each.token_ids) - 1) // BLOCK
            written = set(each.block_table[each.num_computed_tokens // BLOCK:last + 1])
            for request in self.open.values():
                assert request.request_id == each.request_id or not written & set(request.block_table)
        slots = [slot for each in requests for slot in written_slots(each)]
        assert len(set(slots)) == len(slots) and not set(slots) & {each.state_read for each in requests}

    @precondition(lambda self: self.plan is not None)
    @rule()
    def finish_step(self) -> None:
        assert self.plan is not None
        for event in self.scheduler.apply(self.plan, self.model.run(self.plan)):
            self.take(event)
        self.plan = None

    @invariant()
    def no_block_is_lost_or_wrongly_shared(self) -> None:
        if hasattr(self, "open"):
            check_blocks(self.scheduler.blocks, [request.block_table for request in self.open.values()])
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.open)
            check_state_slots(self.scheduler.states, [
                request.request_id for request in self.open.values() if request.status is RequestStatus.RUNNING])

    def teardown(self) -> None:
        """Left alone, everything comes to its end, and all blocks come back."""
        if not hasattr(self, "open"):
            return
        for router_id in list(self.held):
            self.hold(router_id, False)
        for _ in range(2000):
            self.schedule()
            self.finish_step()
            self.no_block_is_lost_or_wrongly_shared()
            if not self.open:
                break
        assert not self.open and self.num_accepted == self.num_ended
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks
        assert self.scheduler.states.num_free == self.scheduler.states.num_slots


# Without shrinking, which takes minutes for a machine of this size: add Phase.shrink when it has found something.
SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40,
                                              phases=[Phase.reuse, Phase.generate])
TestSchedulerMachine = SchedulerMachine.TestCase


def test_what_cannot_be_drawn_fails_its_request_only() -> None:
    driver = Driver(make_scheduler())
    add(driver.scheduler, submission("a"), submission("b"))
    plan = StepPlan(1, 0, driver.scheduler.schedule(0.0))
    result = driver.model.run(plan)
    tokens = tuple(token._replace(token_id=None, logprob=None, error="no token") if token.request_id == "a" else token
                   for token in result.tokens)
    failed, other = driver.scheduler.apply(plan, replace(result, tokens=tokens))
    assert failed == TokenEvent("a", finish_reason=FinishReason.FAILED, error="no token") and other.token_ids
    driver.plans.append(plan.requests)
    driver.run()
    assert driver.events["b"][-1].finish_reason is FinishReason.LENGTH
    check_blocks(driver.scheduler.blocks, [])
