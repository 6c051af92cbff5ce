from __future__ import annotations

from pathlib import Path

import pytest

from model.step import TokenLogprob
from serving.engine.request import FinishReason, TokenEvent
from serving.router.choice import Choice
from serving.text.detokenizer import Detokenizer
from serving.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


def choice(tokenizer: Tokenizer, *stop: str, stop_token_ids: tuple[int, ...] = (),
           includes_stop: bool = False) -> Choice:
    return Choice(0, "s", Detokenizer(tokenizer, [], stop, includes_stop), stop_token_ids, includes_stop)


def event(*token_ids: int, **fields: object) -> TokenEvent:
    logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in token_ids)
    return TokenEvent("s", token_ids, logprobs, **fields)       # type: ignore[arg-type]


def bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each byte."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("num_at_once", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("includes_stop", [False, True])
def test_a_stop_string_is_cut_alike_however_many_tokens_come_at_once(tokenizer: Tokenizer, num_at_once: int,
                                                                     includes_stop: bool) -> None:
    ids = bytewise(tokenizer, "one two three")
    subject = choice(tokenizer, "two", includes_stop=includes_stop)
    deltas = []
    for start in range(0, len(ids), num_at_once):
        deltas.append(subject.add(event(*ids[start:start + num_at_once])))
        if deltas[-1].finish_reason is not None:
            break
    assert "".join(delta.text for delta in deltas) == ("one two" if includes_stop else "one ")
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids[:7]
    assert [entry.token_id for delta in deltas for entry in delta.logprobs] == ids[:7]
    assert deltas[-1].finish_reason is FinishReason.STOP and deltas[-1].stop_reason == "two"
    assert subject.num_tokens == 7


def test_what_was_held_back_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    subject = choice(tokenizer, "STOP!")
    first = subject.add(event(*bytewise(tokenizer, "do not STOP")))
    assert first.text == "do not " and len(first.token_ids) == 11
    last = subject.add(event(*bytewise(tokenizer, "é")[:1], finish_reason=FinishReason.LENGTH))
    assert last.text == "STOP\ufffd" and last.finish_reason is FinishReason.LENGTH and last.stop_reason is None


def test_a_stop_string_in_the_last_event_wins_over_its_length(tokenizer: Tokenizer) -> None:
    delta = choice(tokenizer, "b").add(event(*bytewise(tokenizer, "abc"), finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")


@pytest.mark.parametrize(("includes_stop", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_tokens_text_is_shown_only_when_asked_for(tokenizer: Tokenizer, includes_stop: bool, text: str) -> None:
    ids = bytewise(tokenizer, "ab")
    subject = choice(tokenizer, stop_token_ids=(ids[1],), includes_stop=includes_stop)
    delta = subject.add(event(*ids, finish_reason=FinishReason.STOP, stop_token_id=ids[1]))
    assert (delta.text, delta.token_ids, delta.stop_reason) == (text, tuple(ids), ids[1])


def test_cached_tokens_are_told_once_even_when_another_shard_continues(tokenizer: Tokenizer) -> None:
    ids = bytewise(tokenizer, "ab")
    subject = choice(tokenizer)
    told = [subject.add(event(token_id, num_cached_tokens=16)).num_cached_tokens for token_id in ids]
    assert told == [16, None]
