"""The question of `moesaic plan`, read and checked: a model, a cluster that need not exist, a workload. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.planner.cache_plan import CacheSizes, divide_cache
from cluster.planner.costs.step_costs import Workload
from cluster.planner.memory_demand import DTYPE_BYTES, memory_demand, sequence_bytes
from cluster.planner.memory_plan import MemoryDemand
from cluster.planner.placement_plan import PlannedMember, PlanOptions
from cluster.whatif.cluster_file import num_devices, planned_members
from model.args import ModelArgs
from model.memory import state_slot_bytes, weights_bytes
from model.stored_bytes import stored_bytes
from serving.cluster_config import ClusterConfig, Dtype
from serving.config import ServeConfig
from serving.link.epoch import DeviceProfile


@dataclass(frozen=True, slots=True)
class PlanQuestion:
    model_name: str
    args: ModelArgs
    dtype: Dtype
    config: ServeConfig             # of it: what the memory demand depends on
    cluster: ClusterConfig
    workload: Workload
    options: PlanOptions
    measured: Mapping[str, DeviceProfile]   # by kind of node; the others go by data sheets

    @property
    def figures(self) -> Literal["measured", "data-sheet"]:
        """Say where the speeds of the devices are from; "measured" only when all are."""
        return "measured" if all(nodes.name in self.measured for nodes in self.cluster.nodes) else "data-sheet"

    def members(self, cluster: ClusterConfig) -> tuple[PlannedMember, ...]:
        return planned_members(cluster, self.args, self.dtype, self.measured)

    def demand(self, cluster: ClusterConfig) -> MemoryDemand:
        return memory_demand(self.args, self.config, num_devices(cluster))

    def cache_sizes(self, cache_bytes: int) -> CacheSizes:
        """Divide a member's cache as shards do, with the workload's context for placement.context_tokens."""
        placement = self.config.placement.model_copy(update={"context_tokens": self.workload.context_tokens})
        return divide_cache(self.args, self.config.model_copy(update={"placement": placement}), cache_bytes)

    @property
    def state_slot_bytes(self) -> int:
        """Return the bytes of one state slot; 0: no layer keeps a state."""
        return state_slot_bytes(self.args, DTYPE_BYTES[self.dtype])

    @property
    def stored_bytes(self) -> int:
        """Return the bytes in the checkpoint's files of the weights that are served."""
        return stored_bytes(self.args, [self.args.num_experts] * self.args.num_moe_layers)

    @property
    def loaded_bytes(self) -> int:
        """Return the bytes in memory of the same weights, one copy of each, in the dtype that the model runs in."""
        return weights_bytes(self.args, DTYPE_BYTES[self.dtype], [self.args.num_experts] * self.args.num_moe_layers)

    @property
    def sequence_bytes(self) -> int:
        """Return what one sequence of the workload takes while it runs."""
        return sequence_bytes(self.args, self.workload.context_tokens, DTYPE_BYTES[self.dtype])
