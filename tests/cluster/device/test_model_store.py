from __future__ import annotations

from pathlib import Path

import pytest

from cluster.device.model_store import locate_checkpoint
from model.errors import CheckpointError
from serving.config import ModelConfig


def test_a_folder_with_a_config_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate_checkpoint(ModelConfig(path=str(tmp_path)), "all") == tmp_path


@pytest.mark.parametrize(("path", "message"), [
    ("/no/such/folder", "no config.json is there"), ("s3://bucket/model", "unknown scheme 's3'")])
def test_what_is_not_there_is_named(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        locate_checkpoint(ModelConfig(path=path), "facts")
