"""Log-probabilities against torch, and the order of equal tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.logprobs import logprobs_of, top_ids


def test_against_log_softmax() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 5
    expected = torch.log_softmax(logits.double(), dim=0)
    found = logprobs_of(logits.numpy(), 17, 5)
    assert found.token_id == 17 and found.logprob == pytest.approx(expected[17].item(), abs=1e-5)
    assert [token for token, _ in found.top] == expected.topk(5).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)


def test_equal_tokens_by_lower_id() -> None:
    assert top_ids(np.array([0, 1, 1, 1, 2], dtype=np.float32), 3).tolist() == [4, 1, 2]
    assert top_ids(np.zeros(3, dtype=np.float32), 9).tolist() == [0, 1, 2]
    assert top_ids(np.zeros(3, dtype=np.float32), 0).tolist() == []
