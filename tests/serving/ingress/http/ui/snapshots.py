"""A snapshot as a group of three members shows it."""

from __future__ import annotations

import numpy as np

from serving.engine.expert_load import ExpertLoad
from serving.ingress.http.ui.heat_map import holder_map, load_map
from serving.ingress.http.ui.request_rates import RequestRates
from serving.ingress.http.ui.snapshot import ChangeView, GroupView, MemberView, RequestsView, RouterView, Snapshot
from tests.placements import contiguous_placement

NODES = ("node-a", "node-b", "node-c")


def member_view(rank: int, node: str) -> MemberView:
    return MemberView(
        f"shard-{rank}", rank, node, "cpu", "AMD EPYC", "ready", False, 1_287 << 20, 1_400 << 20, 900 << 20, 200 << 20,
        0.25 * rank, num_running=3, num_waiting=1, request_share=1 / 3, num_expert_copies=8, tokens_per_s=80.0,
        step_s=0.012, own_over_profile=1.04, experts_over_profile=1.9 if rank == 2 else 1.02, emulated_speed=None,
        detail="")


def a_snapshot(num_tokens_per_s: float = 41.0, health: str = "healthy") -> Snapshot:
    rows_LE = np.arange(4 * 6, dtype=np.float32)
    change = ChangeView("members 1", "members", 1_700_000_000.0, "epoch 1 → 2: died shard-3 (resumed 90 ms)")
    group = GroupView(
        "tiny", "0.1.0", health, "", 2, 0, None, 0.011, 0.010, "shard-2", "its experts take 1.90 x as long", len(NODES),
        tuple(member_view(rank, node) for rank, node in enumerate(NODES)),
        (RouterView("r1", "node-a", "127.0.0.1:8000", True, 2),), (change,))
    rates = RequestRates(num_tokens_per_s, 0.09, 0.2, 0.025, 0.04)
    return Snapshot(group, RequestsView(1_700_000_100.0, 4, 3, 120, rates),
                    holder_map(contiguous_placement(4, 6, (2, 2, 2))), load_map(ExpertLoad(4, 6, rows_LE.tobytes())))
