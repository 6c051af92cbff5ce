from __future__ import annotations

import pytest

from model.step import SamplingSpec
from serving.engine.request import Submission
from serving.router.journal import Journal

FIRST = Submission("r", (1, 2, 3), SamplingSpec(seed=5), max_tokens=9, num_prompt_logprobs=2)


def test_a_resubmission_continues_after_the_tokens_so_far() -> None:
    journal = Journal()
    journal.open(FIRST)
    assert journal.resubmission("r") == FIRST
    journal.append("r", (7, 8))
    journal.append("r", (9,))
    again = journal.resubmission("r")
    assert again.journal_token_ids == (7, 8, 9) and again.max_tokens == 9 and again.sampling == FIRST.sampling
    assert again.num_prompt_logprobs is None        # they came with the first token
    assert list(journal.close("r")) == [7, 8, 9] and len(journal) == 0


def test_an_id_is_open_once() -> None:
    journal = Journal()
    journal.open(FIRST)
    with pytest.raises(ValueError, match="must differ"):
        journal.open(FIRST)
