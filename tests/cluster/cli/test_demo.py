"""The demo finds its checkpoint before anything starts."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli.demo import prepare_demo
from model.errors import CheckpointError
from serving.config import ConfigError, load_config

CONFIG = Path(__file__).parents[3] / "examples/demo.yaml"


def test_a_checkpoint_that_is_there_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "moesaic" / "SmolLM2-8x135M-Instruct"
    folder.mkdir(parents=True)
    prepared = prepare_demo(Console(file=io.StringIO()), load_config(CONFIG))
    assert prepared.model.path == str(folder)
    config = load_config(CONFIG)
    assert prepared.model_copy(update={"model": config.model}) == config       # nothing else has changed


@pytest.mark.parametrize("home", ["/proc/no-home", "/dev/null"])
def test_a_cache_that_cannot_be_written_to_is_named(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        prepare_demo(Console(file=io.StringIO()), load_config(CONFIG))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model.demo_checkpoint", "model.gguf_checkpoint"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf.*pip install 'moesaic\[demo\]'"):
        prepare_demo(Console(file=io.StringIO()), load_config(CONFIG))
