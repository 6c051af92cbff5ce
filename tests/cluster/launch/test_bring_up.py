"""A config that cannot be served is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.launch.bring_up import BringUp, http_url, judge_model
from model.errors import CheckpointError
from serving.config import ConfigError, ServeConfig, parse_config
from serving.text.token_bytes import TokenizerError
from tests.e2e.tiny_model import MAX_CONTEXT, write_checkpoint


def config_of(folder: Path, **model: object) -> ServeConfig:
    return parse_config({"model": {"path": str(folder), **model}, "pools": [{}], "local_nodes": [{"name": "a"}]})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_up_starts_nothing_for_a_model_that_it_cannot_serve(checkpoint: Path, tmp_path: Path) -> None:
    judge_model(config_of(checkpoint))
    (checkpoint / "generation_config.json").write_text(json.dumps({"temperature": 2.5}))
    up = BringUp(config_of(checkpoint), tmp_path / "state", lambda progress: None)
    with pytest.raises(TokenizerError, match=r"temperature=2\.5"):
        up.run()
    assert not (tmp_path / "state").exists()


def test_a_length_beyond_the_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=f"set it to {MAX_CONTEXT} or less"):
        judge_model(config_of(checkpoint, max_model_len=MAX_CONTEXT + 1))


def test_a_folder_that_only_other_nodes_see_is_theirs_to_judge(tmp_path: Path) -> None:
    elsewhere = config_of(tmp_path / "elsewhere")
    judge_model(elsewhere.model_copy(update={"local_nodes": ()}))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        judge_model(elsewhere)


@pytest.mark.parametrize(("host", "url"), [("::1", "http://[::1]:8000/v"), ("::", "http://[::1]:8000/v"),
                                           ("0.0.0.0", "http://127.0.0.1:8000/v"), ("a.b", "http://a.b:8000/v")])
def test_urls_of_every_kind_of_host(tmp_path: Path, host: str, url: str) -> None:
    assert http_url(config_of(tmp_path).model_copy(update={"http_host": host, "route_prefix": "/v/"})) == url


@pytest.mark.parametrize("host", ["[::1]", "", "http://a", "a b"])
def test_a_host_is_no_url(host: str) -> None:
    with pytest.raises(ConfigError, match="without brackets"):
        parse_config({"model": {"path": "x"}, "pools": [{}], "http_host": host})
