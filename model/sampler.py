"""Logits -> token ids. Pure but for torch's argmax: a draw depends only on (seed, position, logits).

Every row is drawn by itself, in numpy on the CPU, by inverting its cumulative distribution at one uniform number of the
counter-based generator Philox(key=seed, counter=position). Position = index of the new token in its sequence.
Order, as in vLLM: logit_bias and banned tokens, repetition, frequency and presence penalties, temperature, min_p,
top_k, top_p. Log-probabilities are those of the raw logits, before all of it (vLLM's default, `raw_logprobs`).

S rows, V vocabulary, C candidates that the filters left
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.logprobs import Row, logprobs_of, top_ids
from model.step import SamplingSpec, ScheduledRequest, TokenLogprob

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Draw:
    token_id: int
    logprob: TokenLogprob | None


def sample(logits_SV: Tensor, requests: list[ScheduledRequest]) -> list[Draw]:
    """One draw for each row; row i belongs to requests[i], whose `sampling` is set. logits fp32 on any device."""
    specs = [request.sampling for request in requests if request.sampling is not None]
    if all(_is_plain_greedy(spec) for spec in specs):
        ids_S = logits_SV.numpy().argmax(axis=1) if logits_SV.device.type == "cpu" else logits_SV.argmax(dim=1)
        return [Draw(token_id, None) for token_id in ids_S.tolist()]
    rows_SV = logits_SV.cpu().numpy()
    return [_draw(row_V, request, spec) for row_V, request, spec in zip(rows_SV, requests, specs, strict=True)]


def _is_plain_greedy(spec: SamplingSpec) -> bool:
    return spec.temperature == 0.0 and spec.num_logprobs is None and not _changes_logits(spec)


def _changes_logits(spec: SamplingSpec) -> bool:
    return bool(spec.needs_history or spec.logit_bias or spec.banned_token_ids)


def _draw(raw_V: Row, request: ScheduledRequest, spec: SamplingSpec) -> Draw:
    logits_V = adjusted(raw_V, request, spec) if _changes_logits(spec) else raw_V
    if spec.temperature == 0.0:
        token_id = int(logits_V.argmax())
    else:
        position = request.num_computed_tokens + len(request.token_ids)
        token_id = draw_token(logits_V, spec, uniform(spec.seed, position))
    logprob = None if spec.num_logprobs is None else logprobs_of(raw_V, token_id, spec.num_logprobs)
    return Draw(token_id, logprob)


def uniform(seed: int, position: int) -> float:
    """One number of [0, 1), 53 bits; the same for the same seed and position everywhere."""
    bits = np.random.Philox(key=seed & _SEED_MASK, counter=position).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def adjusted(raw_V: Row, request: ScheduledRequest, spec: SamplingSpec) -> Row:
    """Logits after bans, bias and penalties.

    Presence and frequency count output tokens only (OpenAI); repetition divides positive and multiplies negative logits
    of every token of prompt and output (transformers, vLLM).
    """
    logits_V = raw_V.copy()
    for token_id, bias in spec.logit_bias:
        logits_V[token_id] += np.float32(bias)
    logits_V[list(spec.banned_token_ids)] = -np.inf
    if spec.repetition_penalty != 1.0:
        seen = np.unique(np.array(request.prompt_token_ids + request.output_token_ids, dtype=np.int64))
        penalty = np.float32(spec.repetition_penalty)
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
    if spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0:
        output, counts = np.unique(np.array(request.output_token_ids, dtype=np.int64), return_counts=True)
        logits_V[output] -= (spec.frequency_penalty * counts + spec.presence_penalty).astype(np.float32)
    return logits_V


def draw_token(logits_V: Row, spec: SamplingSpec, number: float) -> int:
    """Invert the distribution at `number`: ids in their own order, or likeliest first under top_k and top_p."""
    weights_V = np.exp((logits_V - logits_V.max()) / np.float32(spec.temperature))      # the likeliest weighs 1
    ids = _filtered_ids(weights_V, spec)
    weights_C = weights_V if ids is None else weights_V[ids]
    cumulative_C = np.cumsum(weights_C, dtype=np.float64)
    index = int(np.searchsorted(cumulative_C, number * cumulative_C[-1], side="right"))
    index = min(index, int(np.flatnonzero(weights_C)[-1]))       # rounding must not reach a token of weight 0
    return index if ids is None else int(ids[index])


def _filtered_ids(weights_V: Row, spec: SamplingSpec) -> NDArray[np.int64] | None:
    """Ids that min_p, top_k and top_p leave, likeliest first; None when all stay."""
    num_ids = weights_V.shape[0]
    if spec.min_p > 0.0:
        weights_V = np.where(weights_V >= np.float32(spec.min_p), weights_V, np.float32(0.0))
    if spec.top_k is not None and spec.top_k < num_ids:
        ids = top_ids(weights_V, spec.top_k)
        total = float(weights_V[ids].sum(dtype=np.float64))
    elif spec.top_p < 1.0:
        # What lies below an equal share of the tail cannot be in the nucleus: all of it together is less than the tail.
        total = float(weights_V.sum(dtype=np.float64))
        ids = np.flatnonzero(weights_V >= np.float32(min((1.0 - spec.top_p) * total / num_ids, 1.0)))
        ids = ids[np.argsort(-weights_V[ids], kind="stable")]
    elif spec.min_p > 0.0:
        return np.flatnonzero(weights_V)
    else:
        return None
    if spec.top_p < 1.0:
        cumulative = np.cumsum(weights_V[ids], dtype=np.float64)
        ids = ids[:int(np.searchsorted(cumulative, spec.top_p * total)) + 1]
    return ids[weights_V[ids] > 0.0]
