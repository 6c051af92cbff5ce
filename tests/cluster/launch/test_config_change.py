"""A start beside a service that runs says what differs, and what to do about it."""

from __future__ import annotations

from typing import Any

from cluster.launch.config_change import changes, what_to_do
from serving.config import ServeConfig, parse_config


def config(**values: Any) -> ServeConfig:
    pools = [{"name": "cpu", "replicas": 3}, {"name": "gpu"}]
    return parse_config({"model": {"path": "tiny"}, "pools": pools, **values})


def test_what_differs_is_named_with_both_values() -> None:
    given = config(model={"path": "tiny", "dtype": "float16"}, pools=[{"name": "gpu"}, {"name": "cpu", "replicas": 2}])
    assert sorted(map(str, changes(config(), given))) == [
        "model.dtype is bfloat16 there and float16 here", "pools.cpu.replicas is 3 there and 2 here"]
    assert changes(config(), config()) == ()


def test_a_pool_that_is_new_or_gone_is_a_change() -> None:
    alone = config(pools=[{"name": "cpu", "replicas": 3}])
    gone = changes(config(), alone)
    assert "pools.gpu.replicas is 1 there and None here" in map(str, gone) and "scale" not in what_to_do(gone)


def test_sizes_are_changed_while_it_serves_and_all_else_by_a_new_start() -> None:
    fewer = config(pools=[{"name": "cpu", "replicas": 2}, {"name": "gpu"}])
    assert what_to_do(changes(config(), fewer)) == "`moesaic scale cpu 2` changes a pool while it serves"
    other = config(pools=[{"name": "cpu", "replicas": 2}, {"name": "gpu"}], model={"path": "tiny", "revision": "b"})
    assert "moesaic scale cpu 2" in what_to_do(changes(config(), other))
    assert "`moesaic down`, then `moesaic up`" in what_to_do(changes(config(), other))
