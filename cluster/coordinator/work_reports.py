"""Keeps what a group's members report of their work: the rows of every expert, and their seconds over the profile's.

L MoE layers, E experts of a layer
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import numpy as np

from cluster.planner.costs.measured_profile import corrected
from model.arrays import FloatArray
from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, Member, WorkRatio

MIN_ROWS_PER_EXPERT = 20.0  # that must have been counted before a placement is changed for them


class WorkReports:
    """Keeps the latest report of each shard, and answers for the members of the epoch that it is asked about."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        self._loads: dict[str, ExpertLoad] = {}             # by shard id
        self._ratios: dict[str, WorkRatio | None] = {}

    def add(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None:
        self._loads[shard_id], self._ratios[shard_id] = load, ratio

    def forget_others(self, shard_ids: Container[str]) -> None:
        for shard_id in [shard_id for shard_id in self._loads if shard_id not in shard_ids]:
            del self._loads[shard_id], self._ratios[shard_id]

    def load(self, epoch: Epoch | None) -> ExpertLoad:
        """Return the load of all members together."""
        return ExpertLoad(*self._shape, self._rows(epoch).astype(np.float32).tobytes())

    def counted(self, epoch: Epoch | None) -> FloatArray | None:
        """Return the rows [L, E] of all members; None while too little was counted to say anything."""
        rows_LE = self._rows(epoch)
        enough = MIN_ROWS_PER_EXPERT * rows_LE.shape[1]
        return rows_LE if rows_LE.size and float(rows_LE.sum(axis=1).min()) >= enough else None

    def ratios(self, epoch: Epoch) -> tuple[WorkRatio | None, ...]:
        """Return the ratios by rank; None: too little was timed."""
        return tuple(self._ratios.get(member.shard_id) for member in epoch.members)

    def as_measured(self, epoch: Epoch, reported: Mapping[str, Member]) -> Epoch:
        """Return the epoch with what its members have measured since it began: their link, and the time of their work.

        reported: by shard id, the members as they are now.
        """
        now = [reported.get(member.shard_id, member) for member in epoch.members]
        return replace(epoch, members=tuple(
            replace(member, profile=corrected(member.profile, ratio, len(now))) if member.profile else member
            for member, ratio in zip(now, self.ratios(epoch), strict=True)))

    def _rows(self, epoch: Epoch | None) -> FloatArray:
        total_LE = np.zeros(self._shape)
        members = {member.shard_id for member in epoch.members} if epoch else set()
        for shard_id, load in self._loads.items():
            if shard_id in members and load.rows().shape == total_LE.shape:
                total_LE += load.rows()
        return total_LE
