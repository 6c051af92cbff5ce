"""The doctor speaks of a device's speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.cli.doctor import Verdict, _checkpoint, _device_speed, _ports, speed_text
from cluster.device import profile as device_profile
from cluster.device import profile_store
from cluster.device.node import ReservedPort, listen
from cluster.device.profile import emulated
from serving.config import ServeConfig, parse_config
from serving.link.epoch import DeviceProfile
from tests.cluster.profiles import PROFILE
from tests.e2e.tiny_model import MAX_CONTEXT, write_checkpoint

CHECKPOINT = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "float32", "vocab_size": 64,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeConfig:
    (tmp_path / "config.json").write_text(json.dumps(CHECKPOINT))
    monkeypatch.setattr(profile_store, "default_profile_dir", lambda: tmp_path / "profiles")
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)     # of the test's process
    pools = [{"name": "fast"}, {"name": "slow", "emulated_speed": 0.25}]
    return parse_config({"model": {"path": str(tmp_path)}, "pools": pools})


def measured(monkeypatch: pytest.MonkeyPatch, profile: DeviceProfile) -> None:
    monkeypatch.setattr(device_profile, "_measure", lambda *_: (profile, {}))


def test_every_pool_is_shown_with_its_emulation_measured_or_kept(config: ServeConfig,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, PROFILE)
    fast, slow = _device_speed(config)
    assert fast.verdict is Verdict.OK and slow.verdict is Verdict.OK
    assert fast.found == ("pool fast: 20.0 GB/s, 20 / 150 / 200 GFLOP/s at 1 / 64 / 256 rows; repeats differ by 0.0%; "
                          "measured now")
    assert "pool slow: 5.0 GB/s, 5 / 38 / 50 GFLOP/s at 1 / 64 / 256 rows (emulated 0.25)" in slow.found
    assert slow.found.endswith("kept")


def test_a_noisy_machine_is_a_warning(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, replace(PROFILE, is_noisy=True, spread=0.081))
    check = next(_device_speed(config))
    assert check.verdict is Verdict.WARN and "repeats differ by 8.1%" in check.found and "stop them" in check.fix


def test_a_curve_that_ended_early_is_shown_as_far_as_it_goes() -> None:
    short = replace(PROFILE, gemm_flop_per_s=((1, 20e9), (4, 60e9), (16, 90e9)))
    assert speed_text(short) == "20.0 GB/s, 20 GFLOP/s at 1 rows"
    assert speed_text(emulated(short, 0.5)) == "10.0 GB/s, 10 GFLOP/s at 1 rows (emulated 0.5)"


def test_the_doctor_says_what_a_checkpoint_has_to_say(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").write_text('{"num_beams": 4}')
    found, note, weights = _checkpoint(parse_config({"model": {"path": str(tmp_path / "tiny")}, "pools": [{}]}))
    assert found.verdict is weights.verdict is Verdict.OK and f"{MAX_CONTEXT} tokens of context" in found.found
    assert note.verdict is Verdict.WARN and "num_beams=4 is not applied" in note.found and note.fix


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_ports_are_looked_at_where_they_will_be_opened(host: str) -> None:
    reserved, proxy = ReservedPort(host), ReservedPort(host)
    config = parse_config({"model": {"path": "x"}, "pools": [{}], "http_host": host, "http_port": reserved.port,
                           "proxy_port": proxy.port, "router": {"grpc_port": 0}})
    reserved.close()
    proxy.close()
    assert [check.verdict for check in _ports(config)] == [Verdict.OK] * 2
    for key in ("http_port", "proxy_port"):
        with listen(host, getattr(config, key)):
            (check,) = [check for check in _ports(config) if check.verdict is Verdict.FAIL]
        assert host in check.found and f"set {key}" in check.fix
