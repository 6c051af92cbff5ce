"""Notes that a reader of a plan must know of its figures. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.whatif.cluster_file import figures_of, vendors
from cluster.whatif.data_sheets import compute_dtype
from cluster.whatif.question import PlanQuestion
from serving.cluster_config import AssumedFigures, ClusterConfig


def notes(question: PlanQuestion) -> tuple[str, ...]:
    cluster = question.cluster
    return (*_device_notes(question), *_link_notes(cluster), _assumed_note(cluster.assumed))


def _device_notes(question: PlanQuestion) -> Iterator[str]:
    dtype = question.dtype
    for nodes in question.cluster.nodes:
        if nodes.name in question.measured:
            yield f"{nodes.name}: speeds as measured, in {nodes.profile}"
            continue
        figures = figures_of(nodes)
        computed_in = compute_dtype(figures, dtype)
        yield (f"{nodes.name}, data sheet: {figures.memory / 2**30:g} GiB, {figures.read_bandwidth / 1e12:g} TB/s, "
               f"{figures.flops[computed_in] / 1e12:g} TFLOP/s; {figures.source}")
        if computed_in != dtype:
            yield f"{nodes.name}: no {dtype} in its matrix units, counted as computing in {computed_in}"


def _link_notes(cluster: ClusterConfig) -> Iterator[str]:
    if len(vendors(cluster)) > 1:
        yield (f"{' and '.join(vendors(cluster))} share no collectives: all rows go by the link between nodes, also "
               "those that stay within one")
    for name, link in (("", cluster.link), *((f" of {nodes.name}", nodes.link) for nodes in cluster.nodes)):
        if link is not None:
            yield (f"link between nodes{name}: {link.bandwidth / 1e9:g} GB/s for all devices of a node"
                   f"{'; ' + link.source if link.source else ''}")


def _assumed_note(assumed: AssumedFigures) -> str:
    return (f"assumed, not measured: {assumed.read_efficiency:.0%} of read bandwidth, {assumed.flop_efficiency:.0%} of "
            f"FLOP/s and {assumed.link_efficiency:.0%} of links are reached; beside its work a layer costs "
            f"{assumed.layer_overhead_s * 1e6:g} us, a small collective {assumed.device_latency_s * 1e6:g} us within a "
            f"node and {assumed.node_latency_s * 1e6:g} us between nodes")
