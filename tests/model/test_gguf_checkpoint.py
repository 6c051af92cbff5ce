from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from model.errors import CheckpointError, UnknownArchitectureError
from model.gguf_checkpoint import GgufCheckpoint
from tests.model import tiny_gguf


def test_tensors_have_hugging_face_names_and_row_order(tmp_path: Path) -> None:
    weights = tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    layer = GgufCheckpoint(tmp_path / "tiny.gguf").layer_tensors(1, torch.float32)
    assert len(layer) == 9
    for ours, theirs in {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}.items():
        expected = torch.from_numpy(weights[f"blk.1.{theirs}.weight"])
        assert torch.equal(layer[f"model.layers.1.{ours}.weight"], expected), ours


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    weight = torch.linspace(-1, 1, 64 * 32).reshape(64, 32).numpy()
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
        writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
        tiny_gguf.write_metadata(writer)
        writer.add_tensor("token_embd.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read = GgufCheckpoint(tmp_path / "q.gguf").shared_tensors(torch.float32)["model.embed_tokens.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))
        assert read.shape == (64, 32)
        assert torch.equal(read, expected)


def test_config_is_the_original_one(tmp_path: Path) -> None:
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    config = GgufCheckpoint(tmp_path / "tiny.gguf").llama_config()
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert (config["head_dim"], config["num_key_value_heads"], config["vocab_size"]) == (8, 2, len(tiny_gguf.TOKENS))


def test_tokenizer_splits_digits_and_gives_text_back(tmp_path: Path) -> None:
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    tokenizer = GgufCheckpoint(tmp_path / "tiny.gguf").tokenizer()
    text = "a 123 the<|im_end|> 世界\r\n  x"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoding.ids) == text.replace("<|im_end|>", "")
    assert encoding.tokens[:6] == ["a", "Ġ", "1", "2", "3", "Ġthe"]
    assert tokenizer.token_to_id("<|im_end|>") in encoding.ids


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnknownArchitectureError, match="bert"):
        GgufCheckpoint(tmp_path / "other.gguf")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny_gguf.write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match=r"blk\.2\.attn_norm"):
        GgufCheckpoint(tmp_path / "tiny.gguf").layer_tensors(2, torch.float32)
