"""The cluster file of `moesaic plan`, validated: nodes by kind, their devices and links.

In the manner of config.py, and a file of its own because it describes machines that need not exist: nothing that runs
reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from serving.config import Options, check_options, read_keys
from serving.option_types import Bytes, parse_bytes

Dtype = Literal["bfloat16", "float16", "float32"]
Part = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


def parse_rate(text: object) -> float:
    """Read '3.35TB/s', '400 MB/s' or a plain number as bytes per second."""
    try:
        return float(parse_bytes(text.strip().removesuffix("/s") if isinstance(text, str) else text))
    except ValueError:
        raise ValueError(f"{text!r} is not a rate: write for example 900GB/s or a number of bytes per second") from None


BytesPerSecond = Annotated[float, BeforeValidator(parse_rate), Field(gt=0)]


class LinkFigures(Options):
    """Bandwidth and latency with which rows leave a device, or a node."""

    bandwidth: BytesPerSecond               # one direction
    latency_s: Seconds | None = None        # of one small collective; None: AssumedFigures
    source: str = ""


class DeviceFigures(Options):
    """Figures of one device, as its data sheet has them."""

    vendor: str                             # collectives of different vendors do not speak to each other
    memory: Bytes
    read_bandwidth: BytesPerSecond
    flops: Annotated[dict[Dtype, PositiveFloat], Field(min_length=1)]   # FLOP/s of dense matrix products
    link: LinkFigures | None = None         # to the other devices of its node; None: as between nodes
    source: str                             # document that the figures are from
    url: str = ""


class AssumedFigures(Options):
    """Figures that no data sheet has: shares of a peak, and times. They are assumed, not measured on these devices."""

    read_efficiency: Part = 0.8             # of read_bandwidth, while weights or KV cache are read
    flop_efficiency: Part = 0.6             # of flops, with many rows
    link_efficiency: Part = 0.86            # of a link's bandwidth; DeepEP's README has 43 of 50 GB/s between nodes
    layer_overhead_s: Seconds = 50e-6       # of one layer whatever its rows: launches, planning
    device_latency_s: Seconds = 20e-6       # of one small collective within a node
    node_latency_s: Seconds = 40e-6         # and between nodes
    memory_part: Part = 0.9                 # of a device's memory, where a node states no memory_budget
    start_s: Seconds = 20.0                 # of a replica until it begins to load, where a node states no ready_s
    load_bandwidth: BytesPerSecond = 2e9    # at which it then loads its weights


def _device_kind(value: object) -> str:
    return "kind" if isinstance(value, str) else "figures"


class NodesConfig(Options):
    """Nodes of one kind. Every device is one member."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    device: Annotated[Annotated[str, Tag("kind")] | Annotated[DeviceFigures, Tag("figures")],
                      Discriminator(_device_kind)]      # a kind that device_specs.py knows, or its figures
    count: PositiveInt = 1
    devices: PositiveInt = 1                # of each node
    memory_budget: Bytes | None = None      # of each device; None: AssumedFigures.memory_part of its memory
    process_memory: Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)] = 0   # of it, before anything is loaded
    link: LinkFigures | None = None         # leaving one node, shared by its devices; None: the cluster's
    ready_s: Seconds | None = None          # from the wish for a replica until it serves; None: AssumedFigures
    cost_per_hour: PositiveFloat = 1.0      # of each device, in any currency
    profile: str | None = None              # file of a device profile that a shard measured; its speeds count instead


class ClusterConfig(Options):
    """The whole file."""

    name: str = ""
    nodes: tuple[NodesConfig, ...]
    link: LinkFigures | None = None         # between nodes: what leaves one node, shared by its devices
    assumed: AssumedFigures = AssumedFigures()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if not self.nodes:
            raise ValueError("there are no nodes: name one kind at least")
        names = [kind.name for kind in self.nodes]
        if len(set(names)) != len(names):
            raise ValueError(f"node names {names} repeat: give every kind of node a name of its own")
        return self

    @model_validator(mode="after")
    def _nodes_are_linked(self) -> Self:
        lacking = [kind.name for kind in self.nodes if kind.link is None]
        if sum(kind.count for kind in self.nodes) > 1 and self.link is None and lacking:
            raise ValueError(f"there are several nodes, and no link between them is given for {lacking}: "
                             "add for example link: {bandwidth: 50GB/s}")
        return self


def load_cluster(path: str | os.PathLike[str]) -> ClusterConfig:
    """Read and check a cluster file. Raises ConfigError, which lists every wrong key with its fix."""
    return parse_cluster(read_keys(path, "cluster file", "a file in examples/clusters"), source=str(path))


def parse_cluster(content: Mapping[str, object], source: str = "cluster") -> ClusterConfig:
    """Check the content of a cluster file. Raises ConfigError."""
    return check_options(ClusterConfig, content, source, "cluster")
