"""Whatever comes on the link: a shard takes what doors let in, and refuses the rest by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.step import SamplingSpec
from serving.engine.cache_room import CacheRoom
from serving.engine.request import Submission
from serving.errors import InvalidRequestError
from serving.link.messages import decode_submission
from serving.link.received import MAX_ID_CHARACTERS, check_submission
from serving.proto import shard_pb2
from serving.sampling_params import MAX_GRAMMAR_CHARACTERS, MAX_LOGIT_BIASES

NUM_EMBEDDINGS, MAX_MODEL_LEN = 100, 64
GOOD = Submission("a", (0, 99), SamplingSpec(logit_bias=((99, 1.0),)), max_tokens=3, min_tokens=5,
                  stop_token_ids=(0,) * 257, journal_token_ids=(99, 0, 5), deadline_s=1e300, num_prompt_logprobs=20)


def test_what_doors_let_in_is_taken() -> None:
    check_submission(GOOD, NUM_EMBEDDINGS)
    check_submission(replace(GOOD, sampling=SamplingSpec(0.0, 2**31 - 1, 0.0, 1.0, -2.0, 2.0, 0.01, seed=-(2**63))),
                     NUM_EMBEDDINGS)


@pytest.mark.parametrize(("param", "fields"), [
    ("prompt_token_ids", {"prompt_token_ids": (1, 100)}), ("prompt_token_ids", {"prompt_token_ids": (-1,)}),
    ("journal_token_ids", {"journal_token_ids": (2**32 - 1,)}), ("journal_token_ids", {"journal_token_ids": (1,) * 4}),
    ("stop_token_ids", {"stop_token_ids": (1,) * 513}), ("deadline_in_s", {"deadline_s": math.nan}),
    ("deadline_in_s", {"deadline_s": math.inf}), ("priority", {"priority": -101}),
    ("weight", {"weight": 0}), ("weight", {"weight": 1001}), ("request_id", {"request_id": ""}),
    ("request_id", {"request_id": "x" * (MAX_ID_CHARACTERS + 1)}), ("min_tokens", {"min_tokens": 2**31}),
    ("source_shard_id", {"source_shard_id": "x" * (MAX_ID_CHARACTERS + 1)}),
    ("traceparent", {"traceparent": "x" * (MAX_ID_CHARACTERS + 1)}),
    ("prompt_logprobs", {"num_prompt_logprobs": 21})])
def test_a_submission_is_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=param) as refused:
        check_submission(replace(GOOD, **fields), NUM_EMBEDDINGS)
    assert refused.value.param == param and ". " in str(refused.value)


@pytest.mark.parametrize(("param", "fields"), [
    ("temperature", {"temperature": math.nan}), ("temperature", {"temperature": -1.0}), ("top_k", {"top_k": 0}),
    ("repetition_penalty", {"repetition_penalty": 0.0}), ("logprobs", {"num_logprobs": 1000}),
    ("logit_bias", {"logit_bias": tuple((token_id, 0.0) for token_id in range(MAX_LOGIT_BIASES + 1))}),
    ("logit_bias.5", {"logit_bias": ((5, math.inf),)}), ("logit_bias", {"logit_bias": ((100, 0.0),)}),
    ("grammar", {"grammar": "x" * (MAX_GRAMMAR_CHARACTERS + 1)}),
    ("stop_token_ids", {"banned_token_ids": (1,) * 513})])
def test_sampling_is_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_submission(replace(GOOD, sampling=replace(SamplingSpec(), **fields)), NUM_EMBEDDINGS)
    assert refused.value.param == param


def test_a_prompt_of_many_choices_is_looked_at_once() -> None:
    """Of the very same object only: an equal one may be another."""
    strange = replace(GOOD, prompt_token_ids=(100, 1))
    check_submission(replace(strange, request_id="b"), NUM_EMBEDDINGS, before=strange)
    with pytest.raises(InvalidRequestError):
        check_submission(replace(strange, prompt_token_ids=tuple([100, 1])), NUM_EMBEDDINGS, before=strange)


_INTS, _FLOATS = st.integers(0, 2**32 - 1), st.floats()
_MESSAGES = st.builds(
    shard_pb2.Submission, request_id=st.text(max_size=4), prompt_token_ids=st.lists(st.integers(0, 110), max_size=70),
    sampling=st.builds(shard_pb2.Sampling, temperature=_FLOATS, top_k=_INTS, top_p=_FLOATS, min_p=_FLOATS,
                       repetition_penalty=_FLOATS, seed=st.integers(-(2**63), 2**63 - 1),
                       logit_bias=st.dictionaries(_INTS, _FLOATS, max_size=3), num_logprobs=_INTS),
    max_tokens=st.integers(0, 70), min_tokens=_INTS, stop_token_ids=st.lists(_INTS, max_size=3),
    journal_token_ids=st.lists(st.integers(0, 110), max_size=5), num_prompt_logprobs=_INTS, deadline_in_s=_FLOATS,
    priority=st.integers(-(2**31), 2**31 - 1), tenant=st.integers(0, 2**64 - 1), weight=st.integers(0, 1001))


@given(_MESSAGES)
def test_any_message_is_a_request_within_the_limits_or_refused(message: shard_pb2.Submission) -> None:
    received = decode_submission(message, 0.0)
    try:
        check_submission(received, NUM_EMBEDDINGS)
        CacheRoom(MAX_MODEL_LEN, num_blocks=100, block_size=4).check(received)
    except InvalidRequestError as error:
        assert error.param and ". " in str(error)
        return
    token_ids = received.prompt_token_ids + received.journal_token_ids
    assert 0 <= min(token_ids) <= max(token_ids) < NUM_EMBEDDINGS
    assert max(len(token_ids), len(received.prompt_token_ids) + received.max_tokens) <= MAX_MODEL_LEN
    assert 1 <= received.weight <= 1000
    assert math.isfinite(received.sampling.temperature) and received.sampling.repetition_penalty > 0
