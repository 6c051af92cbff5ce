"""The bytes that tokens stand for agree with the tokenizers library, in each style of decoder."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import JsonValue
from tokenizers import decoders

from serving.text.token_bytes import DecoderStyle, FirstSpace, Style, TokenizerError, read_decoder_style

LLAMA: dict[str, Any] = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}


def _text(style: DecoderStyle, tokens: list[str]) -> str:
    contents = [style.bytes_of(token) for token in tokens]
    return (style.at_the_start(contents[0]) + b"".join(contents[1:])).decode(errors="replace")


@pytest.mark.parametrize("tokens", [["Hello", "Ġworld"], ["Ġ", "Ġa"], ["Ã¤", "!"], ["Ã", "¤"], ["<|é|>", "ĊĊ"]])
def test_byte_level_as_the_library(tokens: list[str]) -> None:
    style = read_decoder_style({"type": "ByteLevel"})
    assert style.style is Style.BYTE_LEVEL and _text(style, tokens) == decoders.ByteLevel().decode(tokens)


@pytest.mark.parametrize("tokens", [["▁Hello", "▁world"], ["▁", "▁a"], ["a", "<0xC3>", "<0xA4>", "b"], ["▁▁x"],
                                    ["<0x20>", "y"]])
def test_llamas_decoder_as_the_library(tokens: list[str]) -> None:
    style = read_decoder_style(LLAMA)
    theirs = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                decoders.Strip(" ", 1, 0)])
    assert _text(style, tokens) == theirs.decode(tokens)


@pytest.mark.parametrize(("scheme", "first_space"), [
    ("always", FirstSpace.ALL_DROPPED), ("first", FirstSpace.ALL_DROPPED), ("never", FirstSpace.KEPT)])
def test_metaspace_as_the_library(scheme: Any, first_space: FirstSpace) -> None:
    style = read_decoder_style({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme})
    assert style.first_space is first_space and not style.has_byte_tokens
    for tokens in (["▁Hello", "▁world"], ["▁▁x", "▁y"]):
        assert _text(style, tokens) == decoders.Metaspace("▁", scheme).decode(tokens)
    assert style.bytes_of("<0x41>") == b"<0x41>"


def test_without_a_decoder_tokens_are_words() -> None:
    assert _text(read_decoder_style(None), ["one", "two"]) == "one two"


@pytest.mark.parametrize(("decoder", "message"), [
    ({"type": "WordPiece"}, "has the decoder WordPiece"),
    ({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "CTC"}]}, r"Fuse \+ CTC"),
    ({"type": "Sequence", "decoders": ["Fuse"]}, "has the decoder None"),
    ("ByteLevel", "has the decoder None"), (7, "has the decoder None"),
    ({"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}, "known are plain strings"),
    ({"type": "Strip", "content": " ", "start": 2, "stop": 0}, "one space at the start")])
def test_other_decoders_are_refused_by_name(decoder: JsonValue, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        read_decoder_style(decoder)


@pytest.mark.parametrize("decoder", [{"type": ["ByteLevel"]}, {"type": {}}, 7, {"type": "Sequence", "decoders": [[]]}])
def test_a_decoder_of_a_wrong_type_is_named(decoder: JsonValue) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has the decoder"):
        read_decoder_style(decoder)
