from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.step import SamplingSpec, TokenLogprob
from serving.engine.engine import ShardLoad
from serving.engine.request import FinishReason, Submission, TokenEvent
from serving.errors import ContextLengthError, DeadlineExceededError, ServingError, ShardFailedError
from serving.link.messages import (
    decode_event,
    decode_load,
    decode_submission,
    decode_updates,
    encode_event,
    encode_load,
    encode_submission,
    encode_updates,
    error_of_text,
    error_text,
    merge_events,
)
from serving.proto import shard_pb2

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)
floats = st.floats(allow_nan=False, allow_infinity=False)
small = st.integers(0, 2**32 - 1)
logprobs = st.lists(st.builds(TokenLogprob, small, floats, st.lists(st.tuples(small, floats), max_size=3).map(tuple)),
                    max_size=3).map(tuple)
biases = st.dictionaries(small, floats, max_size=3).map(lambda bias: tuple(sorted(bias.items())))
specs = st.builds(SamplingSpec, floats, st.none() | small, floats, floats, floats, floats, floats, biases, token_ids,
                  st.integers(-2**63, 2**63 - 1), st.none() | small)
submissions = st.builds(Submission, st.text(), token_ids, specs, small, small, token_ids, token_ids, st.none() | small,
                        source_shard_id=st.text(), priority=st.integers(-100, 100), tenant=st.integers(0, 2**64 - 1),
                        traceparent=st.text(), weight=st.integers(1, 1000))
events = st.builds(TokenEvent, st.just("r"), token_ids, logprobs, logprobs, st.none() | small,
                   st.none() | st.sampled_from(FinishReason), st.none() | small, st.text(), small)


@given(submission=submissions)
def test_a_submission_arrives_as_it_was_sent(submission: Submission) -> None:
    wire = encode_submission(submission, 5.0).SerializeToString()
    assert decode_submission(shard_pb2.Submission.FromString(wire), 9.0) == submission


def test_a_deadline_moves_to_the_other_sides_clock() -> None:
    submission = Submission("r", (1,), SamplingSpec(), 1, deadline_s=12.0)
    assert decode_submission(encode_submission(submission, 10.0), 500.0).deadline_s == 502.0


@given(event=events)
def test_an_event_arrives_as_it_was_sent(event: TokenEvent) -> None:
    wire = encode_event(event).SerializeToString()
    assert decode_event(shard_pb2.SequenceUpdate.FromString(wire)) == event


one_token = small.map(lambda token_id: TokenEvent("r", (token_id,)))


@given(step=st.lists(one_token | events, max_size=5))
def test_the_events_of_a_step_arrive_in_one_message_as_they_were_sent(step: list[TokenEvent]) -> None:
    sent = [event._replace(request_id=str(index)) for index, event in enumerate(step)]
    message = shard_pb2.ToRouter()
    encode_updates(message, sent)
    received = decode_updates(shard_pb2.ToRouter.FromString(message.SerializeToString()))
    assert {event.request_id: event for event in received} == {event.request_id: event for event in sent}


@pytest.mark.parametrize("broken", [TokenEvent("x", (2**32,)), TokenEvent("x", (1,), stop_token_id=-1)])
def test_an_event_that_cannot_be_sent_fails_alone(broken: TokenEvent) -> None:
    message = shard_pb2.ToRouter()
    encode_updates(message, [TokenEvent("a", (1,)), broken, TokenEvent("b", (2,)), TokenEvent("c", (3, 4))])
    received = {event.request_id: event for event in decode_updates(message)}
    failed = received.pop("x")
    assert failed.finish_reason is FinishReason.FAILED and "could not be sent" in failed.error
    assert received == {"a": TokenEvent("a", (1,)), "b": TokenEvent("b", (2,)), "c": TokenEvent("c", (3, 4))}


def test_columns_of_different_lengths_are_no_message_of_ours() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        decode_updates(shard_pb2.ToRouter(drawn_request_ids=["a", "b"], drawn_token_ids=[1]))


def test_a_load_arrives_as_it_was_sent() -> None:
    load = ShardLoad(1, 2, 3, 4, 5.5, 6, 7.5, 8, 9, 10, 11, 2**40)
    assert decode_load(encode_load(load)) == load


@given(steps=st.lists(events, min_size=1, max_size=5))
def test_merged_events_say_the_same_as_the_steps(steps: list[TokenEvent]) -> None:
    merged = steps[0]
    for step in steps[1:]:
        merged = merge_events(merged, step)
    assert merged.token_ids == sum((step.token_ids for step in steps), ())
    assert merged.logprobs == sum((step.logprobs for step in steps), ())
    assert merged.prompt_logprobs == sum((step.prompt_logprobs for step in steps), ())
    assert merged.finish_reason == steps[-1].finish_reason and merged.error == steps[-1].error
    counts = [step.num_cached_tokens for step in steps if step.num_cached_tokens is not None]
    assert merged.num_cached_tokens == (counts[0] if counts else None)


@pytest.mark.parametrize("error", [ContextLengthError("too long", fix="shorten it"), DeadlineExceededError("late")])
def test_an_errors_class_survives_the_link(error: ServingError) -> None:
    received = error_of_text(error_text(error))
    assert type(received) is type(error) and str(received) == str(error)


@pytest.mark.parametrize("text", ["", "the deadline passed: sorry", "ServingError: x"])
def test_other_faults_are_the_shards(text: str) -> None:
    assert type(error_of_text(text)) is ShardFailedError


def test_the_choices_of_one_request_share_what_is_alike() -> None:
    first = Submission("a-0", tuple(range(1000)), SamplingSpec(seed=1, logit_bias=((3, 1.0), (5, 2.0)), grammar="g"), 4,
                       stop_token_ids=(7, 8))
    second = replace(first, request_id="a-1", sampling=replace(first.sampling, seed=2))
    wires = [encode_submission(submission, 0.0) for submission in (first, second)]
    one = decode_submission(wires[0], 0.0)
    other = decode_submission(wires[1], 0.0, one)
    assert (one, other) == (first, second)
    assert other.prompt_token_ids is one.prompt_token_ids and other.stop_token_ids is one.stop_token_ids
    assert other.sampling.logit_bias is one.sampling.logit_bias
