"""What is asked of a disturbed group, and how an answer is known to be another."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.local_group.questions import Answer, first_difference, new_questions


def test_the_same_seed_asks_the_same() -> None:
    first = new_questions(6, 2, 64, (10, 20), 512, 7)
    assert first == new_questions(6, 2, 64, (10, 20), 512, 7) != new_questions(6, 2, 64, (10, 20), 512, 8)
    assert [question.is_greedy for question in first] == [True] * 6 + [False] * 2
    assert len({question.prompt for question in first}) == 8
    assert all(16 <= len(question.prompt) <= 64 and 10 <= question.max_tokens <= 20 for question in first)


def test_any_difference_gives_another_digest() -> None:
    answer = Answer([1, 2], ["a", "b"], [-0.5, -0.25], "length")
    assert answer.digest == replace(answer, texts=["ab"]).digest        # how it came in pieces does not count
    others = [replace(answer, token_ids=[1, 3]), replace(answer, texts=["b"]), replace(answer, logprobs=[-0.5, -0.2]),
              replace(answer, finish_reason="stop")]
    assert answer.digest not in {other.digest for other in others}


def test_the_first_wrong_token_is_named() -> None:
    assert first_difference([1, 2, 3], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
