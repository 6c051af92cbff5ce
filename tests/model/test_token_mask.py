"""A mask changes nothing but which tokens can be drawn, whichever way it takes."""

from __future__ import annotations

import numpy as np
import pytest

from model.errors import GrammarError
from model.token_mask import TokenMask

VOCAB = 1000


def logits_of(seed: int) -> np.ndarray:
    """Return logits with many that are equal."""
    return np.random.default_rng(seed).integers(0, 50, VOCAB).astype(np.float32)


@pytest.mark.parametrize("part", [0.002, 0.03, 0.06, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_the_likeliest_is_that_of_the_masked_logits(part: float, seed: int) -> None:
    is_allowed_V = np.random.default_rng(seed + 100).random(VOCAB) < part
    is_allowed_V[seed] = True
    logits_V, mask = logits_of(seed), TokenMask.of(is_allowed_V)
    masked_V = np.where(is_allowed_V, logits_V, -np.inf)
    assert mask.likeliest(logits_V) == int(masked_V.argmax())
    assert np.array_equal(mask.applied(logits_V), masked_V)


def test_few_and_many_are_told_apart() -> None:
    few, many = np.zeros(VOCAB, dtype=np.bool_), np.ones(VOCAB, dtype=np.bool_)
    few[[3, 7]] = True
    assert TokenMask.of(many).few_ids is None
    few_ids = TokenMask.of(few).few_ids
    assert few_ids is not None and few_ids.tolist() == [3, 7]


@pytest.mark.parametrize("num_allowed", [2, VOCAB // 2])
def test_bans_of_all_that_is_allowed_are_an_error(num_allowed: int) -> None:
    is_allowed_V = np.arange(VOCAB) < num_allowed
    logits_V = np.where(is_allowed_V, -np.inf, logits_of(0)).astype(np.float32)
    mask = TokenMask.of(is_allowed_V)
    for use in (mask.likeliest, mask.applied):
        with pytest.raises(GrammarError, match="logit_bias"):
            use(logits_V)


def test_a_mask_that_allows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        TokenMask.of(np.zeros(VOCAB, dtype=np.bool_))
