"""Computes log-probabilities of one row of logits, in numpy: each row by itself, so it cannot depend on the others.

V vocabulary
"""

from __future__ import annotations

import math

import numpy as np

from model.arrays import Float32Array, IntArray
from model.step import TokenLogprob


def logprobs_of(logits_V: Float32Array, token_id: int, num_top: int) -> TokenLogprob:
    """Return the natural-log probability of `token_id` and the `num_top` likeliest tokens, equal ones by lower id."""
    top_logit = float(logits_V.max())
    log_total = top_logit + math.log(float(np.exp(logits_V - np.float32(top_logit)).sum(dtype=np.float64)))
    top = tuple((token, float(logits_V[token]) - log_total) for token in top_ids(logits_V, num_top).tolist())
    return TokenLogprob(token_id, float(logits_V[token_id]) - log_total, top)


def top_ids(values_V: Float32Array, count: int) -> IntArray:
    """Return the ids of the `count` largest values, largest first, equal ones by lower id."""
    count = min(count, values_V.shape[0])
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values_V, values_V.shape[0] - count)[values_V.shape[0] - count]
    ids = np.flatnonzero(values_V >= threshold)
    return ids[np.argsort(-values_V[ids], kind="stable")][:count]
