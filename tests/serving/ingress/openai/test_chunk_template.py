"""A chunk from the template is the chunk that its model writes, byte for byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.ingress.openai.answers import ChatChunk, ChatChunkChoice, ChatDelta, Completion, CompletionChoice
from serving.ingress.openai.chunk_template import _TEXT, ChunkTemplate, to_bytes


def completion(index: int, text: str, token_ids: list[int] | None = None, name: str = "m") -> Completion:
    return Completion(id="cmpl-1", created=7, model=name, system_fingerprint="f",
                      choices=[CompletionChoice(index=index, text=text, token_ids=token_ids)])


def named(index: int, text: str, token_ids: list[int] | None = None) -> Completion:
    return completion(index, text, token_ids, name=f"1618033988 {_TEXT} 1618033988 2718281828")


def chat(index: int, text: str, token_ids: list[int] | None = None) -> ChatChunk:
    choice = ChatChunkChoice(index=index, delta=ChatDelta(content=text), token_ids=token_ids)
    return ChatChunk(id="c", created=7, model='a "model" \\ \x00', system_fingerprint="f", choices=[choice])


@given(st.integers(0, 4095), st.text(st.characters(codec="utf-8"), min_size=1))
def test_both_write_the_same_bytes(index: int, text: str) -> None:
    for make in (completion, chat, named):
        assert ChunkTemplate(make).write(index, text) == to_bytes(make(index, text))


@given(st.integers(0, 4095), st.text(st.characters(codec="utf-8")), st.lists(st.integers(0, 2**32 - 1)))
def test_both_write_the_same_bytes_with_tokens(index: int, text: str, token_ids: list[int]) -> None:
    for make in (completion, chat, named):
        template = ChunkTemplate(make, shows_tokens=True)
        assert template.write(index, text, token_ids) == to_bytes(make(index, text, token_ids))


@pytest.mark.parametrize("text", ['"', "\\", "\n\r\t\b\f\x00\x1f\x7f", "</script>", "\u2028\u2029", "👩‍👩‍👧", "é"])
def test_letters_with_a_meaning_in_json(text: str) -> None:
    written = ChunkTemplate(completion).write(0, text)
    assert written == to_bytes(completion(0, text)) and json.loads(written)["choices"][0]["text"] == text
