from __future__ import annotations

import pytest

from model.step import SamplingSpec
from serving.engine.cache_room import CacheRoom
from serving.engine.request import Submission
from serving.errors import ContextLengthError, InvalidRequestError


def submission(num_prompt: int, max_tokens: int) -> Submission:
    return Submission("a", tuple(range(num_prompt)), SamplingSpec(), max_tokens)


def test_the_last_token_needs_no_place() -> None:
    room = CacheRoom(1000, 5, 4)
    room.check(submission(11, 10))
    with pytest.raises(ContextLengthError, match=r"11 prompt tokens.*max_tokens=11.*22 tokens; at most 21.*at most 10"):
        room.check(submission(11, 11))
    with pytest.raises(ContextLengthError, match="max_model_len=8"):
        CacheRoom(8, 64, 4).check(submission(5, 4))


def test_the_part_that_is_too_long_is_named() -> None:
    for num_prompt, max_tokens, param in ((30, 1, "prompt"), (10, 30, "max_tokens")):
        with pytest.raises(ContextLengthError) as error:
            CacheRoom(1000, 5, 4).check(submission(num_prompt, max_tokens))
        assert error.value.param == param


def test_what_the_cache_lacks_is_told_in_bytes() -> None:
    with pytest.raises(ContextLengthError, match=r"takes 900 bytes of the cache's 800, beside 210 of states"):
        CacheRoom(1000, 8, 4, block_bytes=100, slot_bytes=70).check(submission(30, 4))
    with pytest.raises(ContextLengthError, match=r"max_model_len=1000, KV cache 300x4 tokens\)"):
        CacheRoom(1000, 300, 4, block_bytes=100).check(submission(1000, 4))


@pytest.mark.parametrize(("room", "wrong", "said"), [
    (CacheRoom(1000, 0, 4), submission(1, 1), "experts only"), (CacheRoom(1000, 5, 4), submission(0, 1), "no tokens"),
    (CacheRoom(1000, 5, 4), submission(1, 0), "max_tokens is below 1")])
def test_what_is_no_request_is_refused(room: CacheRoom, wrong: Submission, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        room.check(wrong)
