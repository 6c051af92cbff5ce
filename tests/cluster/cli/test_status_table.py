"""The table of `moesaic status` on a terminal of 80 columns, and its JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from cluster.cli.shard_rows import expert_ranges
from cluster.cli.status_table import StatusView, status_json
from cluster.coordinator.view import (
    ClusterStatus,
    GroupPhase,
    MembershipChange,
    PlacementStatus,
    RouterReport,
    ShardState,
    View,
)
from model.placement import Placement
from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, ShardStatus, WorkRatio
from tests.cluster.coordinator.group_reports import member
from tests.cluster.profiles import PROFILE
from tests.placements import contiguous_placement, even_shares

MEMBERS = tuple(member(name, budget=1_400 << 20) for name in "abc")


def a_status() -> ClusterStatus:
    placement = contiguous_placement(2, 6, (2, 2, 2))
    shards = tuple(
        (one, ShardStatus(one.shard_id, 1, ShardState.READY, num_running=12, num_waiting=3, kv_blocks_total=300,
                          kv_blocks_free=75, resident_bytes=1_041 << 20, num_tokens_computed=12_345,
                          num_expert_rows=1_234_567)) for one in reversed(MEMBERS))
    routers = (RouterReport("r1", "node-a", "127.0.0.1:8000", "127.0.0.1:9000", epoch_number=1, is_ready=True),)
    return ClusterStatus(View(GroupPhase.READY, Epoch(1, MEMBERS, placement, "", even_shares(3))), shards, routers)


def shown(status: ClusterStatus, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(StatusView(status))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_80_columns_in_order_of_ranks() -> None:
    text = shown(a_status())
    assert "healthy" in text and "…" not in text
    rows = [line for line in text.splitlines() if line.strip().startswith("node-")]
    assert [row.split()[0] for row in rows] == ["node-a", "node-b", "node-c"]
    assert all("1,041 of 1,400" in row and "75%" in row and "12+3" in row and "1,234,567 (33%)" in row for row in rows)
    assert "HTTP at 127.0.0.1:8000" in text and "127.0.0.1:9000" in text


def test_emulated_speeds_are_marked_in_the_table_and_in_the_json() -> None:
    status = a_status()
    slow = replace(MEMBERS[1], profile=replace(PROFILE, emulated_speed=0.125))
    status = replace(status, shards=tuple((slow if one is MEMBERS[1] else one, shard) for one, shard in status.shards))
    text = shown(status)
    lines = text.splitlines()
    marked = [index for index, line in enumerate(lines) if "(emulated" in line]
    assert len(marked) == 1 and lines[marked[0] - 1].split()[0] == "node-b" and "…" not in text
    assert lines[marked[0] + 1].strip() == "0.125)"
    profiles = [member["profile"] for member, _ in json.loads(status_json(status))["shards"]]
    assert [profile and profile["emulated_speed"] for profile in profiles] == [None, 0.125, None]


def test_blocks_and_states_of_a_hybrid_are_both_shown() -> None:
    status = a_status()
    shards = tuple((one, replace(shard, state_slots_total=10, state_slots_free=6, num_snapshots=3,
                                 num_cached_tokens=320)) for one, shard in status.shards)
    text = shown(replace(status, shards=shards))
    assert text.count("75%") == text.count("states 40%") == 3 and "1,041 of 1,400" in text and "…" not in text
    assert all(cell_len(line) <= 80 for line in text.splitlines())
    assert shown(replace(status, shards=shards), 100).count("75% / states 40%") == 3
    _, first = json.loads(status_json(replace(status, shards=shards)))["shards"][0]
    names = ("state_slots_total", "state_slots_free", "num_snapshots", "num_cached_tokens")
    assert [first[name] for name in names] == [10, 6, 3, 320]


LONG = ("gke-production-europe-gpu-pool-3f2a9c1b-x7kq.europe-west4-a.c.example.internal",
        "計算機の名前はとても長い-壱番-東京", "c")


@pytest.mark.parametrize("width", [80, 120])
def test_no_column_is_lost_to_long_names_and_messages(width: int) -> None:
    why = "CheckpointError: " + "the weights of layer 3 could not be read from the disk of this node " * 4
    status = a_status()
    shards = tuple((replace(one, node_name=name), replace(shard, detail=why if name == "c" else "",
                                                          resident_bytes=61_041 << 20, num_expert_rows=10**11))
                   for name, (one, shard) in zip(LONG, status.shards, strict=True))
    lines = shown(replace(status, shards=shards), width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    rows = [line for line in lines if " ready " in line and "61,041 of 1,400" in line]
    assert len(rows) == 3 and all("2 a layer" in row or ": " in row for row in rows)
    assert all("12+3" in row and "(33%)" in row and "75%" in row for row in rows)
    assert rows[-1].split()[0].endswith("internal") and "東京" in rows[-2]         # the last rank is reported first
    said = " ".join(lines[lines.index(rows[-1]) + 1:])
    assert "c: CheckpointError" in said and said.count("layer 3") == 4


def test_many_shards_of_one_node_are_one_row_and_the_dead_of_older_epochs_one_line() -> None:
    members = tuple(replace(MEMBERS[0], shard_id=f"s{index}") for index in range(64)) + MEMBERS[1:2]
    placement = contiguous_placement(2, 130, (2,) * 65)
    shards = [(one, ShardStatus(one.shard_id, 9, ShardState.READY, num_running=1, resident_bytes=1 << 30,
                                num_expert_rows=100)) for one in members]
    shards += [(replace(MEMBERS[2], shard_id=f"old{index}"),
                ShardStatus(f"old{index}", index, ShardState.FAILED, detail="lost power")) for index in range(12)]
    epoch = Epoch(9, members, placement, "", even_shares(65))
    text = shown(ClusterStatus(View(GroupPhase.READY, epoch), tuple(shards), ()))
    assert "64 x node-a" in text and "256 copies" in text and "65,536 of 89,600" in text and "64+0" in text
    assert "6,400 (98%)" in text and text.count("node-b") == 1
    assert text.count("node-c") == 2 and "node-c (12 shards): lost power" in text and "12 shards have ended" in text
    assert len(text.splitlines()) < 12


def test_who_leaves_is_shown() -> None:
    status = a_status()
    leaving = replace(status.view, leaving=("cpu-b", "cpu-c"))
    assert "told to leave: cpu-b, cpu-c" in shown(replace(status, view=leaving))


def test_what_is_missing_is_shown() -> None:
    text = shown(ClusterStatus(View(GroupPhase.WAITING, None, "2 of 3 shards are here"), (), ()))
    assert "waiting" in text and "2 of 3 shards are here" in text


def test_expert_ranges() -> None:
    assert expert_ranges(contiguous_placement(3, 8, (2, 6, 0)), 0) == "6: 0-1"
    assert expert_ranges(contiguous_placement(3, 8, (2, 6, 0)), 2) == "none"
    uneven = Placement(2, (((0,), (0,), (1,)), ((0,), (1,), (1,))))
    assert expert_ranges(uneven, 0) == "3: 1-2 a layer"


def test_json_holds_everything() -> None:
    content = json.loads(status_json(a_status()))
    assert content["is_ready"] and content["view"]["epoch"]["number"] == 1 and len(content["shards"]) == 3
    assert "expert_rows" not in content
    load = ExpertLoad(1, 2, np.array([3, 1], np.float32).tobytes())
    placement = PlacementStatus(Epoch(1, MEMBERS[:2], contiguous_placement(1, 2, (1, 1)), "", even_shares(2)), None,
                                load, (WorkRatio(1.5, None, 30), None))
    content = json.loads(status_json(a_status(), placement))
    assert content["expert_rows"] == [[3.0, 1.0]]
    assert content["work_over_profile"] == [{"own": 1.5, "experts": None, "num_steps": 30, "own_spread": 0.0,
                                                "experts_spread": 0.0, "planning_s": None}, None]


def test_the_last_membership_changes_are_shown_with_cause_and_times() -> None:
    died = MembershipChange(1, 2, "died", ("cpu-c",), 1.0, 12.0, 15.4, 15.6, 42.0, "epoch 1 ended", {"sent": 3})
    waits = MembershipChange(2, 0, "broke", (), 2.0, 3.0)
    text = " ".join(shown(replace(a_status(), membership_changes=(died, waits))).split())
    assert ("epoch 1 -> 2: died cpu-c after: detected 12 ms, regrouped 15 ms, loaded 16 ms, resumed 42 ms; moved: 3 "
            "sent") in text
    assert "epoch 2 -> ?: broke after: detected 3 ms" in text
    assert json.loads(status_json(replace(a_status(), membership_changes=(died,))))["membership_changes"][0][
        "resumed_ms"] == 42.0
