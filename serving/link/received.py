"""Checks what comes on the link before an engine has it, so that nobody can harm others by it. Pure.

Doors and routers let nothing else in, so a refusal here tells of a router that is not ours, or of a fault. Whether a
sequence fits into the caches, and whether its id is taken, the scheduler says.
"""

from __future__ import annotations

import math

from pydantic import ValidationError

from model.step import SamplingSpec
from serving.engine.request import Submission
from serving.errors import InvalidRequestError
from serving.priority import MAX_WEIGHT, check_priority
from serving.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from serving.token_ids import check_token_ids

MAX_ID_CHARACTERS = 512
_MAX_END_TOKEN_IDS = 2 * MAX_STOP_TOKEN_IDS     # a client's, and the model's own


def check_submission(submission: Submission, num_embeddings: int, before: Submission | None = None) -> None:
    """Raise InvalidRequestError for what no door lets in.

    `before`: one that was found right. What is the very same object is not looked at again.
    """
    for name, value in (("request_id", submission.request_id), ("source_shard_id", submission.source_shard_id),
                        ("traceparent", submission.traceparent)):
        if len(value) > MAX_ID_CHARACTERS:
            raise _refused(name, f"has {len(value)} characters, at most {MAX_ID_CHARACTERS} may be")
    if not submission.request_id:
        raise _refused("request_id", "is empty")
    if before is None or submission.prompt_token_ids is not before.prompt_token_ids:
        check_token_ids("prompt_token_ids", submission.prompt_token_ids, num_embeddings)
    if len(submission.journal_token_ids) > submission.max_tokens:
        raise _refused("journal_token_ids", f"has {len(submission.journal_token_ids)} tokens, and max_tokens is "
                                            f"{submission.max_tokens}")
    check_token_ids("journal_token_ids", submission.journal_token_ids, num_embeddings)
    if len(submission.stop_token_ids) + len(submission.sampling.banned_token_ids) > _MAX_END_TOKEN_IDS:
        raise _refused("stop_token_ids", f"has more than {_MAX_END_TOKEN_IDS} tokens")
    if submission.deadline_s is not None and not math.isfinite(submission.deadline_s):
        raise _refused("deadline_in_s", f"is {submission.deadline_s}")
    check_priority(submission.priority)
    if not 1 <= submission.weight <= MAX_WEIGHT:
        raise _refused("weight", f"is {submission.weight}, 1 to {MAX_WEIGHT} may be")
    check_token_ids("logit_bias", [token_id for token_id, _ in submission.sampling.logit_bias], num_embeddings)
    _check_sampling(submission)


def _check_sampling(submission: Submission) -> None:
    """Hold it to the limits of a client's request, which only SamplingParams knows."""
    spec: SamplingSpec = submission.sampling
    try:
        SamplingParams(
            min_tokens=submission.min_tokens, temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p,
            min_p=spec.min_p, presence_penalty=spec.presence_penalty, frequency_penalty=spec.frequency_penalty,
            repetition_penalty=spec.repetition_penalty, logit_bias=dict(spec.logit_bias), seed=spec.seed,
            logprobs=spec.num_logprobs, prompt_logprobs=submission.num_prompt_logprobs, grammar=spec.grammar)
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        raise _refused(".".join(map(str, finding["loc"])), f"is out of range: {finding['msg']}") from None


def _refused(param: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {why}", fix="send what the doors let in", param=param)
