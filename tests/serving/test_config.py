"""Every user option is checked where the file is read; errors name the key and what to write instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import (
    MAX_CONTEXT_TOKENS,
    ConfigError,
    ModelConfig,
    SchedulerConfig,
    ServeConfig,
    load_config,
    parse_config,
)
from serving.option_types import parse_bytes

SMALLEST: dict[str, Any] = {"model": {"path": "/models/tiny/"}, "pools": [{}]}


@pytest.mark.parametrize(("text", "num_bytes"), [
    (1, 1), ("1", 1), ("1.5GiB", 3 * 2**29), (" 900 MB ", 900 * 10**6), ("2kib", 2048), ("0.5 tb", 5 * 10**11),
    (7.9, 7)])
def test_sizes_are_read(text: object, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1 Gib B", "1,5GB", "1pb", True, None, ["1"], "nan",
                                  float("inf")])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        parse_bytes(text)


def test_the_smallest_config_has_defaults_that_fit() -> None:
    config = parse_config(SMALLEST)
    assert config.model.served_name == "tiny" and config.num_members == 1 and config.http_port == 8000
    assert config.scheduler.max_batch_tokens >= config.scheduler.max_running_requests


def test_a_group_of_a_fixed_size_cannot_follow_the_load() -> None:
    assert parse_config(SMALLEST | {"autoscaling": {"ttft_slo_s": 1}}).autoscaling is not None
    with pytest.raises(ConfigError, match=r"autoscaling with group.members=4: the group could never have more"):
        parse_config(SMALLEST | {"autoscaling": {}, "group": {"members": 4}})


def test_members_are_all_replicas_unless_said() -> None:
    pools = [{"name": "a", "replicas": 2}, {"name": "b", "replicas": 3}]
    assert parse_config(SMALLEST | {"pools": pools}).num_members == 5
    assert parse_config(SMALLEST | {"pools": pools, "group": {"members": 4}}).num_members == 4


def test_a_start_needs_no_more_replicas_than_there_are() -> None:
    pool = {"name": "a", "replicas": 2}
    assert parse_config(SMALLEST | {"pools": [pool]}).pools[0].least_replicas == 2
    assert parse_config(SMALLEST | {"pools": [pool | {"min_replicas": 1}]}).pools[0].least_replicas == 1
    with pytest.raises(ConfigError, match="pool a: min_replicas=3 is above replicas=2"):
        parse_config(SMALLEST | {"pools": [pool | {"min_replicas": 3}]})


def test_a_name_goes_before_the_last_part_of_the_path() -> None:
    assert ModelConfig(path="hf://owner/model").served_name == "model"
    assert ModelConfig(path="hf://owner/model", name="mine").served_name == "mine"


def test_the_context_is_the_checkpoints_or_less() -> None:
    assert ModelConfig(path="m").context_length(4096) == 4096
    assert ModelConfig(path="m").context_length(2**40) == MAX_CONTEXT_TOKENS
    assert ModelConfig(path="m", max_model_len=512).context_length(4096) == 512
    with pytest.raises(ConfigError, match="max_model_len=4097 is above the checkpoint's 4096.*set it to 4096 or less"):
        ModelConfig(path="m", max_model_len=4097).context_length(4096)
    with pytest.raises(ConfigError, match="no room for an answer"):
        ModelConfig(path="m").context_length(1)


@pytest.mark.parametrize(("change", "message"), [
    ({"modle": {}}, "modle: unknown key"),
    ({"model": {}}, "model.path: Field required"),
    ({"pools": []}, "pools: .*at least 1"),
    ({"pools": [{"name": "a"}, {"name": "a"}]}, r"pool names \['a', 'a'\] repeat"),
    ({"pools": [{"name": "Not a name"}]}, "pools.0.name"),
    ({"pools": [{"memory_budget": "much"}]}, "pools.0.memory_budget: 'much' is not a size"),
    ({"pools": [{"memory_budget": 0}]}, "pools.0.memory_budget: .*greater than 0, got 0"),
    ({"pools": [{"emulated_speed": 1.5}]}, "pools.0.emulated_speed"),
    ({"pools": [{"num_cpus": float("nan")}]}, "pools.0.num_cpus"),
    ({"scheduler": {"max_batch_tokens": 10, "max_running_requests": 11}}, "max_batch_tokens=10 is below .*11"),
    ({"scheduler": {"block_size": 17}}, "scheduler.block_size"),
    ({"http_host": "0.0.0.0"}, "can be reached from other machines, and anybody may ask"),
    ({"http_host": "::"}, "access.keys"), ({"http_host": "node-1"}, "access.open_to_network"),
    ({"access": {"database": "mysql://host/x"}}, "access.database: 'mysql' is not known"),
    ({"access": {"database": "sqlite:///here.db"}}, "access.database"),
    ({"access": {"database": "postgresql://u:hidden@h/d"}}, "access.database: leave the password out"),
    ({"access": {"database": "postgresql://h/d?password=hidden"}}, "access.database: leave the password out"),
    ({"http_port": -1}, "http_port: .*got -1"), ({"proxy_port": 0}, "proxy_port: .*got 0"),
    ({"proxy_port": 8000}, "among the ports of the routers, from http_port=8000"),
    ({"proxy_port": 9001, "router": {"replicas": 2}}, "from router.grpc_port=9000"),
    ({"http_port": 65536}, "http_port"),
    ({"route_prefix": "v1"}, "route_prefix"),
    ({"placement": {"min_copies": 3}}, "placement.min_copies")])
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(SMALLEST | change, source="my.yaml")
    assert "hidden" not in str(error.value)
    assert str(error.value).startswith("my.yaml has 1 wrong value(s):") and re.search(message, str(error.value))


@pytest.mark.parametrize("change", [
    {"http_host": "127.0.0.2"}, {"http_host": "::1"}, {"http_host": "localhost"},
    {"http_host": "0.0.0.0", "access": {"keys": True, "database": "postgresql://u@h/d"}},
    {"http_host": "0.0.0.0", "access": {"open_to_network": True}}])
def test_who_may_ask_is_said_where_others_can_reach_the_door(change: dict[str, Any]) -> None:
    parse_config(SMALLEST | change)


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector", "http://user:secret@collector"])
def test_a_collector_has_a_url_without_a_password(endpoint: str) -> None:
    assert parse_config(SMALLEST | {"tracing": {"endpoint": "https://collector:4317/otlp"}}).tracing is not None
    with pytest.raises(ConfigError, match="tracing.endpoint: String should match"):
        parse_config(SMALLEST | {"tracing": {"endpoint": endpoint}})


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"config has 2 wrong value\(s\)"):
        parse_config({"model": {"path": 7}, "pools": [{"replicas": 0}]})


@pytest.mark.parametrize(("content", "message"), [
    (b"model: [", "is not valid YAML"), (b"a: 2026-13-45", "is not valid YAML"), (b"[" * 10_000, "is not valid YAML"),
    (b"- a\n- b\n", "holds list, not keys"), (b"", "holds NoneType, not keys"),
    (b"\xff\xfe\x00", "cannot read config|is not valid YAML")])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config .*No such file"):
        load_config(tmp_path / "none.yaml")


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SchedulerConfig().block_size = 32       # type: ignore[misc]


def test_the_example_is_valid() -> None:
    assert isinstance(load_config(Path(__file__).parents[2] / "examples/demo.yaml"), ServeConfig)
