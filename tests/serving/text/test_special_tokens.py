"""What a client writes is text, whatever it looks like; what the template writes stays special."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from serving.errors import InvalidRequestError
from serving.text.chat_template import ChatMessage, ToolCall
from serving.text.special_tokens import MAX_QUOTED, SpecialTokens
from serving.text.tokenizer import Tokenizer
from tests.serving.conftest import CHATML, byte_level_tokenizer, metaspace_tokenizer, write_json

WORDS = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|>", "<|", "</s>", "<s>", "<think>", " ", "\n", "a",
         "hi", "é", "😀", "0123456789012345"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)


def folder_of(folder: Path, kind: str) -> Path:
    tokenizer = byte_level_tokenizer() if kind == "byte_level" else metaspace_tokenizer()
    if kind == "metaspace":
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": CHATML, "eos_token": "<|im_end|>"})
    return folder


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    yield Tokenizer.from_dir(folder_of(tmp_path_factory.mktemp(request.param), request.param))


def special_ids(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(tokenizer.apply_chat_template([ChatMessage("user", text)]), add_special_tokens=False)
    return [tokenizer.token_name(token_id) for token_id in ids if token_id in tokenizer.special_token_ids]


@settings(max_examples=100)
@given(text=TEXTS)
def test_only_the_template_writes_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    found = [name for name in special_ids(tokenizer, text) if name != "<unk>"]
    assert found == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


@settings(max_examples=100)
@given(text=TEXTS)
def test_the_text_stays_as_it_is(tokenizer: Tokenizer, text: str) -> None:
    rendered = tokenizer.apply_chat_template([ChatMessage("user", text)])
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    plain = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    if tokenizer.decode(tokenizer.encode("<|im_end|>a", False), False) == "<|im_end|>a":    # else it adds spaces
        assert tokenizer.decode(ids, skip_special_tokens=False) == plain
    if not re.search(r"<\|im_(start|end)\|>|</?s>", text):
        assert (rendered, ids) == (plain, tokenizer.encode(plain, add_special_tokens=False))
    assert tokenizer.encode(plain.replace("<|im_end|>", "<|im_start|>")) != ids


def test_everything_of_a_client_is_quoted(folder_with: Callable[..., Path]) -> None:
    evil = "<|im_end|>"
    template = ("{{ bos_token }}{{ note }}{% for m in messages %}{{ m.content }}{{ m.name }}{{ m.reasoning }}"
                "{{ m.tool_call_id }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}{{ tools | tojson }}")
    tokenizer = Tokenizer.from_dir(folder_with(chat_template=template, bos_token="<|im_start|>"))
    message = ChatMessage("assistant", evil, evil, evil, (ToolCall(evil, {evil: [evil]}, evil),), evil)
    text = tokenizer.apply_chat_template([message], variables={"note": evil}, tools=[{"function": {evil: evil}}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [token_id for token_id in ids if token_id in tokenizer.special_token_ids] == [1]
    assert tokenizer.decode(ids, skip_special_tokens=False).count(evil) == 11


def test_an_error_of_a_template_shows_no_marks(folder_with: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_dir(folder_with(chat_template="{{ raise_exception('no: ' + messages[0].content) }}"))
    with pytest.raises(Exception, match=re.escape("no: a<|im_end|>b.")):
        tokenizer.apply_chat_template([ChatMessage("user", "a<|im_end|>b")])


def test_tokens_within_each_other_and_beside_windows() -> None:
    backend = byte_level_tokenizer()
    backend.add_special_tokens([AddedToken(token) for token in ("abc", "bcd", "ab", "x|y", "x", "x(", "x(1", "x(2)")])
    special = SpecialTokens(backend)
    for text in ("abcd", "ab", "x(2)x(1x|y", "x|x(3)", f"{'a' * (2**16 - 1)}bc{'<|im_end|>' * 9000}abc"):
        quoted = str(special.quote(text))
        ids = [*special.encode(quoted), *special.encode(quoted + "abc")]
        assert special.unquote(quoted) == text and backend.decode(ids, False) == f"{text}{text}abc"
        names = [backend.id_to_token(token_id) for token_id in ids]
        assert [name for name in names if name in ("abc", "bcd", "ab", "x|y", "x(1", "x(2)", "<|im_end|>")] == ["abc"]
    assert special.quote("a(b|c)d x") == "a(b|c)d x" and not special.is_quoted("abc")


def test_many_special_tokens_cost_little_to_look_for() -> None:
    """A pattern that tried each would read these 6 million characters a thousand times."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens([f"<|reserved_special_token_{number}|>" for number in range(1000)])
    special = SpecialTokens(backend)
    assert special.quote(text := "<|reserved_special_token_" * 250_000) == text


def test_so_many_that_they_would_cost_much_are_refused(folder_with: Callable[..., Path]) -> None:
    tokenizer, half = Tokenizer.from_dir(folder_with()), "<|im_end|>" * (MAX_QUOTED // 2)
    assert tokenizer.apply_chat_template([ChatMessage("user", half), ChatMessage("user", half)])
    with pytest.raises(InvalidRequestError, match="more than 16384 special tokens"):
        tokenizer.apply_chat_template([ChatMessage("user", half), ChatMessage("user", half + "<|im_end|>")])
