"""Our tokenizer against transformers', on small tokenizers made on the spot."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from serving.errors import InvalidRequestError
from serving.text.generation_config import SamplingDefaults
from serving.text.token_bytes import TokenizerError
from serving.text.tokenizer import Tokenizer

TEXTS = ["", "hello world", "  two  spaces ", "你好，世界", "👩‍👩‍👧‍👦 family", "สวัสดี",
         "<|im_start|>user\nhi<|im_end|>", "a<think>b", "\n\t\x00", "é vs é", "</s> <s>x"]


@pytest.fixture(scope="module", params=["byte_level_dir", "metaspace_dir"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_ids_and_text_equal_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.special_token_ids == set(theirs.all_special_ids) | {
        token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special}


@given(text=st.text())
def test_any_text_equals_transformers(both: tuple[Tokenizer, AutoTokenizer], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, AutoTokenizer]:
    return Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("switches", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_bos_and_eos_switches_follow_transformers(folder_with: Callable[..., Path], switches: dict[str, bool]) -> None:
    folder = folder_with(bos_token="<|endoftext|>", **switches)
    assert Tokenizer.from_dir(folder).encode("hi") == AutoTokenizer.from_pretrained(folder).encode("hi")


def test_tokens_that_only_the_config_knows_are_added(folder_with: Callable[..., Path]) -> None:
    folder = folder_with(bos_token="<|new|>")
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a<|new|>b") == theirs.encode("a<|new|>b")
    assert ours.vocab_size == len(theirs)


def test_eos_ids_come_from_the_generation_config_first(byte_level_dir: Path, metaspace_dir: Path) -> None:
    assert Tokenizer.from_dir(byte_level_dir).eos_token_ids == (2, 0)
    assert Tokenizer.from_dir(metaspace_dir).eos_token_ids == (2,)


@pytest.mark.parametrize(("file", "ids"), [("generation_config.json", [2, 512]), ("generation_config.json", [-1]),
                                           ("generation_config.json", "<|im_end|>"), ("generation_config.json", [True]),
                                           ("tokenizer_config.json", "<|nowhere|>")])
def test_an_eos_that_the_model_cannot_draw_is_refused(folder_with: Callable[..., Path], file: str, ids: object) -> None:
    folder = folder_with()
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"eos_token_id" if file.startswith("gen") else "eos_token": ids}))
    if file.startswith("tok"):
        (folder / "config.json").write_text(json.dumps({"vocab_size": Tokenizer.from_dir(folder).vocab_size - 1}))
    with pytest.raises(TokenizerError, match="eos_token|end-of-sequence"):
        Tokenizer.from_dir(folder)


def test_an_eos_of_null_is_not_stated(folder_with: Callable[..., Path]) -> None:
    folder = folder_with(eos_token=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.from_dir(folder).eos_token_ids == (0,)             # config.json's
    (folder / "config.json").write_text('{"eos_token_id": null, "vocab_size": 512}')
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.eos_token_ids == () and "no end-of-sequence token" in tokenizer.notes[0].found


@pytest.mark.parametrize(("settings", "found"), [
    ({"chat_template": None}, "no chat template"),
    ({"chat_template": [{"name": "tools", "template": "x"}]}, "no chat template"),
    ({"chat_template": "{{ bos_token }}{{ messages[0].content }}"}, "writes bos_token, which is not set"),
    ({"chat_template": "{{ messages[0].tool.name }}"}, "one user message is refused")])
def test_what_people_should_know_is_noted(folder_with: Callable[..., Path], settings: dict[str, object],
                                          found: str) -> None:
    notes = Tokenizer.from_dir(folder_with(**settings)).notes
    assert len(notes) == 1 and found in notes[0].found and notes[0].fix


def test_tokens_without_an_embedding_are_noted(folder_with: Callable[..., Path]) -> None:
    folder = folder_with(pad_token="<|pad|>")
    (folder / "config.json").write_text(json.dumps({"vocab_size": Tokenizer.from_dir(folder).vocab_size - 1}))
    assert "1 tokens, '<|pad|>' the first" in Tokenizer.from_dir(folder).notes[0].found
    assert Tokenizer.from_dir(folder_with()).notes == ()


@pytest.mark.parametrize("entries", [{"x": {"content": "a"}}, {"7": {}}, {"7": "a"}, {"7": {"content": 1}}])
def test_wrong_added_tokens_are_named(folder_with: Callable[..., Path], entries: object) -> None:
    with pytest.raises(TokenizerError, match="added_tokens_decoder has"):
        Tokenizer.from_dir(folder_with(added_tokens_decoder=entries))


def test_sampling_defaults_come_from_the_generation_config(byte_level_dir: Path, metaspace_dir: Path) -> None:
    expected = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20)
    assert Tokenizer.from_dir(byte_level_dir).sampling_defaults == expected
    assert Tokenizer.from_dir(metaspace_dir).sampling_defaults == SamplingDefaults()


def test_number_of_embeddings_is_the_models(byte_level_dir: Path, metaspace_dir: Path) -> None:
    assert Tokenizer.from_dir(byte_level_dir).num_embeddings == 512
    assert Tokenizer.from_dir(metaspace_dir).num_embeddings == Tokenizer.from_dir(metaspace_dir).vocab_size


def test_token_text_shows_parts_of_characters_as_bytes(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir)
    ids = tokenizer.encode("𝄞")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "𝄞".encode()
    assert tokenizer.token_text(ids[0]).startswith("bytes:\\x")
    assert tokenizer.token_bytes(10**6) == b""


def test_missing_and_broken_files_are_named(tmp_path: Path, byte_level_dir: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(TokenizerError, match=r"config\.json is not valid JSON"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"[]", b"7", b'"x"', b"null", b"\xff", b"", b"[" * 100_000, None])
def test_files_beside_the_tokenizer_are_objects_or_named(tmp_path: Path, byte_level_dir: Path, name: str,
                                                         content: bytes | None) -> None:
    """None: there is a folder of that name."""
    (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"{name} .*fetch it again"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("config.json", {"vocab_size": 10**30}, "vocab_size"), ("config.json", {"vocab_size": 0}, "vocab_size"),
    ("config.json", {"vocab_size": "512"}, "vocab_size"), ("config.json", {"vocab_size": True}, "vocab_size"),
    ("tokenizer_config.json", {"eos_token": "\ud800"}, "is no text"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "\ud800"}}}, "is no text")])
def test_wrong_values_beside_the_tokenizer_are_named(tmp_path: Path, byte_level_dir: Path, name: str,
                                                     content: dict[str, object], message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=rf"{name}: .*{message}"):
        Tokenizer.from_dir(tmp_path)


def test_unknown_decoder_is_refused_by_name(tmp_path: Path, byte_level_dir: Path) -> None:
    content = json.loads((byte_level_dir / "tokenizer.json").read_text()) | {"decoder": {"type": "CTC", "pad_token": "",
                         "word_delimiter_token": "|", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="CTC"):
        Tokenizer.from_dir(tmp_path)


def test_a_checkpoint_without_a_template_says_what_to_do(metaspace_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no chat template.*chat_template\.jinja"):
        Tokenizer.from_dir(metaspace_dir).apply_chat_template([])


def test_encoding_a_long_text_lets_other_threads_run(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir)
    thread = threading.Thread(target=tokenizer.encode, args=("hello world " * 30_000,))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    thread.join()
    assert turns > 100


@settings(max_examples=200)
@given(words=st.lists(st.sampled_from(["hello", " ", "\n", "é", "x", "  ", "世界", "0123456789", "<|im_end|>"]),
                      max_size=60),
       number=st.integers(0, 80), window=st.integers(17, 60))
@pytest.mark.parametrize("style", ["byte_level_dir", "metaspace_dir"])
def test_a_text_is_said_to_be_long_only_when_it_is(style: str, request: pytest.FixtureRequest, words: list[str],
                                                   number: int, window: int) -> None:
    tokenizer = Tokenizer.from_dir(request.getfixturevalue(style))
    text = "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.text.tokenizer._WINDOW", window)
        if tokenizer.has_more_tokens(text, number):
            assert len(tokenizer.encode(text, False)) > number


def test_a_long_text_is_found_out(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir)
    assert tokenizer.has_more_tokens("~x" * 40_000, 20_000)
    assert not tokenizer.has_more_tokens("~x" * 40_000, 80_000)


def test_prompts_share_their_ids(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir)
    one, other = (tokenizer.shared_ids([int("400"), -1, 10**9]) for _ in range(2))
    assert one == (400, -1, 10**9) and one[0] is other[0]
