from __future__ import annotations

from pathlib import Path

import pytest

from cluster.whatif.cluster_file import cluster_name, link_of, planned_members, with_more_nodes
from cluster.whatif.request import PlanRequest, read_question
from serving.cluster_config import ClusterConfig, load_cluster, parse_cluster
from serving.config import ConfigError
from tests.cluster.whatif.plan_questions import EXAMPLES, SMALL_MODEL

IDEAL = {"link_efficiency": 1.0}


def cluster(*nodes: dict[str, object], **options: object) -> ClusterConfig:
    return parse_cluster({"nodes": list(nodes), "assumed": IDEAL, **options})


@pytest.mark.parametrize("path", sorted((EXAMPLES / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_have_a_member_for_each_device_and_name_their_links_sources(path: Path) -> None:
    example = load_cluster(path)
    args = read_question(PlanRequest(SMALL_MODEL, path)).args
    members = planned_members(example, args, "bfloat16", {})
    assert len(members) == {"8xH100": 8, "4xH100-8xA100-40G": 12, "2xH100-4xA100-8xT4": 14, "two-vendors": 8}[path.stem]
    assert len({member.name for member in members}) == len(members)
    assert all(member.profile.source == "data-sheet" and member.profile.link for member in members)
    links = [example.link, *(nodes.link for nodes in example.nodes)]
    assert all(link.source for link in links if link) and any(links)


def test_a_budget_is_a_part_of_the_memory_or_what_the_file_says() -> None:
    given = cluster({"name": "a", "device": "t4"}, {"name": "b", "device": "t4", "memory_budget": "9GB",
                                                    "process_memory": "1GB"}, link={"bandwidth": 1e9})
    args = read_question(PlanRequest(SMALL_MODEL, EXAMPLES / "clusters/8xH100.yaml")).args
    first, second = planned_members(given, args, "bfloat16", {})
    assert first.memory.budget_bytes == int(16 * 2**30 * 0.9) and first.memory.resident_bytes == 0
    assert (second.memory.budget_bytes, second.memory.resident_bytes, second.pool) == (9 * 10**9, 10**9, "b")


def test_within_one_node_rows_go_by_the_devices_link() -> None:
    one = cluster({"name": "a", "device": "h100-sxm", "devices": 8}, link={"bandwidth": 1e9})
    link = link_of(one, one.nodes[0])
    assert link is not None and link.bytes_per_s == 450e9 and link.latency_s == 20e-6


def test_between_nodes_a_device_has_its_part_of_the_nodes_link() -> None:
    two = cluster({"name": "a", "device": "h100-sxm", "devices": 4, "count": 2},
                  link={"bandwidth": 200e9, "latency_s": 1e-3})
    link = link_of(two, two.nodes[0])
    assert link is not None and link.latency_s == 1e-3
    assert link.bytes_per_s == pytest.approx(200e9 / 4 / (4 / 7))       # 4 of the 7 others are on the other node


def test_a_slow_way_within_the_node_counts_when_it_is_the_slower_one() -> None:
    two = cluster({"name": "a", "device": "t4", "devices": 4, "count": 2}, link={"bandwidth": 1e15})
    link = link_of(two, two.nodes[0])
    assert link is not None and link.bytes_per_s == pytest.approx(16e9 / (3 / 7))


def test_vendors_that_share_no_collectives_meet_on_the_link_between_nodes() -> None:
    mixed = cluster({"name": "a", "device": "h100-sxm", "devices": 4}, {"name": "b", "device": "mi300x", "devices": 4},
                    link={"bandwidth": 40e9})
    for nodes in mixed.nodes:
        link = link_of(mixed, nodes)
        assert link is not None and link.bytes_per_s == pytest.approx(10e9)


def test_a_device_alone_has_no_link_and_devices_without_one_are_refused() -> None:
    alone = cluster({"name": "a", "device": "t4"})
    assert link_of(alone, alone.nodes[0]) is None
    bare = {"vendor": "x", "memory": 1, "read_bandwidth": 1, "flops": {"float32": 1}, "source": "s"}
    unlinked = cluster({"name": "a", "device": bare, "devices": 2})
    with pytest.raises(ConfigError, match="a has 2 devices a node and no link"):
        link_of(unlinked, unlinked.nodes[0])


def test_more_nodes_of_a_kind() -> None:
    two = cluster({"name": "a", "device": "t4", "devices": 2}, {"name": "b", "device": "t4"}, link={"bandwidth": 1e9})
    larger = with_more_nodes(two, "a", 3)
    assert [nodes.count for nodes in larger.nodes] == [4, 1]
    assert cluster_name(larger) == "8 x a + 1 x b"
