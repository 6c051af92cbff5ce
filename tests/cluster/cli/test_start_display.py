"""`moesaic up` shows where it is: bars that count, and each reason to wait once."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli.start_display import StartDisplay
from cluster.coordinator.view import ClusterStatus, GroupPhase, ShardState, View
from cluster.launch.bring_up import Progress
from serving.config import ServeConfig, load_config
from serving.link.epoch import ShardStatus
from tests.cluster.coordinator.group_reports import member

MIB = 2**20


@pytest.fixture
def config() -> ServeConfig:
    return load_config(Path(__file__).parents[3] / "examples/demo.yaml")


def _status(*states: ShardState, view: View | None = None) -> ClusterStatus:
    shards = tuple((member(name, budget=MIB), ShardStatus(name, 1, state, bytes_read=3 * MIB, bytes_to_read=8 * MIB))
                   for name, state in zip("abc", states, strict=False))
    return ClusterStatus(view or View(GroupPhase.LOADING, None), shards, ())


def _shown(config: ServeConfig, *steps: Progress) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    with StartDisplay(console, config) as display:
        for step in steps:
            display(step)
    display.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bars_count_nodes_shards_weights_and_the_group(config: ServeConfig) -> None:
    nodes, num_shards = ("a", "b"), config.num_members
    text = _shown(config, Progress("nodes", nodes), Progress(
        "shards", nodes, _status(ShardState.WAITING, ShardState.LOADING, ShardState.READY)))
    assert f"2/{len(config.local_nodes)}" in text and f"3/{num_shards}" in text
    assert "6/16 MiB" in " ".join(text.split())         # who still waits has read nothing that counts
    assert f"1/{num_shards}" in next(line for line in text.splitlines() if "group ready" in line)


def test_without_local_nodes_no_bar_waits_for_them(config: ServeConfig) -> None:
    alone = config.model_copy(update={"local_nodes": ()})
    assert "Ray nodes" in _shown(config, Progress("")) and "Ray nodes" not in _shown(alone, Progress(""))


def test_a_reason_to_wait_is_said_once(config: ServeConfig) -> None:
    view = View(GroupPhase.WAITING, None, why="8 GB are missing", is_too_small=True)
    step = Progress("shards", (), _status(ShardState.WAITING, view=view))
    other = replace(step, status=_status(ShardState.WAITING, view=replace(view, why="1 GB is missing")))
    text = _shown(config, step, step, other)
    assert text.count("waiting: 8 GB are missing") == 1 and text.count("waiting: 1 GB is missing") == 1
