"""The members that a cluster file describes: each device with its profile, memory and way to the others. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.planner.memory_demand import DTYPE_BYTES
from cluster.planner.memory_plan import MemberMemory
from cluster.planner.placement_plan import PlannedMember
from cluster.whatif.data_sheets import data_sheet_profile, device_figures
from model.args import ModelArgs
from serving.cluster_config import AssumedFigures, ClusterConfig, DeviceFigures, Dtype, LinkFigures, NodesConfig
from serving.config import ConfigError
from serving.link.epoch import DeviceProfile, Link


def planned_members(cluster: ClusterConfig, args: ModelArgs, dtype: Dtype, measured: Mapping[str, DeviceProfile],
                    ) -> tuple[PlannedMember, ...]:
    """Make one for each device, by kind in the file's order. `measured`: profiles by kind. Raises ConfigError."""
    members: list[PlannedMember] = []
    for nodes in cluster.nodes:
        figures = figures_of(nodes)
        profile = measured.get(nodes.name) or data_sheet_profile(args, dtype, DTYPE_BYTES[dtype], figures,
                                                                 cluster.assumed)
        profile = replace(profile, link=link_of(cluster, nodes))
        budget = nodes.memory_budget or int(figures.memory * cluster.assumed.memory_part)
        for index in range(nodes.count * nodes.devices):
            name = f"{nodes.name}-{index}"
            members.append(PlannedMember(name, profile, MemberMemory(name, budget, nodes.process_memory), nodes.name))
    return tuple(members)


def figures_of(nodes: NodesConfig) -> DeviceFigures:
    return nodes.device if isinstance(nodes.device, DeviceFigures) else device_figures(nodes.device)


def num_devices(cluster: ClusterConfig) -> int:
    return sum(nodes.count * nodes.devices for nodes in cluster.nodes)


def cluster_name(cluster: ClusterConfig) -> str:
    return cluster.name or " + ".join(f"{nodes.count * nodes.devices} x {nodes.name}" for nodes in cluster.nodes)


def vendors(cluster: ClusterConfig) -> tuple[str, ...]:
    return tuple(sorted({figures_of(nodes).vendor for nodes in cluster.nodes}))


def link_of(cluster: ClusterConfig, nodes: NodesConfig) -> Link | None:
    """Return the link of one device to all others, which get equal parts. None: it is alone. Raises ConfigError.

    What stays within the node and what leaves it travel at the same time. With several vendors no vendor's collectives
    work, and everything goes the way between nodes. Without a link between nodes they are linked as their devices are.
    """
    num_others = num_devices(cluster) - 1
    if not num_others:
        return None
    device_link, node_link = figures_of(nodes).link, nodes.link or cluster.link
    if device_link is None and node_link is None:
        raise ConfigError(f"{nodes.name} has {nodes.devices} devices a node and no link between them",
                          fix="add link: {bandwidth: ...} to the device's figures or to the file")
    if node_link is None:
        num_near = num_others
    else:
        num_near = nodes.devices - 1 if device_link is not None and len(vendors(cluster)) == 1 else 0
    ways: list[Link] = []
    if num_near and device_link is not None:
        ways.append(_way(device_link, num_near / num_others, cluster.assumed.device_latency_s, cluster.assumed))
    if num_near < num_others and node_link is not None:
        part = nodes.devices * (num_others - num_near) / num_others
        ways.append(_way(node_link, part, cluster.assumed.node_latency_s, cluster.assumed))
    return Link(max(way.latency_s for way in ways), min(way.bytes_per_s for way in ways))


def _way(link: LinkFigures, part: float, latency_s: float, assumed: AssumedFigures) -> Link:
    """Make a link by its figures. `part`: bytes over it for each byte that leaves the device."""
    return Link(link.latency_s if link.latency_s is not None else latency_s,
                link.bandwidth * assumed.link_efficiency / part)


def with_more_nodes(cluster: ClusterConfig, kind: str, num_more: int) -> ClusterConfig:
    nodes = tuple(entry.model_copy(update={"count": entry.count + num_more}) if entry.name == kind else entry
                  for entry in cluster.nodes)
    return cluster.model_copy(update={"nodes": nodes})
