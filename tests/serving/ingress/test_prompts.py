"""Prompts become token ids at a bounded cost."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path

import pytest

from serving.errors import ContextLengthError, InvalidRequestError
from serving.ingress import prompts as prompts_module
from serving.ingress.prompts import Conversation, PromptEncoder, Text, TokenIds
from serving.router.request_checks import LengthLimit
from serving.text.chat_template import ChatMessage
from serving.text.tokenizer import Tokenizer

LIMIT = LengthLimit(1000, "this model's maximum context length is 1000 tokens")


@pytest.fixture(scope="module")
def tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


async def test_each_prompt_as_the_tokenizer_says(tokenizer: Tokenizer) -> None:
    texts = ["a", "hello world " * 300, "naïve"]
    encoded = await PromptEncoder(tokenizer).encode([*map(Text, texts), TokenIds((5, 6))], LIMIT)
    assert encoded == [*(tuple(tokenizer.encode(text)) for text in texts), (5, 6)]


@pytest.mark.parametrize(("prompt", "param"), [
    (Text("x~" * 2_000_000), "prompt"),
    (Text("the " * 1_000_000), "prompt"),
    (Conversation((ChatMessage("user", "x~" * 1_000_000),)), "messages"),
    (Text("word " * 200_000), "prompt")], ids=["random", "words", "chat", "long"])
async def test_a_text_that_cannot_fit_costs_a_window_of_it(tokenizer: Tokenizer, prompt: Text | Conversation,
                                                           param: str) -> None:
    tracemalloc.start()
    with pytest.raises(ContextLengthError, match="1000 tokens. However, your prompt has more than 1000") as refused:
        await PromptEncoder(tokenizer).encode([prompt], LIMIT)
    assert refused.value.param == param
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8_000_000       # a chat's template writes its text once


async def test_the_tokens_of_all_prompts_are_bounded_together(tokenizer: Tokenizer,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "MAX_TOKEN_IDS", 1500)
    encoder = PromptEncoder(tokenizer)
    assert len(await encoder.encode([Text("~" * 700)] * 2, LIMIT)) == 2
    with pytest.raises(InvalidRequestError, match="more than 1500 tokens together"):
        await encoder.encode([Text("~" * 700)] * 3, LIMIT)


@pytest.mark.parametrize("prompts", [
    [Text("a ~" * 5000)], [Text("a")] * 100, [Conversation((ChatMessage("user", "a"),) * 100)]],
    ids=["long", "prompts", "messages"])
async def test_what_takes_long_runs_beside_the_loop(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch,
                                                    prompts: list[Text | Conversation]) -> None:
    loops = []

    def note(*args: object) -> list[tuple[int, ...]]:
        try:
            loops.append(asyncio.get_running_loop())
        except RuntimeError:
            loops.append(None)
        return []

    encoder = PromptEncoder(tokenizer)
    monkeypatch.setattr(encoder, "_encode_all", note)
    await encoder.encode(prompts, LIMIT)
    assert loops == [None]
    await encoder.encode([Text("a")], LIMIT)
    assert loops[1] is asyncio.get_running_loop()
