"""A config that cannot be served is refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.coordinator.view import ClusterStatus, GroupPhase, RouterReport, View
from cluster.device.node import PortTakenError, listen
from cluster.launch.bring_up import BringUp, StartError, first_router, http_url, judge_model
from cluster.launch.cluster_client import ClusterClient
from model.errors import CheckpointError
from serving.config import ConfigError, ServeConfig, parse_config
from serving.text.token_bytes import TokenizerError
from tests.e2e.tiny_model import MAX_CONTEXT, write_checkpoint
from tests.ports import held_port


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


def test_a_kv_cache_that_holds_no_sequence_is_refused(checkpoint: Path) -> None:
    small = parse_config({"model": {"path": str(checkpoint)}, "pools": [{"kv_cache": "1KB"}]})
    with pytest.raises(ConfigError, match=r"kv_cache=1000 bytes, but one KV block takes"):
        judge_model(small)


def test_a_folder_that_only_other_nodes_see_is_theirs_to_judge(tmp_path: Path) -> None:
    elsewhere = config_of(tmp_path / "elsewhere")
    judge_model(elsewhere.model_copy(update={"local_nodes": ()}))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        judge_model(elsewhere)


@pytest.mark.parametrize(("address", "url"), [("[::1]:8000", "http://[::1]:8000/v"), ("a.b:80", "http://a.b:80/v")])
def test_urls_of_every_kind_of_host(tmp_path: Path, address: str, url: str) -> None:
    assert http_url(config_of(tmp_path).model_copy(update={"route_prefix": "/v/"}), address) == url


def test_clients_are_told_of_the_router_that_has_the_configured_port() -> None:
    routers = tuple(RouterReport(str(port), "n", f"[::1]:{port}", "[::1]:9000", 1, is_ready)
                    for port, is_ready in ((8002, True), (8000, False), (10_001, True), (8001, True)))
    status = ClusterStatus(View(GroupPhase.READY, None), (), routers)
    found = first_router(status)
    assert found is not None and found.http_address == "[::1]:8001"
    assert first_router(replace(status, routers=())) is None


def test_a_port_that_is_taken_is_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        for key in ("http_port", "proxy_port"):
            others = {"http_port": 0, "proxy_port": held_port(), key: taken.getsockname()[1]}
            up = BringUp(config_of(checkpoint).model_copy(update=others), tmp_path / "state", lambda progress: None)
            with pytest.raises(PortTakenError, match=f"set {key}"):
                up.run()


@pytest.mark.parametrize("host", ["[::1]", "", "http://a", "a b"])
def test_a_host_is_no_url(host: str) -> None:
    with pytest.raises(ConfigError, match="without brackets"):
        parse_config({"model": {"path": "x"}, "pools": [{}], "http_host": host})


def test_a_start_that_can_no_longer_be_followed_fails(checkpoint: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the answer is no status")
    monkeypatch.setattr(ClusterClient, "watch", broken)
    monkeypatch.setattr(ClusterClient, "is_deployed", lambda _: False)
    for name in ("connect", "deploy", "delete", "disconnect"):
        monkeypatch.setattr(ClusterClient, name, lambda *_: None)
    config = config_of(checkpoint).model_copy(update={"local_nodes": ()})
    up = BringUp(config, tmp_path / "state", lambda progress: None)
    with pytest.raises(StartError, match="could not be followed: .*the answer is no status"):
        up.run()
