"""A model is judged with the options that serve it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from model.errors import CheckpointError
from serving.config import ConfigError, ModelConfig
from serving.served_model import read_served_model
from serving.text.chat_template import ChatTemplateError
from serving.text.token_bytes import TokenizerError
from tests.model.conftest import CONFIG

MODEL: dict[str, object] = CONFIG | {"vocab_size": 512, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.fixture
def model_with(folder_with: Callable[..., Path]) -> Callable[..., Path]:
    """model_with({"config.json": {...}}) -> a folder with keys of its files changed."""
    def make(files: dict[str, dict[str, object]]) -> Path:
        folder = folder_with()
        for name in ("config.json", *files):
            content = MODEL if name == "config.json" else json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | files.get(name, {})))
        return folder
    return make


def test_a_whole_one_has_nothing_to_say(model_with: Callable[..., Path]) -> None:
    served = read_served_model(model_with({}), ModelConfig(path="x"))
    assert (served.max_model_len, served.notes, served.args.num_experts) == (512, (), 4)


def test_the_length_asked_for_is_served_or_refused(model_with: Callable[..., Path]) -> None:
    folder = model_with({"config.json": {"rope_scaling": YARN}})
    for asked, served in ((None, 2048), (2048, 2048), (600, 600)):
        assert read_served_model(folder, ModelConfig(path="x", max_model_len=asked)).max_model_len == served
    with pytest.raises(ConfigError, match=r"max_model_len=2049 .* set it to 2048 or less"):
        read_served_model(folder, ModelConfig(path="x", max_model_len=2049))


@pytest.mark.parametrize(("file", "keys", "kind"), [
    ("config.json", {"rope_theta": 0}, CheckpointError),
    ("generation_config.json", {"temperature": 2.5}, TokenizerError),
    ("generation_config.json", {"top_p": 1.5}, TokenizerError),
    ("generation_config.json", {"repetition_penalty": 2.5}, TokenizerError),
    ("generation_config.json", {"eos_token_id": [600]}, TokenizerError),
    ("tokenizer_config.json", {"chat_template": "{% if %}"}, ChatTemplateError)])
def test_what_would_fail_with_each_request_fails_here(model_with: Callable[..., Path], file: str,
                                                      keys: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        read_served_model(model_with({file: keys}), ModelConfig(path="x"))
