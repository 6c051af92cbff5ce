"""Equal files, dtype and code have equal digests, and nothing else has."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from cluster.device.model_digest import code_version, model_digest
from serving.config import ModelConfig


def a_checkpoint(folder: Path, hidden_size: int = 8, shape: int = 4, num_bytes: int = 16) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden_size}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [shape], "data_offsets": [0, num_bytes]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    return folder


def digest(folder: Path, **options: object) -> str:
    return model_digest(ModelConfig.model_validate({"path": str(folder), **options}), folder)


def test_copies_on_different_nodes_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    first = digest(a_checkpoint(tmp_path / "a"))
    assert digest(a_checkpoint(tmp_path / "b")) == first
    assert [word.split("=")[0] for word in first.split()] == ["checkpoint", "revision", "dtype", "code"]


def test_whatever_changes_numbers_changes_it(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path / "a")
    several = {digest(folder), digest(a_checkpoint(tmp_path / "b", hidden_size=9)),
               digest(a_checkpoint(tmp_path / "c", shape=5)), digest(a_checkpoint(tmp_path / "d", num_bytes=20)),
               digest(folder, dtype="float32"), digest(folder, revision="v2")}
    assert len(several) == 6


def test_files_that_are_missing_or_broken_are_left_to_loading(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path / "a")
    whole = digest(folder)
    (folder / "model.safetensors").write_bytes(b"123")
    broken = digest(folder)
    (folder / "model.safetensors").unlink()
    assert len({whole, broken, digest(folder)}) == 3
    (folder / "model.safetensors.index.json").write_text("[]")
    digest(folder)


def test_a_hub_s_weights_need_not_be_here(tmp_path: Path) -> None:
    hub = ModelConfig(path="hf://owner/name")
    folder = a_checkpoint(tmp_path / "c0ffee")
    with_weights = model_digest(hub, folder)
    (folder / "model.safetensors").unlink()
    assert model_digest(hub, folder) == with_weights
    assert model_digest(hub, folder.rename(tmp_path / "c0ffe0")) != with_weights       # another commit


def test_the_code_counts(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "step.py").write_text("one")
    one = code_version(tmp_path)
    (tmp_path / "model" / "notes.txt").write_text("nothing that runs")
    assert code_version(tmp_path) == one
    (tmp_path / "model" / "step.py").write_text("two")
    assert code_version(tmp_path) != one
