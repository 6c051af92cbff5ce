"""Text in pieces: never half a character, stop strings exact, the same text however it is split."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from serving.text.detokenizer import Detokenizer
from serving.text.token_bytes import FirstSpace, read_decoder_style
from serving.text.tokenizer import Tokenizer
from tests.serving.conftest import metaspace_tokenizer

MULTILINGUAL = ["你好，世界。龘靐", "👩‍👩‍👧‍👦🏳️‍🌈 emoji 🎉🎉", "สวัสดีชาวโลก กำลัง", "naïve café", "ꦲꦏ꧀ࡀࡁ", "   spaces  "]
short = settings(max_examples=150)


@pytest.fixture(scope="module", params=["byte_level", "metaspace", "metaspace step"])
def tokenizer(request: pytest.FixtureRequest, byte_level_dir: Path, metaspace_dir: Path) -> Tokenizer:
    if request.param != "metaspace step":
        return Tokenizer.from_dir(byte_level_dir if request.param == "byte_level" else metaspace_dir)
    backend = metaspace_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    style = read_decoder_style({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Metaspace"}]})
    assert style.first_space is FirstSpace.ALL_DROPPED
    return Tokenizer(backend, style, num_embeddings=backend.get_vocab_size(), eos_token_ids=())


def splits(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=6)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def run(detokenizer: Detokenizer, pushes: list[list[int]]) -> tuple[str, str | None]:
    text = ""
    for ids in pushes:
        piece = detokenizer.push(ids)
        text += piece.text
        if piece.stop_string is not None:
            assert 1 <= piece.num_tokens_kept <= len(ids)
            return text, piece.stop_string
        assert piece.num_tokens_kept == len(ids)
    return text + detokenizer.flush(), None


@short
@given(data=st.data(), text=st.text() | st.sampled_from(MULTILINGUAL))
def test_any_text_in_any_split_equals_the_full_decode(tokenizer: Tokenizer, data: st.DataObject, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=data.draw(st.booleans()))
    skip = data.draw(st.booleans())
    pieces = splits(data.draw, ids)
    assert run(Detokenizer(tokenizer, [], skip_special_tokens=skip), pieces)[0] == tokenizer.decode(ids, skip)


@short
@given(data=st.data())
def test_any_ids_in_any_split_equal_the_full_decode(byte_level: Tokenizer, data: st.DataObject) -> None:
    """Invalid UTF-8, special tokens and ids without a token included."""
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=30))
    assert run(Detokenizer(byte_level, []), splits(data.draw, ids))[0] == byte_level.decode(ids)


@pytest.fixture(scope="module")
def byte_level(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


@pytest.mark.parametrize("text", MULTILINGUAL)
def test_no_piece_ends_in_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    so_far = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        so_far += detokenizer.push([token_id]).text
        assert "\ufffd" not in so_far and tokenizer.decode(tokenizer.encode(text)).startswith(so_far)
    assert detokenizer.flush() == ""


@short
@given(data=st.data(), text=st.text(alphabet="abc 你👩", max_size=20),
       stops=st.lists(st.text(alphabet="abc 你👩", min_size=1, max_size=4), min_size=1, max_size=3),
       include=st.booleans())
def test_stop_strings_cut_exactly_in_any_split(tokenizer: Tokenizer, data: st.DataObject, text: str, stops: list[str],
                                               include: bool) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    full = tokenizer.decode(ids)
    ends = [(full.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in full]
    expected, expected_stop = full, None
    if ends:
        end, _, expected_stop = min(ends)
        expected = full[:end] if include else full[:end - len(expected_stop)]
    detokenizer = Detokenizer(tokenizer, [], stops, include_stop_str_in_output=include)
    assert run(detokenizer, splits(data.draw, ids)) == (expected, expected_stop)


def test_text_is_held_only_while_it_may_be_a_stop_string(byte_level: Tokenizer) -> None:
    tokenizer = byte_level
    ids = {letter: tokenizer.encode(letter)[0] for letter in "abx"}
    detokenizer = Detokenizer(tokenizer, [], ["aab"])
    texts = [detokenizer.push([ids[letter]]).text for letter in "xaaax"]
    assert texts == ["x", "", "", "a", "aax"]
    assert detokenizer.push([ids["a"]]).text == "" and detokenizer.flush() == "a"


def test_tokens_after_the_stop_string_are_not_kept(byte_level: Tokenizer) -> None:
    tokenizer = byte_level
    ids = [tokenizer.encode(letter)[0] for letter in "xabyz"]
    piece = Detokenizer(tokenizer, [], ["ab"]).push(ids)
    assert (piece.text, piece.stop_string, piece.num_tokens_kept) == ("x", "ab", 3)


def test_stop_strings_within_min_tokens_do_not_count(byte_level: Tokenizer) -> None:
    tokenizer = byte_level
    ids = [tokenizer.encode(letter)[0] for letter in "aaaa"]
    assert run(Detokenizer(tokenizer, [], ["aa"], min_tokens=2), [ids]) == ("a", "aa")
    assert run(Detokenizer(tokenizer, [], ["aa"], min_tokens=9), [[token_id] for token_id in ids]) == ("aaaa", None)


def test_the_text_continues_the_prompts(metaspace_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(metaspace_dir)
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    prompt = tokenizer.encode("hello")
    assert run(Detokenizer(tokenizer, prompt), [ids])[0] == " hello world"
    assert run(Detokenizer(tokenizer, prompt[:1]), [ids])[0] == "hello world"       # only <s> before it


def test_a_character_begun_in_the_prompt_is_finished(byte_level: Tokenizer) -> None:
    tokenizer = byte_level
    ids = tokenizer.encode("𝄞!")
    assert run(Detokenizer(tokenizer, ids[:2]), [ids[2:]])[0] == "𝄞!"


def test_special_tokens_are_shown_when_asked_for(byte_level: Tokenizer) -> None:
    tokenizer = byte_level
    ids = tokenizer.encode("a<|im_end|>b")
    assert run(Detokenizer(tokenizer, []), [ids])[0] == "ab"
    assert run(Detokenizer(tokenizer, [], skip_special_tokens=False), [ids])[0] == "a<|im_end|>b"


def test_half_a_character_at_the_end_is_flushed(byte_level: Tokenizer) -> None:
    tokenizer = byte_level
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.push(tokenizer.encode("𝄞")[:2]).text == ""
    assert detokenizer.flush() == "\ufffd"
