"""Draws token ids from logits. Pure but for torch's argmax: a draw depends only on (seed, position, logits).

Every row is drawn by itself, in numpy on the CPU, by inverting its cumulative distribution at one uniform number of the
counter-based generator Philox(key=seed, counter=position). Position = index of the new token in its sequence.
Order, as in vLLM: logit_bias and banned tokens, repetition, frequency and presence penalties, what a grammar forbids,
temperature, min_p, top_k, top_p. Log-probabilities are those of the raw logits, before all of it (vLLM's default,
`raw_logprobs`).

S rows, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from model.arrays import Float32Array, FloatArray
from model.errors import GrammarError
from model.grammar import GrammarMasks
from model.logprobs import logprobs_of
from model.step import SamplingSpec, ScheduledRequest, TokenLogprob

_SEED_MASK = 2**64 - 1
_CHUNK = 256
_GREEDY_BELOW = 1e-5        # temperatures under it mean greedy, as in vLLM


@dataclass(frozen=True, slots=True)
class Draw:
    token_id: int | None            # None: there is an error
    logprob: TokenLogprob | None = None
    error: str = ""                 # why no token could be drawn


def sample(logits_SV: Tensor, requests: list[ScheduledRequest], grammars: GrammarMasks | None = None) -> list[Draw]:
    """Draw once for each row; row i belongs to requests[i], whose `sampling` is set. logits fp32 on any device.

    A row whose grammar fails has an error; the others are drawn.
    """
    specs = [request.sampling for request in requests if request.sampling is not None]
    if all(_is_plain_greedy(spec) for spec in specs):
        ids_S = logits_SV.numpy().argmax(axis=1) if logits_SV.device.type == "cpu" else logits_SV.argmax(dim=1)
        return [Draw(token_id) for token_id in ids_S.tolist()]
    rows_SV = logits_SV.cpu().numpy()
    return [_draw_or_say(row_V, request, spec, grammars)
            for row_V, request, spec in zip(rows_SV, requests, specs, strict=True)]


def _is_plain_greedy(spec: SamplingSpec) -> bool:
    return _is_greedy(spec) and spec.num_logprobs is None and not spec.grammar and not _changes_logits(spec)


def _is_greedy(spec: SamplingSpec) -> bool:
    """Return whether the likeliest token is left alone; weights could not tell it from one whose logit is next to its
    own."""
    return spec.temperature < _GREEDY_BELOW or spec.top_p == 0.0 or spec.top_k == 1


def _changes_logits(spec: SamplingSpec) -> bool:
    """Return whether logits change before a grammar is asked."""
    return bool(spec.has_penalties or spec.logit_bias or spec.banned_token_ids)


def _draw_or_say(raw_V: Float32Array, request: ScheduledRequest, spec: SamplingSpec,
                 grammars: GrammarMasks | None) -> Draw:
    try:
        return _draw(raw_V, request, spec, grammars)
    except GrammarError as error:
        return Draw(None, error=str(error))


def _draw(raw_V: Float32Array, request: ScheduledRequest, spec: SamplingSpec, grammars: GrammarMasks | None) -> Draw:
    logits_V = adjusted(raw_V, request, spec) if _changes_logits(spec) else raw_V
    assert grammars is not None or not spec.grammar
    mask = grammars.mask(request) if grammars is not None and spec.grammar else None
    if _is_greedy(spec):
        token_id = int(logits_V.argmax()) if mask is None else mask.likeliest(logits_V)
    else:
        position = request.num_computed_tokens + len(request.token_ids)
        token_id = draw_token(logits_V if mask is None else mask.applied(logits_V), spec, uniform(spec.seed, position))
    logprob = None if spec.num_logprobs is None else logprobs_of(raw_V, token_id, spec.num_logprobs)
    return Draw(token_id, logprob)


def uniform(seed: int, position: int) -> float:
    """Return a number of [0, 1), 53 bits; the same for the same seed and position everywhere."""
    bits = np.random.Philox(key=seed & _SEED_MASK, counter=position).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def adjusted(raw_V: Float32Array, request: ScheduledRequest, spec: SamplingSpec) -> Float32Array:
    """Return the logits after bans, bias and penalties.

    Presence and frequency count output tokens only (OpenAI); repetition divides positive and multiplies negative logits
    of every token of prompt and output (transformers, vLLM).
    """
    logits_V = raw_V.copy()
    num_ids = raw_V.shape[0]            # a tokenizer may know more ids than the model has logits for
    for token_id, bias in spec.logit_bias:
        if 0 <= token_id < num_ids:
            logits_V[token_id] += np.float32(bias)
    logits_V[[token_id for token_id in spec.banned_token_ids if 0 <= token_id < num_ids]] = -np.inf
    if spec.repetition_penalty != 1.0:
        seen = np.unique(np.array(request.prompt_token_ids + request.output_token_ids, dtype=np.int64))
        penalty = np.float32(spec.repetition_penalty)
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
    if spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0:
        output, counts = np.unique(np.array(request.output_token_ids, dtype=np.int64), return_counts=True)
        logits_V[output] -= (spec.frequency_penalty * counts + spec.presence_penalty).astype(np.float32)
    return logits_V


def draw_token(logits_V: Float32Array, spec: SamplingSpec, number: float) -> int:
    """Invert the cumulative distribution, ids in their own order, at `number` of [0, 1)."""
    weights_V = logits_V - logits_V.max()
    weights_V /= np.float32(spec.temperature)
    np.exp(weights_V, out=weights_V)            # the likeliest token weighs 1
    _filter(weights_V, spec)
    return _invert(weights_V, number)


def _filter(weights_V: Float32Array, spec: SamplingSpec) -> None:
    """Set to 0 what min_p, top_k and top_p leave out; each judges what the ones before it left."""
    if spec.min_p > 0.0:
        weights_V[weights_V < np.float32(spec.min_p)] = 0.0
    candidates = weights_V
    if spec.top_k is not None and spec.top_k < weights_V.shape[0]:
        place = weights_V.shape[0] - spec.top_k
        candidates = np.partition(weights_V, place)[place:]
        _keep_largest(weights_V, candidates[0], spec.top_k)
    if spec.top_p < 1.0:
        nucleus = np.sort(candidates)[::-1]         # picking the likely ones first takes longer than sorting all
        sums = _running_sums(nucleus)
        count = _place(nucleus, sums, spec.top_p * float(sums[-1]), "left") + 1
        if count < nucleus.shape[0]:
            _keep_largest(weights_V, nucleus[count - 1], count)


def _keep_largest(weights_V: Float32Array, least: np.float32, count: int) -> None:
    """Keep `count` weights, none below `least`, which the last of them weighs; of equal ones those of lower id."""
    is_kept_V = weights_V >= least
    num_surplus = int(np.count_nonzero(is_kept_V)) - count
    if num_surplus > 0:
        is_kept_V[np.flatnonzero(weights_V == least)[-num_surplus:]] = False
    weights_V *= is_kept_V


def _invert(weights_V: Float32Array, number: float) -> int:
    """Return the id at which the running sum passes `number` of the whole sum."""
    sums = _running_sums(weights_V)
    index = _place(weights_V, sums, number * float(sums[-1]), "right")
    if index == weights_V.shape[0] or weights_V[index] == 0.0:      # rounding led past the last weight of a chunk
        index = int(np.flatnonzero(weights_V[:index])[-1])
    return index


def _running_sums(weights_N: Float32Array) -> FloatArray:
    """Return the sum up to the end of every chunk: ten times faster than up to every weight."""
    return np.cumsum(np.add.reduceat(weights_N, np.arange(0, weights_N.shape[0], _CHUNK), dtype=np.float64))


def _place(weights_N: Float32Array, sums: FloatArray, target: float, side: Literal["left", "right"]) -> int:
    """Return the index of the weight with which the running sum reaches (left) or exceeds (right) `target`; N for
    none."""
    chunk = int(np.searchsorted(sums, target, side))
    if chunk == sums.shape[0]:
        return int(weights_N.shape[0])
    before = float(sums[chunk - 1]) if chunk else 0.0
    inside = np.cumsum(weights_N[chunk * _CHUNK:(chunk + 1) * _CHUNK], dtype=np.float64)
    return chunk * _CHUNK + int(np.searchsorted(inside, target - before, side))
