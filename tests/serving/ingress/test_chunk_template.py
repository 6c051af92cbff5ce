"""A chunk from the template is the chunk that its model writes, byte for byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.ingress.chunk_template import _TEXT, ChunkTemplate, to_bytes
from serving.ingress.openai_responses import ChatChunk, ChatChunkChoice, ChatDelta, Completion, CompletionChoice


def completion(index: int, text: str, name: str = "m") -> Completion:
    return Completion(id="cmpl-1", created=7, model=name, system_fingerprint="f",
                      choices=[CompletionChoice(index=index, text=text)])


def named(index: int, text: str) -> Completion:
    return completion(index, text, name=f"1618033988 {_TEXT} 1618033988")


def chat(index: int, text: str) -> ChatChunk:
    choice = ChatChunkChoice(index=index, delta=ChatDelta(content=text))
    return ChatChunk(id="c", created=7, model='a "model" \\ \x00', system_fingerprint="f", choices=[choice])


@given(st.integers(0, 4095), st.text(st.characters(codec="utf-8"), min_size=1))
def test_both_write_the_same_bytes(index: int, text: str) -> None:
    for make in (completion, chat, named):
        assert ChunkTemplate(make).write(index, text) == to_bytes(make(index, text))


@pytest.mark.parametrize("text", ['"', "\\", "\n\r\t\b\f\x00\x1f\x7f", "</script>", "\u2028\u2029", "👩‍👩‍👧", "é"])
def test_letters_with_a_meaning_in_json(text: str) -> None:
    written = ChunkTemplate(completion).write(0, text)
    assert written == to_bytes(completion(0, text)) and json.loads(written)["choices"][0]["text"] == text
