"""A reader of a plan is told of its figures: where each comes from, and what was assumed."""

from __future__ import annotations

from pathlib import Path

from cluster.whatif.notes import notes
from tests.cluster.whatif.plan_questions import EXAMPLES, question


def test_every_kind_of_device_says_its_data_sheet(tmp_path: Path) -> None:
    text = (EXAMPLES / "clusters/2xH100-4xA100-8xT4.yaml").read_text()
    asked = question(tmp_path, text)
    said = notes(asked)
    for nodes in asked.cluster.nodes:
        assert any(note.startswith(f"{nodes.name}, data sheet: ") and "TB/s" in note for note in said)
    assert "t4: no bfloat16 in its matrix units, counted as computing in float32" in said
    assert said[-1].startswith("assumed, not measured: ") and "% of read bandwidth" in said[-1]


def test_two_vendors_share_no_collectives(tmp_path: Path) -> None:
    two = notes(question(tmp_path, (EXAMPLES / "clusters/two-vendors.yaml").read_text()))
    one = notes(question(tmp_path, (EXAMPLES / "clusters/8xH100.yaml").read_text()))
    assert any("share no collectives" in note for note in two)
    assert not any("share no collectives" in note for note in one)


def test_links_between_nodes_say_where_they_are_from(tmp_path: Path) -> None:
    asked = question(tmp_path, (EXAMPLES / "clusters/2xH100-4xA100-8xT4.yaml").read_text())
    links = [note for note in notes(asked) if note.startswith("link between nodes")]
    assert len(links) == sum(link is not None for link in (asked.cluster.link, *(n.link for n in asked.cluster.nodes)))
    assert all("GB/s for all devices of a node" in link for link in links)
