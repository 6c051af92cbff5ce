"""The placement as text and JSON, and JSON back as a placement."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from cluster.cli.placement_view import experts_view, history_view, placement_json, placement_view, read_placement
from cluster.coordinator.view import PlacementStatus
from cluster.planner.layer.error import PlacementError
from model.placement import Placement
from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, PlacementChange, PlanFigures, RequestShare, WorkRatio
from tests.cluster.coordinator.group_reports import member

A, B, C = (member(name) for name in "abc")
PLACEMENT = Placement(3, (((0,), (1,), (0, 2), (2,)), ((0, 1, 2), (1,), (2,), (0,))))
SHARES = (RequestShare(0.5, 64), RequestShare(0.5, 64), RequestShare(0.0, 0))
CHANGE = PlacementChange("op", "hot experts", 3 << 20, 0, 2, "failed", detail="no room")
EPOCH = Epoch(4, (A, B, C), PLACEMENT, "", SHARES, PlanFigures(64, 100, 0.02, 0.016, "compute", "exact"), revision=2,
              changes=(CHANGE,))
ROWS = np.array([[10, 60, 20, 10], [0, 0, 0, 0]], dtype=np.float32)
RATIOS = (WorkRatio(1.04, 1.19, 50, 0.02, 0.05, 2.5e-4), WorkRatio(None, 2.5, 50), None)
STATUS = PlacementStatus(EPOCH, 3, ExpertLoad(2, 4, ROWS.tobytes()), RATIOS)


def shown(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_placement_shows_what_was_promised_and_who_takes_what() -> None:
    text = shown(placement_view(STATUS))
    assert "epoch 4, revision 2, revision 3 is prepared" in text
    assert "3,200 tokens/s" in text and "16.00 ms" in text and "1.250" in text
    assert "50.0%" in text and "0.0%" in text and "…" not in text


def test_the_history_says_what_moved_and_why_it_failed() -> None:
    text = shown(history_view(EPOCH.changes))
    assert "op" in text and "0 -> 2" in text and "3.0" in text and "no room" in text
    assert "no change" in shown(history_view(()))


def test_the_busiest_experts_come_first_with_their_holders() -> None:
    text = shown(experts_view(STATUS))
    assert "2.40" in text and text.index("1: 60.0% @ 1") < text.index("2: 20.0% @ 0,2")


@pytest.mark.parametrize("view", [placement_view, experts_view])
def test_a_member_that_is_slower_than_its_profile_is_seen(view: Callable[[PlacementStatus], RenderableType]) -> None:
    text = shown(view(STATUS))
    assert "rank 0: own 1.04 ± 0.02, experts 1.19 ± 0.05 x the profile; planning 0.25 ms" in text
    assert "rank 1: experts 2.50 ± 0.00 x the profile" in text and "rank 2: work not measured yet" in text
    members = json.loads(placement_json(STATUS))["members"]
    assert members[0]["work_over_profile"] == {
        "own": 1.04, "experts": 1.19, "num_steps": 50, "own_spread": 0.02, "experts_spread": 0.05,
        "planning_s": 2.5e-4}
    assert members[2]["work_over_profile"] is None


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text(placement_json(STATUS))
    content = json.loads(path.read_text())
    assert content["figures"]["ratio"] == pytest.approx(1.25) and content["expert_rows"][0][1] == 60.0
    assert read_placement(path, EPOCH) == PLACEMENT


def test_members_are_found_again_by_their_nodes(tmp_path: Path) -> None:
    """Shards have started again, and have other ids and ranks."""
    path = tmp_path / "placement.json"
    path.write_text(placement_json(STATUS))
    later = replace(EPOCH, members=(replace(C, shard_id="new-c"), A, B))
    assert read_placement(path, later).holders[0] == ((1,), (2,), (0, 1), (0,))


@pytest.mark.parametrize(("content", "message"), [
    ("{", "is no placement"), ("[" * 100_000, "is no placement"),
    ('{"holders": [[[0], "x"]]}', "ranks must be whole numbers"),
    ('{"holders": [[[0], []]]}', "expert 1 has no holder"),
    ('{"holders": [[[7]]]}', "within 0..2"),
    ('{"holders": [[[0]]], "members": [{"node": "elsewhere", "pool": "cpu"}]}', "unknown are elsewhere"),
    ('{"holders": [[[5]]], "members": [{"node": "node-a", "pool": "cpu"}, {"node": "node-b", "pool": "cpu"}, '
     '{"node": "node-c", "pool": "cpu"}]}', "is no placement"),
    ("[]", "is no placement")])
def test_wrong_files_are_told_how_to_be_right(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "placement.json"
    path.write_text(content)
    with pytest.raises(PlacementError, match=message):
        read_placement(path, EPOCH)
    with pytest.raises(PlacementError, match="cannot be read"):
        read_placement(tmp_path / "absent.json", EPOCH)
