from __future__ import annotations

from pathlib import Path

import pytest

from serving.cluster_config import load_cluster, parse_cluster
from serving.config import ConfigError

GIVEN = {"vendor": "x", "memory": "64GB", "read_bandwidth": "1.6TB/s", "flops": {"bfloat16": 320e12},
         "source": "a paper"}


def nodes(**changes: object) -> dict[str, object]:
    return {"nodes": [{"name": "a", "device": GIVEN, **changes}]}


def test_sizes_and_rates_have_units() -> None:
    cluster = parse_cluster({**nodes(memory_budget="60GiB"), "link": {"bandwidth": "50 GB/s"}})
    figures = cluster.nodes[0].device
    assert not isinstance(figures, str)
    assert (figures.memory, figures.read_bandwidth) == (64 * 10**9, 1.6e12)
    assert cluster.nodes[0].memory_budget == 60 * 2**30
    assert cluster.link is not None and cluster.link.bandwidth == 50e9


@pytest.mark.parametrize(("content", "named"), [
    (nodes(count=0), "nodes.0.count"), (nodes(devices=-1), "nodes.0.devices"),
    (nodes(memory_budget=0), "nodes.0.memory_budget"), (nodes(process_memory="-1GB"), "nodes.0.process_memory"),
    (nodes(colour="red"), "nodes.0.colour: unknown key"), (nodes(name="A b"), "nodes.0.name"),
    (nodes(device=GIVEN | {"read_bandwidth": float("nan")}), "read_bandwidth: nan is not a rate"),
    (nodes(device=GIVEN | {"read_bandwidth": 0}), "read_bandwidth"),
    (nodes(device=GIVEN | {"flops": {"bfloat16": float("inf")}}), "flops.bfloat16"),
    (nodes(device=GIVEN | {"flops": {}}), "flops"), (nodes(device=GIVEN | {"flops": {"int3": 1}}), "flops"),
    ({**nodes(), "link": {"bandwidth": "-5GB/s"}}, "link.bandwidth: '-5GB/s' is not a rate"),
    ({**nodes(), "assumed": {"read_efficiency": 1.5}}, "assumed.read_efficiency"),
    ({"nodes": []}, "there are no nodes"), ({}, "nodes"),
    ({"nodes": [{"name": "a", "device": "t4"}, {"name": "a", "device": "t4"}]}, "['a', 'a'] repeat"),
    (nodes(count=2), "no link between them is given for ['a']")])
def test_wrong_values_are_named(content: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_cluster(content)
    assert named in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.yaml").write_text("nodes: [")
    (tmp_path / "list.yaml").write_text("- a")
    for name in ("absent.yaml", "binary.yaml", "broken.yaml", "list.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_cluster(tmp_path / name)
