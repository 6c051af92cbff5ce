"""The tokens that a grammar allows next, and what it makes of logits. Pure.

V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.arrays import BoolArray, Float32Array, IntArray
from model.errors import GrammarError

_FEW = 0.05     # of the vocabulary: so few logits are picked out sooner than all others are hidden


@dataclass(frozen=True, slots=True)
class TokenMask:
    """What may follow one output. `few_ids`: the same as ids, in order, where they are few."""

    is_allowed_V: BoolArray
    few_ids: IntArray | None

    @classmethod
    def of(cls, is_allowed_V: BoolArray) -> TokenMask:
        """Raises ValueError when nothing is allowed."""
        num_allowed = int(np.count_nonzero(is_allowed_V))
        if not num_allowed:
            raise ValueError("no token may follow")
        return cls(is_allowed_V, np.flatnonzero(is_allowed_V) if num_allowed < _FEW * len(is_allowed_V) else None)

    def likeliest(self, logits_V: Float32Array) -> int:
        """Return the allowed token of the largest logit, of equal ones that of the lowest id. Raises GrammarError."""
        token_id = int(logits_V.argmax())
        if not self.is_allowed_V[token_id]:         # a model that writes what it was asked for has said it by itself
            token_id = int(self.applied(logits_V).argmax()) if self.few_ids is None \
                else int(self.few_ids[logits_V[self.few_ids].argmax()])
        _check(logits_V[token_id])
        return token_id

    def applied(self, logits_V: Float32Array) -> Float32Array:
        """Return the logits with minus infinity for what is not allowed. Raises GrammarError."""
        masked_V = np.where(self.is_allowed_V, logits_V, np.float32(-np.inf))
        _check(masked_V.max())
        return masked_V


def _check(largest: np.float32) -> None:
    """Raise GrammarError when all that is allowed was banned otherwise."""
    if np.isneginf(largest):
        raise GrammarError("bans leave no token that the output format allows",
                           fix="remove logit_bias and stop_token_ids")
