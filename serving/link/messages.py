"""The shard link's messages <-> our own values. Both ends of the link use these and nothing else reads the protobufs.

Deadlines travel as seconds left, because each side has its own clock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from model.step import SamplingSpec, TokenLogprob
from serving import errors
from serving.engine.engine import ShardLoad
from serving.engine.request import FinishReason, Submission, TokenEvent
from serving.errors import ServingError, ShardFailedError
from serving.proto import shard_pb2

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NOTHING_ELSE = TokenEvent("")[2:]      # what an event is beside its sequence and its tokens, as a rule

_ERROR_OF_NAME = {error.__name__: error for error in (
    errors.ContextLengthError, errors.UnsupportedFieldError, errors.InvalidRequestError, errors.DeadlineExceededError)}


def encode_submission(submission: Submission, now_s: float) -> shard_pb2.Submission:
    return shard_pb2.Submission(
        request_id=submission.request_id, prompt_token_ids=submission.prompt_token_ids,
        sampling=_encode_sampling(submission.sampling), max_tokens=submission.max_tokens,
        min_tokens=submission.min_tokens, stop_token_ids=submission.stop_token_ids,
        journal_token_ids=submission.journal_token_ids, num_prompt_logprobs=submission.num_prompt_logprobs,
        deadline_in_s=None if submission.deadline_s is None else submission.deadline_s - now_s,
        source_shard_id=submission.source_shard_id, priority=submission.priority,
        tenant=submission.tenant, traceparent=submission.traceparent, weight=submission.weight)


def decode_submission(message: shard_pb2.Submission, now_s: float, before: Submission | None = None) -> Submission:
    """`before`: the submission before it. The choices of one request follow each other, and share what is alike."""
    prompt_token_ids, stop_token_ids = tuple(message.prompt_token_ids), tuple(message.stop_token_ids)
    sampling = _decode_sampling(message.sampling)
    if before is not None:
        prompt_token_ids = _shared(prompt_token_ids, before.prompt_token_ids)
        stop_token_ids = _shared(stop_token_ids, before.stop_token_ids)
        sampling = replace(sampling, logit_bias=_shared(sampling.logit_bias, before.sampling.logit_bias),
                           grammar=before.sampling.grammar if sampling.grammar == before.sampling.grammar
                           else sampling.grammar)
    return Submission(
        request_id=message.request_id, prompt_token_ids=prompt_token_ids, sampling=sampling,
        max_tokens=message.max_tokens, min_tokens=message.min_tokens, stop_token_ids=stop_token_ids,
        journal_token_ids=tuple(message.journal_token_ids),
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
        deadline_s=message.deadline_in_s + now_s if message.HasField("deadline_in_s") else None,
        source_shard_id=message.source_shard_id, priority=message.priority,
        tenant=message.tenant, traceparent=message.traceparent, weight=message.weight)


def _shared(values: tuple[T, ...], before: tuple[T, ...]) -> tuple[T, ...]:
    return before if values == before else values


def _encode_sampling(spec: SamplingSpec) -> shard_pb2.Sampling:
    return shard_pb2.Sampling(
        temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p, min_p=spec.min_p,
        presence_penalty=spec.presence_penalty, frequency_penalty=spec.frequency_penalty,
        repetition_penalty=spec.repetition_penalty, logit_bias=dict(spec.logit_bias), seed=spec.seed,
        num_logprobs=spec.num_logprobs, banned_token_ids=spec.banned_token_ids, grammar=spec.grammar)


def _decode_sampling(message: shard_pb2.Sampling) -> SamplingSpec:
    return SamplingSpec(
        temperature=message.temperature, top_k=message.top_k if message.HasField("top_k") else None,
        top_p=message.top_p, min_p=message.min_p, presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty, repetition_penalty=message.repetition_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())), banned_token_ids=tuple(message.banned_token_ids),
        seed=message.seed, num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        grammar=message.grammar)


def encode_event(event: TokenEvent) -> shard_pb2.SequenceUpdate:
    return shard_pb2.SequenceUpdate(
        request_id=event.request_id, token_ids=event.token_ids, logprobs=_encode_logprobs(event.logprobs),
        prompt_logprobs=_encode_logprobs(event.prompt_logprobs), num_cached_tokens=event.num_cached_tokens,
        finish_reason=event.finish_reason or "", stop_token_id=event.stop_token_id, error=event.error,
        num_received_tokens=event.num_received_tokens)


def decode_event(message: shard_pb2.SequenceUpdate) -> TokenEvent:
    return TokenEvent(
        request_id=message.request_id, token_ids=tuple(message.token_ids),
        logprobs=_decode_logprobs(message.logprobs), prompt_logprobs=_decode_logprobs(message.prompt_logprobs),
        num_cached_tokens=message.num_cached_tokens if message.HasField("num_cached_tokens") else None,
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None, error=message.error,
        num_received_tokens=message.num_received_tokens)


def decode_updates(message: shard_pb2.ToRouter) -> list[TokenEvent]:
    """Decode the updates of one message, of which each is of another sequence. One that cannot be decoded becomes its
    own sequence's failure. Raises ValueError when the columns differ in length: then the message is not ours."""
    events = [TokenEvent(request_id, (token_id,)) for request_id, token_id in
              zip(message.drawn_request_ids, message.drawn_token_ids, strict=True)]
    for update in message.updates:
        try:
            events.append(decode_event(update))
        except Exception as error:
            logger.exception("update_not_decoded request_id=%s", update.request_id)
            events.append(failed_event(update.request_id, _fault("a token event of the shard", "read", error)))
    return events


def encode_updates(message: shard_pb2.ToRouter, events: Iterable[TokenEvent]) -> None:
    """Add events, each of another sequence, to a message. One that cannot be encoded becomes its own sequence's
    failure."""
    drawn: list[TokenEvent] = []
    others: list[TokenEvent] = []
    for event in events:
        (drawn if event[2:] == _NOTHING_ELSE and len(event.token_ids) == 1 else others).append(event)
    try:
        message.drawn_request_ids.extend([event.request_id for event in drawn])
        message.drawn_token_ids.extend([event.token_ids[0] for event in drawn])
    except Exception:       # alone, each shows whether it is the one
        message.ClearField("drawn_request_ids")
        message.ClearField("drawn_token_ids")
        others = [*drawn, *others]
    for event in others:
        try:
            message.updates.append(encode_event(event))
        except Exception as error:
            logger.exception("event_not_encoded request_id=%s", event.request_id)
            failed = failed_event(event.request_id, _fault("a token event", "sent to the router", error))
            message.updates.append(encode_event(failed))


def _fault(what: str, how: str, error: Exception) -> ShardFailedError:
    return ShardFailedError(f"{what} could not be {how}: {error!r:.200}", fix="send the request again")


def _encode_logprobs(logprobs: Iterable[TokenLogprob]) -> list[shard_pb2.Logprob]:
    return [shard_pb2.Logprob(token_id=entry.token_id, logprob=entry.logprob,
                              top_ids=[token_id for token_id, _ in entry.top],
                              top_logprobs=[logprob for _, logprob in entry.top]) for entry in logprobs]


def _decode_logprobs(messages: Iterable[shard_pb2.Logprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(message.token_id, message.logprob,
                              tuple(zip(message.top_ids, message.top_logprobs, strict=True))) for message in messages)


def merge_events(earlier: TokenEvent, later: TokenEvent) -> TokenEvent:
    """Return two steps of one sequence as one event, which a router that fell behind is sent."""
    return TokenEvent(
        request_id=earlier.request_id, token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs, prompt_logprobs=earlier.prompt_logprobs + later.prompt_logprobs,
        num_cached_tokens=later.num_cached_tokens if earlier.num_cached_tokens is None else earlier.num_cached_tokens,
        finish_reason=later.finish_reason, stop_token_id=later.stop_token_id, error=later.error,
        num_received_tokens=earlier.num_received_tokens + later.num_received_tokens)


def encode_load(load: ShardLoad) -> shard_pb2.ShardLoad:
    return shard_pb2.ShardLoad(
        num_running=load.num_running, num_waiting=load.num_waiting, kv_blocks_free=load.kv_blocks_free,
        kv_blocks_total=load.kv_blocks_total, tokens_per_s=load.tokens_per_s, num_preemptions=load.num_preemptions,
        step_s=load.step_s, state_slots_free=load.state_slots_free, state_slots_total=load.state_slots_total,
        num_snapshots=load.num_snapshots, num_cached_tokens=load.num_cached_tokens,
        kv_block_bytes=load.kv_block_bytes)


def decode_load(message: shard_pb2.ShardLoad) -> ShardLoad:
    return ShardLoad(
        num_running=message.num_running, num_waiting=message.num_waiting, kv_blocks_free=message.kv_blocks_free,
        kv_blocks_total=message.kv_blocks_total, tokens_per_s=message.tokens_per_s,
        num_preemptions=message.num_preemptions, step_s=message.step_s, state_slots_free=message.state_slots_free,
        state_slots_total=message.state_slots_total, num_snapshots=message.num_snapshots,
        num_cached_tokens=message.num_cached_tokens, kv_block_bytes=message.kv_block_bytes)


def error_text(error: ServingError) -> str:
    """Return the text of an error for TokenEvent.error: its class by name, so that the client's status survives."""
    return f"{type(error).__name__}: {error}"


def failed_event(request_id: str, error: ServingError) -> TokenEvent:
    """Return the last event of a sequence that failed."""
    return TokenEvent(request_id, finish_reason=FinishReason.FAILED, error=error_text(error))


def error_of_text(text: str) -> ServingError:
    """Return the client's error for a sequence that failed in a shard; faults without a class are the shard's own."""
    name, _, message = text.partition(": ")
    if name in _ERROR_OF_NAME:
        return _ERROR_OF_NAME[name](message)
    return ShardFailedError(text or "the shard failed the request without a reason", fix="send the request again")
